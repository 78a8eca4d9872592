"""nnFormer: the authors' sizes and formulas, windows against a dense reference, other crops, hiding."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from custom.encoders.nnformer import (
    Block,
    NNFormer,
    partition,
    relative_position_index,
    shift_mask,
    unpartition,
)

TINY = {"img_size": (32, 32, 32), "embed_dim": 12, "num_heads": (1, 2, 3, 4)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "used", "rows"), [(4, 115, 343), (8, 547, 3375)])
def test_the_official_index_uses_only_some_rows_and_the_injective_one_all(window, used, rows):
    official = relative_position_index(window, window, "official")
    injective = relative_position_index(window, window, "injective")
    assert official.shape == injective.shape == (window**3, window**3)
    assert len(official.unique()) == used
    assert sorted(injective.unique().tolist()) == list(range(rows))
    assert official.max() < rows


def test_the_index_is_the_one_computed_by_hand():
    official = relative_position_index(4, 4, "official")
    assert official[0, 0] == 3 * 11 + 3 * 7 + 3  # no offset: d + 3 = 3 along each axis
    assert official[0, 1] == 3 * 11 + 3 * 7 + 2  # query at w = 0, key at w = 1
    assert official[4, 0] == 3 * 11 + 4 * 7 + 3  # query at h = 1
    assert official[16, 0] == 4 * 11 + 3 * 7 + 3  # query at s = 1
    assert relative_position_index(4, 4, "injective")[16, 0] == 4 * 49 + 3 * 7 + 3


@pytest.mark.parametrize("kind", ["official", "injective"])
def test_a_smaller_window_reads_the_rows_of_the_same_offsets(kind):
    small, large = relative_position_index(2, 4, kind), relative_position_index(4, 4, kind)
    corner = [16 * s + 4 * h + w for s in range(2) for h in range(2) for w in range(2)]
    assert torch.equal(small, large[corner][:, corner])


def test_an_unknown_index_and_a_window_beyond_its_table_are_refused():
    with pytest.raises(ValueError, match="'official' or 'injective'"):
        relative_position_index(4, 4, "swin")
    with pytest.raises(ValueError, match="no rows for windows of 5"):
        relative_position_index(5, 4, "official")


def test_partition_keeps_neighbours_together_and_can_be_undone():
    x = torch.arange(2 * 4 * 6 * 2 * 3).view(2, 4, 6, 2, 3)
    windows = partition(x, 2)
    assert windows.shape == (2, 2 * 3 * 1, 8, 3)
    assert torch.equal(windows[1, 4], x[1, 2:4, 2:4, 0:2].reshape(8, 3))  # second along s, second along h
    assert torch.equal(unpartition(windows, 2, (4, 6, 2)), x)


def test_the_shift_mask_parts_tokens_that_were_not_neighbours():
    grid, window, shift = (8, 12, 8), 4, 2
    position = torch.stack(torch.meshgrid(*(torch.arange(g) for g in grid), indexing="ij"), dim=-1)
    before = (position + shift) % torch.tensor(grid)  # where each token of the rolled grid came from
    tokens = partition(before[None], window)[0]
    apart = ((tokens[:, :, None] - tokens[:, None]).abs() >= window).any(-1)
    mask = shift_mask(grid, window, shift)
    assert torch.equal(mask, apart * -100.0)
    assert not mask[0].any()
    assert mask[-1].any()


# -- a block against attention written without windows -------------------------------------------------------


def dense_block(block: Block, x: Tensor, query: Tensor, context: Tensor, shift: int) -> Tensor:
    """The block on one sample (S, H, W, C) by one attention over all pairs of (padded) tokens."""
    attn, grid, channels = block.attn, x.shape[:3], x.shape[3]
    window, heads = min(block.window, *grid), attn.num_heads
    padded = [math.ceil(g / window) * window for g in grid]

    def pad(y: Tensor) -> Tensor:
        out = torch.zeros(*padded, channels)
        out[: grid[0], : grid[1], : grid[2]] = block.norm1(y)
        return out.view(-1, channels)

    if hasattr(attn, "kv"):
        q, (k, v) = pad(query), attn.kv(pad(context)).chunk(2, -1)
    else:
        q, k, v = attn.qkv(pad(x)).chunk(3, -1)
    place = torch.stack(torch.meshgrid(*(torch.arange(p) for p in padded), indexing="ij"), -1).view(-1, 3)
    rolled = (place - shift) % torch.tensor(padded)
    cell, local = rolled // window, rolled % window
    together = (cell[:, None] == cell[None]).all(-1)
    far = ((place[:, None] - place[None]).abs() >= window).any(-1)
    d = local[:, None] - local[None] + attn.window - 1
    w = attn.window
    slow = 3 * w - 1 if attn.kind == "official" else (2 * w - 1) ** 2
    row = (d[..., 0] * slow + d[..., 1] * (2 * w - 1) + d[..., 2]).clamp(0, (2 * w - 1) ** 3 - 1)
    out = torch.zeros(len(place), channels)
    for head in range(heads):
        part = slice(head * channels // heads, (head + 1) * channels // heads)
        score = q[:, part] @ k[:, part].T / math.sqrt(channels // heads)
        score = score + attn.relative_position_bias_table[row, head] - 100.0 * far
        out[:, part] = score.masked_fill(~together, -torch.inf).softmax(-1) @ v[:, part]
    x = x + attn.proj(out).view(*padded, channels)[: grid[0], : grid[1], : grid[2]]
    return x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))


@pytest.mark.parametrize("kind", ["official", "injective"])
@pytest.mark.parametrize(
    ("grid", "window", "shifted", "shift"),
    [
        ((8, 4, 12), 2, False, 0),
        ((8, 4, 12), 2, True, 1),
        ((8, 8, 8), 4, True, 2),
        ((4, 8, 12), 4, True, 0),  # the smallest side is one window: nothing is shifted
        ((5, 7, 6), 4, True, 2),  # padded to 8, 8, 8
        ((2, 4, 6), 4, True, 0),  # the window shrinks to 2
        ((3, 7, 5), 4, True, 0),  # the window shrinks to 3, padded to 3, 9, 6
    ],
)
def test_windows_are_attention_among_the_tokens_of_each_window(kind, grid, window, shifted, shift):
    block = Block(12, 3, window, kind, shifted=shifted).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, *grid, 12)
    got = block(x)
    want = torch.stack([dense_block(block, sample, sample, sample, shift) for sample in x])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    table = block.attn.relative_position_bias_table
    seed = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * seed).sum(), table)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_cross_block_asks_the_skip_with_an_unprojected_query():
    block = Block(12, 3, 4, "official", cross=True).eval()
    x, query, context = torch.randn(3, 8, 4, 8, 12)
    got = block(x[None], query=query[None], context=context[None])[0]
    torch.testing.assert_close(got, dense_block(block, x, query, context, 0), rtol=1e-4, atol=1e-5)


# -- the network ---------------------------------------------------------------------------------------------


def test_parameters_are_as_many_as_the_authors():
    network = NNFormer(position_embedding="none")
    assert (count(network.encoder), count(network.decoder), count(network)) == (
        7_651_668,
        2_071_404,
        9_725_763,
    )
    assert count(NNFormer(position_embedding="learnable")) == 9_725_763 + 32**3 * 48


def test_maps_have_the_official_order_and_sizes():
    network = NNFormer().eval()
    with torch.no_grad():
        maps = network.encode(torch.rand(1, 1, 64, 64, 64))
        decoded, logits = network.decode(maps), network(torch.rand(1, 1, 64, 64, 64))
    assert [m.shape[1:] for m in maps] == [(48, *[32] * 3), (96, *[16] * 3), (192, *[8] * 3), (384, *[4] * 3)]
    assert [m.shape[1:] for m in decoded] == [(192, *[8] * 3), (96, *[16] * 3), (48, *[32] * 3)]
    assert [m.shape[1:] for m in logits] == [(1, *[64] * 3), (1, *[32] * 3), (1, *[16] * 3)]
    torch.testing.assert_close(maps[0].movedim(1, -1).mean(-1), torch.zeros(1, 32, 32, 32), rtol=0, atol=1e-5)


def test_axes_stay_in_their_place_for_crops_of_other_sizes():
    network = NNFormer(**TINY, out_channels=3).eval()
    with torch.no_grad():
        maps = network.encode(torch.rand(2, 1, 32, 80, 48))  # grids 16 40 24 to 2 5 3: padded windows
        logits = network(torch.rand(2, 1, 32, 80, 48))
    assert [m.shape[2:] for m in maps] == [(16, 40, 24), (8, 20, 12), (4, 10, 6), (2, 5, 3)]
    assert [m.shape[1:] for m in logits] == [(3, 32, 80, 48), (3, 16, 40, 24), (3, 8, 20, 12)]


def test_the_synapse_configuration_has_its_anisotropic_patches():
    settings = NNFormer.synapse_settings()
    assert [i // p for i, p in zip(settings["img_size"], settings["patch_size"], strict=True)] == [32, 32, 32]
    smaller = {"embed_dim": 24, "num_heads": (3, 6, 12, 24), "img_size": (32, 64, 128)}
    network = NNFormer(**(settings | smaller)).eval()
    with torch.no_grad():
        logits = network(torch.rand(1, 1, 32, 64, 128))
    assert network.encoder.grid == (16, 16, 32)
    assert network.encoder.patch_embed.proj1.conv1.stride == (2, 2, 2)
    assert network.encoder.patch_embed.proj2.conv1.stride == (1, 2, 2)
    assert [m.shape[1:] for m in logits] == [(14, 32, 64, 128), (14, 16, 32, 64), (14, 8, 16, 32)]
    assert not any("mask_token" in name or "position_table" in name for name in network.state_dict())


@pytest.mark.parametrize("size", [(32, 40, 32), (32, 32, 8), (32, 0, 32)])
def test_sizes_that_do_not_halve_evenly_are_refused_with_the_nearest_ones(size):
    network = NNFormer(**TINY)
    with pytest.raises(ValueError, match="multiple of 16: take"):
        network.encode(torch.rand(1, 1, *size))
    with pytest.raises(ValueError, match="multiple of 16: take"):
        NNFormer(**(TINY | {"img_size": size}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (5, 2, 3, 4)}, "do not divide among 5 heads"),
        ({"depths": (2, 2, 2)}, "one entry per stage"),
        ({"patch_size": (3, 2, 2)}, "patches of 1, 2 or 4"),
        ({"window_size": (1, 4, 4, 4)}, "2 tokens or more"),
        ({"position_embedding": "rope"}, "'none', 'sincos' or 'learnable'"),
        ({"relative_index": "swin"}, "'official' or 'injective'"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NNFormer(**(TINY | change))


def test_the_shape_of_the_input_is_checked():
    with pytest.raises(ValueError, match=r"Expected a volume \(B, 1, S, H, W\)"):
        NNFormer(**TINY).encode(torch.rand(1, 2, 32, 32, 32))
    with pytest.raises(ValueError, match="takes the encoder's 4 maps"):
        NNFormer(**TINY).decode([torch.rand(1, 12, 16, 16, 16)])


def test_settings_survive_json_and_rebuild_the_same_network():
    network = NNFormer(2, 3, **TINY, position_embedding="learnable", relative_index="official").eval()
    twin = NNFormer(**json.loads(json.dumps(network.settings))).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.rand(1, 2, 32, 16, 48)
    with torch.no_grad():
        for ours, theirs in zip(network(x), twin(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "saved", "trained"), [("none", 0, 0), ("sincos", 1, 0), ("learnable", 1, 1)]
)
def test_the_position_table_is_saved_and_only_the_learnable_one_trained(kind, saved, trained):
    network = NNFormer(**TINY, position_embedding=kind)
    assert ("encoder.position_table" in network.state_dict()) == bool(saved)
    assert ("encoder.position_table" in dict(network.named_parameters())) == bool(trained)


def test_positions_are_added_to_the_tokens_in_grid_order():
    network = NNFormer(**TINY, position_embedding="learnable").eval()
    plain = NNFormer(**TINY, position_embedding="none").eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    table = torch.zeros(16, 16, 16, 12)
    table[5, 6, 7] = 100.0
    network.encoder.position_table.data = table.view(1, -1, 12)
    x = torch.rand(1, 1, 32, 32, 32)
    tokens = []
    for net in (network, plain):
        net.encoder.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
        net.encode(x)
    torch.testing.assert_close(tokens[0] - tokens[1], table[None], rtol=0, atol=1e-4)


def test_hidden_voxels_do_not_reach_the_encoder():
    network = NNFormer(**TINY).eval()
    volume = torch.rand(2, 1, 32, 48, 16)
    hidden = torch.zeros(2, 2, 3, 1, dtype=torch.bool)
    hidden[0, 1, 2, 0] = hidden[1, 0, 1, 0] = True
    altered = volume.clone()
    altered[0, :, 16:, 32:] = 7.0
    altered[1, :, :16, 16:32] = -3.0
    with torch.no_grad():
        before, after = network.encode(volume, hidden=hidden), network.encode(altered, hidden=hidden)
        seen, nothing = network.encode(volume), network.encode(volume, hidden=torch.zeros_like(hidden))
    for a, b, c, d in zip(before, after, seen, nothing, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, d, rtol=0, atol=0)
        assert not torch.allclose(a, c)


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"bool \(1, 2, 2, 2\)"):
        NNFormer(**TINY).encode(
            torch.rand(1, 1, 32, 32, 32), hidden=torch.zeros(1, 2, 2, 4, dtype=torch.bool)
        )


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    network = NNFormer(**TINY)
    rates = [b.drop_path.drop_prob for stage in network.encoder.layers for b in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 7 for i in range(8)])
    upward = [[b.drop_path.drop_prob for b in stage.blocks] for stage in network.decoder.layers]
    assert upward[2] == pytest.approx([0.0, 0.04])  # the coarsest, which comes first
    assert upward[0] == pytest.approx([0.16, 0.2])  # the finest
    x = torch.rand(4, 1, 32, 32, 32)
    assert not torch.allclose(network(x)[0], network(x)[0])
    network.eval()
    torch.testing.assert_close(network(x)[0], network(x)[0], rtol=0, atol=0)


def test_every_trainable_weight_learns_and_the_mask_token_is_frozen():
    network = NNFormer(**TINY, position_embedding="learnable", drop_path_rate=0.0)
    sum(logits.square().mean() for logits in network(torch.rand(2, 1, 32, 32, 32))).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["encoder.mask_token"]
    assert not network.encoder.mask_token.requires_grad


def test_without_deep_supervision_only_the_finest_logits_are_returned():
    network = NNFormer(**TINY).eval()
    x = torch.rand(1, 1, 32, 32, 32)
    finest = network(x)[0]
    network.deep_supervision = False
    torch.testing.assert_close(network(x), finest, rtol=0, atol=0)
