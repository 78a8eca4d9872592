import pytest
import torch

from custom.encoders.masking import hidden_voxels, hide_columns, hide_tokens, refine_mask, visible_index


def test_exactly_the_asked_share_is_hidden_in_every_sample():
    hidden = hide_tokens(5, (3, 5, 7), 0.75)
    assert hidden.shape == (5, 3, 5, 7)
    assert hidden.flatten(1).sum(1).tolist() == [round(0.75 * 105)] * 5


def test_samples_get_masks_of_their_own_and_a_generator_repeats_them():
    draw = [hide_tokens(2, (4, 5, 6), 0.5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0][0], draw[0][1])


def test_every_token_is_hidden_equally_often():
    share = hide_tokens(4000, (2, 3, 2), 0.75).float().mean(0)
    assert (share - 0.75).abs().max() < 0.04


def test_columns_are_hidden_whole_and_rounded_up_as_the_authors_code_does():
    hidden = hide_columns(3, (4, 4, 5), 0.7)
    assert (hidden == hidden[..., :1]).all()
    assert hidden[..., 0].flatten(1).sum(1).tolist() == [12] * 3  # ceil(0.7 * 16)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="must be in"):
        hide_tokens(1, (2, 2, 2), ratio)


def test_hiding_everything_is_refused():
    with pytest.raises(ValueError, match="leaves none visible"):
        hide_tokens(1, (1, 1, 1), 0.75)


def test_voxels_of_a_token_are_hidden_together():
    hidden = torch.zeros(1, 2, 3, 1, dtype=torch.bool)
    hidden[0, 1, 2, 0] = True
    voxels = hidden_voxels(hidden, (2, 4, 8))
    assert voxels.shape == (1, 1, 4, 12, 8)
    assert voxels[0, 0, 2:, 8:].all() and voxels.sum() == 2 * 4 * 8
    assert refine_mask(hidden, 2).sum() == 8


def test_uneven_masks_and_fully_hidden_samples_are_refused():
    uneven = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match=r"same number.*\[1, 2\]"):
        visible_index(uneven)
    with pytest.raises(ValueError, match="no visible token"):
        visible_index(torch.ones(1, 3, dtype=torch.bool))
