"""MaskedSwin: MONAI with nothing hidden, else the dense network with restricted attention."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import (
    PatchMergingV2,
    SwinTransformer,
    compute_mask,
    get_window_size,
    window_partition,
    window_reverse,
)

from custom.encoders.masked_swin import ATTENTION, MaskedSwin, VisibleFeatures, to_grid
from custom.encoders.masking import hidden_voxels, hide_tokens, refine_mask
from custom.encoders.window_plan import bucket_lengths, plan_for
from custom.engine.cost import count_flops, peak_live_bytes

TINY = {
    "in_chans": 1,
    "embed_dim": 6,
    "window_size": (7, 7, 7),
    "patch_size": (2, 2, 2),
    "depths": (2, 1, 2, 2),
    "num_heads": (1, 2, 3, 6),
}
FULL = dict(TINY, embed_dim=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24))


def tiny_swin(seed=0, **changes):
    """A network whose biases, norms and position tables are far from their initial nothing."""
    torch.manual_seed(seed)
    net = MaskedSwin(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "relative_position_bias_table" in name:
                weight.normal_(0, 1)
            elif name.endswith("bias"):  # those of qkv are the padding's keys and values
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.normal_(1, 0.2)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return net


def crop_of(grid, batch_size=1, unit=32, dtype=torch.float32):
    return torch.rand(batch_size, 1, *(unit * side for side in grid), dtype=dtype)


def flat(maps):
    return torch.cat([values.flatten() for values in maps])


def lopsided(maps):
    """A loss to follow back; the plain sum and square of normed maps are constants, without a gradient."""
    values = flat(maps)
    return values @ torch.arange(values.numel(), device=values.device).sin().to(values)


def assert_same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other.double()).abs().max() / other.abs().max().clamp(min=1)
        assert error < tolerance


# -- the dense reference: MONAI's modules, and keys of hidden tokens taken out -------------------------


def dense_reference(net, x, hidden):
    """Five dense maps (B, C, gx, gy, gz) of the network whose attention may not look at hidden tokens."""
    features = net.patch_embed(x)
    maps = [net.proj_out(features, normalize=True)]
    for layers in (net.layers1, net.layers2, net.layers3, net.layers4):
        tokens = features.permute(0, 2, 3, 4, 1)  # (B, x, y, z, C)
        visible = ~refine_mask(hidden, tokens.shape[1] // hidden.shape[1])
        for block in layers[0].blocks:
            tokens = tokens + dense_window_attention(block, block.norm1(tokens), visible)
            tokens = tokens + block.mlp(block.norm2(tokens))
        features = layers[0].downsample(tokens).permute(0, 4, 1, 2, 3)
        maps.append(net.proj_out(features, normalize=True))
    return maps


def dense_window_attention(block, tokens, visible):
    x, y, z = dims = tokens.shape[1:4]
    window, shift = get_window_size(dims, block.window_size, block.shift_size)
    px, py, pz = (-dim % size for dim, size in zip(dims, window, strict=True))
    tokens = F.pad(tokens, (0, 0, 0, pz, 0, py, 0, px))
    visible = F.pad(visible, (0, pz, 0, py, 0, px), value=True)  # MONAI does look at its padding
    back = tuple(-size for size in shift)
    tokens, visible = tokens.roll(back, (1, 2, 3)), visible.roll(back, (1, 2, 3))

    padded = (x + px, y + py, z + pz)
    regions = compute_mask(padded, window, shift, tokens.device) if any(shift) else torch.zeros(1, 1, 1)
    seen = window_partition(visible[..., None], window)[:, None, :, 0]  # (B * windows, 1, n)
    allowed = (regions == 0).repeat(len(seen) // len(regions), 1, 1) & seen
    allowed = allowed | torch.eye(seen.shape[-1], dtype=torch.bool)  # a hidden query needs some key

    attended = dense_attention(block.attn, window_partition(tokens, window), allowed)
    attended = window_reverse(attended.view(-1, *window, tokens.shape[-1]), window, (len(tokens), *padded))
    return attended.roll(shift, (1, 2, 3))[:, :x, :y, :z]


def dense_attention(attn, windows, allowed):
    num_windows, n, channels = windows.shape
    query, key, value = attn.qkv(windows).view(num_windows, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = attn.relative_position_bias_table[attn.relative_position_index[:n, :n]].permute(2, 0, 1)
    scores = attn.scale * query @ key.transpose(-2, -1) + bias
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    return attn.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(num_windows, n, channels))


def at_visible(maps, features):
    """The reference's maps where ours has something to say, as dense maps."""
    seen = to_grid(features._replace(maps=[torch.ones_like(scale) for scale in features.maps]))
    return [scale * one for scale, one in zip(maps, seen, strict=True)]


