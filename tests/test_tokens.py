"""Every encoder hands the method tokens on the stride-16 grid, in grid order, whatever is hidden."""

import pytest
import torch
from conftest import TINY_VIT

from custom.encoders.masked_swin import MaskedSwin, to_grid
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import gather_visible, hide_tokens, visible_index
from custom.encoders.nnformer import NNFormer
from custom.encoders.tokens import token_encoder
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss

SIZE = (64, 96, 32)


def swin():
    return MaskedSwin(1, 12, (7, 7, 7), (2, 2, 2), depths=[2, 1, 1, 1], num_heads=[1, 2, 2, 2])


def nnformer():
    return NNFormer(1, 2, img_size=SIZE, embed_dim=6, num_heads=(1, 1, 2, 2), drop_path_rate=0.0)


def vit():
    return MaskedViT(**(TINY_VIT | {"img_size": SIZE}))


@pytest.mark.parametrize("make, unit", [(vit, 16), (swin, 32), (nnformer, 16)])
def test_tokens_lie_at_stride_16_and_every_trained_parameter_learns(make, unit):
    torch.manual_seed(0)
    encoder = token_encoder(make())
    assert encoder.patch == (16, 16, 16) and encoder.unit == (unit,) * 3
    hidden = hide_tokens(4, encoder.units(SIZE), 0.5)
    student = StudentBranch(encoder, 48, 1, 4, 64, 32)
    teacher = student.make_teacher()
    crop = torch.rand(4, 1, *SIZE)
    out = student(crop, hidden, teacher(crop))
    assert out.pixels.shape == (4, 4 * 6 * 2, 16**3) and out.visible.shape == (4, 24, encoder.width)
    AliceLoss(encoder.patch)(out, crop, hidden)["total"].backward()
    without = [
        n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert [n for n in without if "qkv" not in n and "relative" not in n] == []


def test_swin_tokens_come_in_grid_order_with_fine_and_coarse_where_they_belong():
    torch.manual_seed(0)
    encoder = token_encoder(swin()).eval()
    crop, hidden = torch.rand(2, 1, *SIZE), hide_tokens(2, (2, 3, 1), 0.5)
    features = encoder.encoder(crop, hidden=hidden)
    maps = to_grid(features)
    coarse = torch.nn.functional.interpolate(maps[4], scale_factor=2, mode="nearest")
    dense = encoder._fuse(*(m.flatten(2).transpose(1, 2) for m in (maps[3], coarse)))
    index = visible_index(encoder.token_mask(hidden).flatten(1))
    found = encoder(crop, hidden)
    torch.testing.assert_close(found.tokens, gather_visible(dense, index), atol=1e-5, rtol=0)
    planned = encoder(crop, hidden, encoder.planner()(hidden))
    assert torch.equal(planned.tokens, found.tokens) and found.grid == (4, 6, 2)


def test_swin_with_nothing_hidden_is_the_same_by_either_path():
    encoder = token_encoder(swin()).eval()
    crop = torch.rand(1, 1, *SIZE)
    both = encoder(crop).tokens, encoder(crop, torch.zeros(1, 2, 3, 1, dtype=torch.bool)).tokens
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)


def test_nnformer_does_not_see_hidden_voxels():
    encoder = token_encoder(nnformer()).eval()
    crop, hidden = torch.rand(1, 1, *SIZE), hide_tokens(1, (4, 6, 2), 0.75)
    from custom.encoders.masking import hidden_voxels

    altered = torch.where(hidden_voxels(hidden, 16), torch.rand_like(crop), crop)
    assert torch.equal(encoder(crop, hidden).tokens, encoder(altered, hidden).tokens)
    assert encoder(crop, hidden).tokens.shape == (1, 12, 48)


def test_sides_that_are_no_multiple_of_the_unit_are_refused():
    with pytest.raises(ValueError, match=r"side x = 80 .*unit \(32 voxels\); take 64 or 96"):
        token_encoder(swin()).units((80, 96, 32))


@pytest.mark.slow
def test_the_official_pair_of_branches_learns_everywhere_and_its_teacher_follows():
    from custom.engine.ema import EMA
    from custom.methods.alice.official import OfficialStudent

    torch.manual_seed(0)
    student = OfficialStudent(
        NNFormer(1, 1, img_size=(64, 64, 64), embed_dim=6, num_heads=(1, 1, 2, 2), drop_path_rate=0.0),
        prototypes=16,
    )
    teacher = student.make_teacher().eval()
    EMA(teacher, student)
    crop, hidden = torch.rand(2, 1, 64, 64, 64), hide_tokens(2, (4, 4, 4), 0.75)
    out = student(crop, hidden, teacher(crop), teacher.casa)
    assert out.student_tokens.shape == (2, 64, 16) and teacher(crop).tokens.shape == (2, 512, 16)
    assert out.pixels.shape == (2, 64, 16**3)
    AliceLoss((16, 16, 16), "dino", reconstruction="whole", width=16)(out, crop, hidden)["total"].backward()
    without = [
        n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert [n for n in without if "qkv" not in n and "bias" not in n] == []
    assert not any(p.requires_grad for p in teacher.parameters())
