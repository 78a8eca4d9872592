import pytest
import torch
from conftest import TINY_VIT
from monai.networks.nets import ViT

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import hidden_voxels, hide_tokens
from custom.encoders.positions import positions_at, resize_positions


@pytest.fixture(params=["conv", "perceptron"])
def net(request):
    torch.manual_seed(0)
    return MaskedViT(**TINY_VIT, proj_type=request.param, pos_embed_type="learnable").eval()


def test_with_nothing_hidden_it_equals_monai_bit_for_bit(net):
    monai_vit = ViT(**TINY_VIT, proj_type=net.settings["proj_type"]).eval()
    monai_vit.load_state_dict(net.state_dict())  # strict: the keys are MONAI's
    volume = torch.rand(2, 1, 32, 48, 16)
    expected, states = monai_vit(volume)
    for hidden in (None, torch.zeros(2, 2, 3, 1, dtype=torch.bool)):
        tokens, own_states = net(volume, hidden=hidden)
        assert torch.equal(tokens, expected)
        assert all(torch.equal(a, b) for a, b in zip(own_states, states, strict=True))


def test_hidden_voxels_do_not_reach_the_encoder(net):
    volume, hidden = torch.rand(2, 1, 32, 48, 16), hide_tokens(2, (2, 3, 1), 0.5)
    altered = torch.where(hidden_voxels(hidden, (16, 16, 16)), torch.rand_like(volume), volume)
    before, after = net(volume, hidden=hidden)[0], net(altered, hidden=hidden)[0]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_visible_tokens_come_as_from_a_dense_network_fed_only_those(net):
    volume, hidden = torch.rand(2, 1, 32, 48, 16), hide_tokens(2, (2, 3, 1), 0.5)
    embedded = net.patch_embedding(volume)
    for sample in range(2):
        tokens = embedded[sample : sample + 1, ~hidden[sample].flatten()]
        for block in net.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(
            net(volume, hidden=hidden)[0][sample : sample + 1], net.norm(tokens), rtol=1e-5, atol=1e-5
        )


def test_another_crop_size_gets_interpolated_positions(net):
    volume = torch.rand(1, 1, 64, 32, 32)
    tokens, _ = net(volume)
    assert tokens.shape == (1, 4 * 2 * 2, 48)
    hidden = hide_tokens(1, (4, 2, 2), 0.75)
    assert net(volume, hidden=hidden)[0].shape == (1, 4, 48)
    assert not torch.allclose(net(volume.flip(2))[0], tokens.flip(1))


def test_every_trainable_parameter_learns():
    net = MaskedViT(**TINY_VIT)
    net(torch.rand(2, 1, 32, 48, 16), hidden=hide_tokens(2, (2, 3, 1), 0.5))[0].square().sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net.patch_embedding.position_embeddings.grad is not None


def test_settings_build_the_same_network():
    import json

    net = MaskedViT(**TINY_VIT, pos_embed_type="sincos")
    twin = MaskedViT(**json.loads(json.dumps(net.settings)))
    twin.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"img_size": (32, 40, 16)}, "y = 40 is not a multiple"),
        ({"classification": True}, "without a class token"),
        ({"spatial_dims": 2}, "3D"),
    ],
)
def test_unfit_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MaskedViT(**(TINY_VIT | kwargs))


def test_unfit_crops_and_masks_are_refused(net):
    with pytest.raises(ValueError, match="z = 20 is not a multiple"):
        net(torch.rand(1, 1, 32, 48, 20))
    with pytest.raises(ValueError, match="does not fit"):
        net(torch.rand(1, 1, 32, 48, 16), hidden=torch.zeros(1, 3, 2, 1, dtype=torch.bool))


def test_position_tables_move_between_grids_as_a_linear_field_must():
    grid, new = (2, 3, 4), (4, 6, 8)
    x = torch.arange(4.0).view(1, 1, 4).expand(2, 3, 4)
    table = x.reshape(1, 24, 1)
    moved = resize_positions(table, grid, new).view(*new)
    torch.testing.assert_close(moved[1, 2, 1:-1], torch.arange(0.25, 3.0, 0.5))
    assert resize_positions(table, grid, grid) is table
    with pytest.raises(ValueError, match="24 entries"):
        resize_positions(table, (2, 2, 2), new)
    picked = positions_at(table, torch.tensor([[5, 0]]))
    assert picked.flatten().tolist() == [1.0, 0.0]