def relative_error(value, expected):
    return torch.linalg.norm(value - expected) / torch.linalg.norm(expected)


def gradients(net, loss):
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {name: weight.grad for name, weight in net.named_parameters()}


def check_against_reference(net, grid, batch_size, ratio, seed):
    torch.manual_seed(seed)
    x, hidden = crop_of(grid, batch_size, net.unit), hide_tokens(batch_size, grid, ratio)
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        fused, single = (to_grid(run(x, hidden=hidden)) for run in (net, _with_attention(net, "chunked")))
    features = exact(x.double(), hidden=hidden)
    expected = at_visible(dense_reference(exact, x.double(), hidden), features)
    assert_same(fused, expected, 1e-5)
    assert_same(single, expected, 1e-5)
    ours = to_grid(features)
    assert_same(ours, expected, 1e-12)

    ours, theirs = (gradients(exact, lopsided(maps)) for maps in (ours, expected))
    for name, gradient in theirs.items():
        assert torch.linalg.norm(ours[name] - gradient) <= 1e-9 * (1 + torch.linalg.norm(gradient)), name


def _with_attention(net, attention):
    net = copy.deepcopy(net)
    net.attention = attention
    return net


networks = st.fixed_dictionaries(
    {
        "depths": st.tuples(*[st.integers(1, 3)] * 4),
        "window_size": st.sampled_from([(7, 7, 7), (4, 4, 4), (7, 7, 5), (3, 5, 2), (8, 1, 6)]),
        "downsample": st.sampled_from(["merging", "mergingv2"]),
        "qkv_bias": st.booleans(),
        "patch_norm": st.booleans(),
        "patch_size": st.sampled_from([(2, 2, 2), (1, 1, 1)]),
    }
)
crops = st.tuples(*[st.integers(1, 3)] * 3).filter(lambda grid: 2 <= np.prod(grid) <= 4)
large_crops = st.tuples(*[st.integers(1, 5)] * 3).filter(lambda grid: 5 <= np.prod(grid) <= 18)


@given(networks, crops, st.integers(1, 2), st.floats(0.3, 0.74), st.integers(0, 99))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_visible_features_and_all_gradients_are_those_of_the_dense_network(change, grid, batch, ratio, seed):
    check_against_reference(tiny_swin(seed, **change), grid, batch, ratio, seed)


@pytest.mark.slow
@given(networks, large_crops, st.integers(1, 3), st.floats(0.2, 0.8), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_larger_crops_agree_with_the_dense_network_as_well(change, grid, batch, ratio, seed):
    check_against_reference(tiny_swin(seed, **change), grid, batch, ratio, seed)


def test_windows_shift_and_padding_of_swin_unetr_agree_with_the_dense_network():
    # 3 x 1 x 2 units: stages of 48, 24, 12, 6 tokens along x: padding at three, a shrunk window at the last
    check_against_reference(tiny_swin(), (3, 1, 2), batch_size=1, ratio=0.5, seed=1)


# -- nothing hidden: MONAI -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch, sides", [(1, (64, 32, 96)), (2, (50, 37, 29))])
def test_with_nothing_hidden_it_computes_what_monai_computes(attention, batch, sides):
    net = tiny_swin(attention=attention, window_size=(7, 7, 5), downsample="mergingv2")
    x = torch.rand(batch, 1, *sides)
    for normalize, grad in ((True, True), (False, False)):
        with torch.set_grad_enabled(grad):
            assert_same(net(x, normalize), SwinTransformer.forward(net, x, normalize))


def test_with_nothing_hidden_gradients_are_monais():
    net, x = tiny_swin().double(), crop_of((2, 1, 1), 2, dtype=torch.float64)
    ours = gradients(net, lopsided(net(x)))
    theirs = gradients(net, lopsided(SwinTransformer.forward(net, x)))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-8)


def test_a_mask_that_hides_nothing_gives_the_dense_maps():
    net, x = tiny_swin(), crop_of((2, 1, 3))
    features = net(x, hidden=torch.zeros(1, 2, 1, 3, dtype=torch.bool))
    assert_same(to_grid(features), SwinTransformer.forward(net, x))


def test_drop_path_draws_as_monai_draws():
    net, x = tiny_swin(drop_path_rate=0.5).train(), crop_of((1, 1, 2), 3)
    torch.manual_seed(1)
    ours = net(x)
    torch.manual_seed(1)
    assert_same(ours, SwinTransformer.forward(net, x))


def test_attention_dropout_is_active_in_training_only():
    net, x = tiny_swin(attn_drop_rate=0.5, attention="chunked"), crop_of((1, 1, 2))
    assert_same(net(x), SwinTransformer.forward(net, x))
    net.train()
    assert not torch.equal(net(x)[4], net(x)[4])


def test_it_stands_in_for_the_encoder_of_swin_unetr():
    unetr = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, downsample="mergingv2").eval()
    before = dict(unetr.swinViT.state_dict())
    net = MaskedSwin(1, 12, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), downsample=PatchMergingV2)
    assert net.state_dict().keys() == before.keys()
    net.load_state_dict(before)
    unetr.swinViT.load_state_dict(net.state_dict())
    x = crop_of((1, 2, 1))
    with torch.no_grad():
        expected = unetr(x)
        unetr.swinViT = net
        torch.testing.assert_close(unetr(x), expected, rtol=1e-5, atol=1e-5)


def test_settings_build_the_same_network_from_json():
    net = tiny_swin(downsample=PatchMergingV2, qkv_bias=False, patch_norm=True)
    twin = MaskedSwin(**json.loads(json.dumps(net.settings))).eval()
    twin.load_state_dict(net.state_dict())
    assert twin.settings == net.settings
    assert net.unit == 32
    x = crop_of((1, 1, 1))
    assert_same(twin(x), net(x), 1e-7)


# -- units hidden --------------------------------------------------------------------------------------


def test_hidden_voxels_do_not_reach_the_encoder():
    net, grid = tiny_swin(), (2, 3, 1)
    x, hidden = crop_of(grid), hide_tokens(1, grid, ratio=0.5)
    altered = x.masked_fill(hidden_voxels(hidden, net.unit), torch.nan)
    before, after = (flat(net(crop, hidden=hidden).maps) for crop in (x, altered))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_samples_of_a_batch_have_their_own_masks():
    net, grid = tiny_swin(), (3, 1, 2)
    x = crop_of(grid, 3)
    hidden = torch.stack(
        [hide_tokens(1, grid, 0.5, torch.Generator().manual_seed(seed))[0] for seed in (0, 1, 5)]
    )
    assert not torch.equal(hidden[0], hidden[1])
    together = net(x, hidden=hidden)
    for sample in range(3):
        alone = net(x[sample : sample + 1], hidden=hidden[sample : sample + 1])
        assert_same([scale[sample : sample + 1] for scale in together.maps], alone.maps)


def test_to_grid_lays_units_out_and_leaves_zeros_where_hidden():
    hidden = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool).view(2, 3, 1, 2)
    units = torch.tensor([[1, 5], [0, 3]])
    volume = torch.arange(2 * 4 * 6 * 2 * 4.0).view(2, 4, 6, 2, 4) + 1  # units of 2 tokens
    cubes = torch.stack(
        [
            torch.stack([volume[b, :, 2 * x : 2 * x + 2, :, 2 * z : 2 * z + 2] for x, z in places])
            for b, places in enumerate([[(0, 1), (2, 1)], [(0, 0), (1, 1)]])
        ]
    )
    (laid_out,) = to_grid(VisibleFeatures([cubes], units, (3, 1, 2)))
    torch.testing.assert_close(laid_out, volume.masked_fill(hidden_voxels(hidden, 2), 0), rtol=0, atol=0)


def test_units_and_shapes_of_visible_features():
    hidden = torch.tensor([True, False, True, True, False, True]).view(1, 2, 3, 1)
    features = tiny_swin()(crop_of((2, 3, 1)), hidden=hidden)
    assert features.grid == (2, 3, 1)
    assert features.units.tolist() == [[1, 4]]
    assert [tuple(scale.shape) for scale in features.maps] == [
        (1, 2, 6 * 2**stage, 16 >> stage, 16 >> stage, 16 >> stage) for stage in range(5)
    ]


def test_a_plan_made_elsewhere_serves_and_hidden_is_then_not_read():
    net, grid = tiny_swin(), (2, 1, 3)
    x, hidden = crop_of(grid, 2), hide_tokens(2, grid, 0.67)
    plan = pickle.loads(pickle.dumps(plan_for(hidden, json.loads(json.dumps(net.settings)))))
    expected = net(x, hidden=hidden)
    for features in (net(x, plan=plan), net(x, hidden=torch.zeros(0), plan=plan)):
        assert torch.equal(features.units, expected.units)
        assert torch.equal(flat(features.maps), flat(expected.maps))


@pytest.mark.parametrize("attention", ["chunked", "plain", "sdpa"])
def test_bfloat16_stays_close_forward_and_backward(attention):
    net, grid = tiny_swin(), (1, 2, 2)
    x, hidden = crop_of(grid), hide_tokens(1, grid, 0.5)
    exact = net(x, hidden=hidden).maps
    expected = gradients(net, lopsided(exact))
    net.attention = attention
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x, hidden=hidden).maps
    assert relative_error(flat(rounded).float(), flat(exact)) < 0.03
    found = gradients(net, lopsided([scale.float() for scale in rounded]))
    assert relative_error(flat(found.values()), flat(expected.values())) < 0.1


@pytest.mark.parametrize("attention", ["chunked", "plain"])
def test_scores_are_single_precision_under_bfloat16(attention):
    net, x = tiny_swin(attention=attention), crop_of((1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        before = flat(net(x))
        for name, table in net.named_parameters():
            if "relative_position_bias_table" in name:
                table.data += 1000  # nothing to a softmax; bfloat16 would round the scores to fours
        assert relative_error(flat(net(x)), before) < 0.01


def test_a_network_cast_to_bfloat16_runs():
    net, grid = tiny_swin(), (1, 1, 2)
    x, hidden = crop_of(grid), hide_tokens(1, grid, 0.5)
    exact = flat(net(x, hidden=hidden).maps)
    net.bfloat16()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            rounded = flat(net(x.bfloat16(), hidden=hidden).maps)
        assert rounded.dtype == torch.bfloat16
        assert relative_error(rounded, exact) < 0.05


def test_checkpointing_changes_no_gradient_and_holds_less():
    x, hidden = crop_of((1, 1, 4)), hide_tokens(1, (1, 1, 4), 0.5)
    nets = [
        tiny_swin(use_checkpoint=flag, drop_path_rate=0.3, depths=(3, 2, 2, 2)).train()
        for flag in (False, True)
    ]
    found = []
    for net in nets:
        torch.manual_seed(4)
        found.append(gradients(net, lopsided(net(x, hidden=hidden).maps)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    plain, lean = (
        peak_live_bytes(lambda net=net: flat(net(x, hidden=hidden).maps).sum().backward()) for net in nets
    )
    assert lean < 0.8 * plain


def test_a_plan_made_in_inference_mode_trains_later():
    net, x = tiny_swin(), crop_of((1, 1, 1))[..., :27]  # sides that no other test uses: the cache is empty
    with torch.inference_mode():
        net(x)
    lopsided(net(x)).backward()


@pytest.mark.gpu
def test_a_gpu_agrees_and_never_makes_the_host_wait():
    net, grid = tiny_swin().cuda(), (2, 2, 3)
    x, hidden = crop_of(grid, 2), hide_tokens(2, grid, 0.75)
    expected = net.cpu()(x, hidden=hidden)
    net, x = net.cuda(), x.cuda()
    net(x, hidden=hidden)  # kernels are loaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = net(x, hidden=hidden)
        lopsided(features.maps).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same([scale.cpu() for scale in features.maps], expected.maps, 1e-4)


# -- cost, metered on the meta device: deterministic ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(96, 96, 96), (192, 192, 64)])
def test_hiding_three_quarters_takes_a_fifth_of_the_flops_and_memory(sides):
    net, x = MaskedSwin(**FULL).to("meta"), torch.empty(1, 1, *sides, device="meta")
    hidden = hide_tokens(1, [side // 32 for side in sides], 0.75, torch.Generator().manual_seed(0))

    def dense():
        flat(SwinTransformer.forward(net, x)).sum().backward()

    def visible():
        flat(net(x, hidden=hidden).maps).sum().backward()

    assert count_flops(visible) <= 0.22 * count_flops(dense)
    assert peak_live_bytes(visible) <= 0.2 * peak_live_bytes(dense)


def test_the_meter_sees_what_is_alive_together():
    def work():
        first = torch.empty(1000)
        second = first * 2
        del first
        third = second.view(10, 100).t() + 1  # the view costs nothing
        return third @ torch.empty(10, 5)

    # at most two of the three 4000 byte tensors, then second and third are left with 200 and 2000 bytes
    assert peak_live_bytes(work) == 4000 + 4000 + 200 + 2000
    assert count_flops(work) == 2 * 100 * 10 * 5


def test_lengths_are_padded_at_the_least_cost():
    lengths = [2, 2, 3, 7, 7, 7, 8, 11, 13, 20]

    def cost(edges):
        return sum(min(edge for edge in edges if edge >= length) ** 2 for length in lengths)

    choices = [edges for edges in itertools.combinations(sorted(set(lengths)), 3) if edges[-1] == 20]
    assert cost(bucket_lengths(np.array(lengths), 3)) == min(map(cost, choices))
    assert bucket_lengths(np.array([5, 5]), 6) == [5]
    assert bucket_lengths(np.array([], int), 6) == []


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_v2": True}, "use_v2=False"),
        ({"spatial_dims": 2}, "spatial_dims=3"),
        ({"downsample": "pooling"}, "'merging' or 'mergingv2'.*'pooling'"),
        ({"downsample": torch.nn.MaxPool3d}, "'merging' or 'mergingv2'.*MaxPool3d"),
        ({"use_hyena": True}, "use_hyena=False"),
        ({"hyena_stages": (True, False, False, False)}, "hyena_stages=None"),
        ({"norm_layer": torch.nn.InstanceNorm3d}, "LayerNorm"),
        ({"patch_size": (2, 2, 1)}, "cubic patch"),
        ({"depths": (2, 2, 2)}, "four stages"),
        ({"attention": "flash"}, "auto.*'flash'"),
    ],
)
def test_networks_that_cannot_run_on_visible_units_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MaskedSwin(**{**TINY, **change})


@pytest.mark.parametrize(
    "sides, mask, message",
    [
        ((64, 80, 32), (1, 2, 2, 1), "Y = 80: crop to 64 or pad to 96"),
        ((64, 32, 20), (1, 2, 1, 1), "Z = 20: crop to 32 or pad to 32"),
        ((64, 64, 32), (1, 2, 1, 1), r"\(1, 2, 2, 1\).*\(1, 2, 1, 1\)"),
        ((64, 64, 32), (2, 2, 2, 1), r"\(1, 2, 2, 1\).*\(2, 2, 2, 1\)"),
        ((64, 64, 32), (1, 4), r"got torch.bool \(1, 4\)"),
    ],
)
def test_masks_that_do_not_fit_the_crop_are_refused(sides, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_swin()(torch.rand(1, 1, *sides), hidden=torch.zeros(mask, dtype=torch.bool))


def test_masks_that_hide_all_or_unequally_are_refused():
    hidden = torch.tensor([[True, False, False], [True, True, False]]).view(2, 3, 1, 1)
    net, x = tiny_swin(), crop_of((3, 1, 1), 2)
    with pytest.raises(ValueError, match="same number"):
        net(x, hidden=hidden)
    with pytest.raises(ValueError, match="no visible token"):
        net(x, hidden=torch.ones_like(hidden))
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 3, 1, 1\)"):
        net(x, hidden=hidden.float())
