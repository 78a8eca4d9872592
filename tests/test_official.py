"""The authors' checkpoints: every wrapping loads, nothing partial does, and the networks are theirs."""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from custom.encoders.nnformer import NNFormer
from custom.landmarks.sam.network import SAM
from custom.transfer.official import (
    load_alice_nnformer,
    load_sam,
    read_alice_nnformer,
    read_checkpoint,
)

Shapes = dict[str, tuple[int, ...]]


# -- the authors' state dicts, by rule -----------------------------------------------------------------------


def sam_shapes(semantic: bool = False) -> Shapes:
    """Names and shapes of the authors' SAM (of UAE-S with ``semantic``), in their order."""
    shapes: Shapes = {}

    def conv_norm(name: str, out: int, into: int, *kernel: int) -> None:
        shapes[f"{name}.conv.weight"] = (out, into, *kernel)
        shapes.update({f"{name}.bn.{p}": (out,) for p in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def pyramid(name: str, *widths: int) -> None:
        for i, width in enumerate(widths):
            shapes[f"{name}.lateral_convs.{i}.conv.weight"] = (128, width, 1, 1, 1)
            shapes[f"{name}.lateral_convs.{i}.conv.bias"] = (128,)
        shapes[f"{name}.fpn_convs.0.conv.weight"] = (128, 128, 3, 3, 3)
        shapes[f"{name}.fpn_convs.0.conv.bias"] = (128,)

    conv_norm("backbone.conv1", 64, 1, 3, 7, 7)
    into = 64
    for layer, out, depth in [(1, 64, 1), (2, 128, 1), (3, 256, 3), (4, 512, 3)]:
        for block in (0, 1):
            name = f"backbone.layer{layer}.{block}"
            conv_norm(f"{name}.conv1", out, into, depth, 3, 3)
            conv_norm(f"{name}.conv2", out, out, depth, 3, 3)
            if block == 0:
                conv_norm(f"{name}.downsample", out, into, 1, 1, 1)
            into = out
    pyramid("neck", 64, 128, 256)
    pyramid("read_out_head", 512)
    if semantic:
        pyramid("semantic_head", 64, 128, 256)
    return shapes


def alice_shapes() -> Shapes:
    """Names and shapes of the authors' nnFormer, in their order."""
    shapes: Shapes = {}

    def pair(name: str, *weight: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0] if bias is None else bias,)

    def block(name: str, dim: int, window: int, heads: int, kv: bool = False) -> None:
        pair(f"{name}.norm1", dim)
        shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 3, heads)
        shapes[f"{name}.attn.relative_position_index"] = (window**3, window**3)
        pair(f"{name}.attn.{'kv' if kv else 'qkv'}", (2 if kv else 3) * dim, dim)
        pair(f"{name}.attn.proj", dim, dim)
        pair(f"{name}.norm2", dim)
        pair(f"{name}.mlp.fc1", 4 * dim, dim)
        pair(f"{name}.mlp.fc2", dim, 4 * dim)

    stages = list(zip((48, 96, 192, 384), (4, 4, 8, 4), (6, 12, 24, 48), strict=True))
    shapes["model_down.mask_token"] = (1, 1, 48)
    for proj, out, into in (("proj1", 24, 1), ("proj2", 48, 24)):
        name = f"model_down.patch_embed.{proj}"
        pair(f"{name}.conv1", out, into, 3, 3, 3)
        pair(f"{name}.conv2", out, out, 3, 3, 3)
        pair(f"{name}.norm1", out)
        if proj == "proj1":
            pair(f"{name}.norm2", out)
    pair("model_down.patch_embed.norm", 48)
    for i, (dim, window, heads) in enumerate(stages):
        for j in (0, 1):
            block(f"model_down.layers.{i}.blocks.{j}", dim, window, heads)
        if i < 3:
            pair(f"model_down.layers.{i}.downsample.reduction", 2 * dim, dim, 3, 3, 3)
            pair(f"model_down.layers.{i}.downsample.norm", dim)
    for i, (dim, _, _) in enumerate(stages):
        pair(f"model_down.norm{i}", dim)
    for i, (dim, window, heads) in enumerate(stages[:3]):
        block(f"decoder.layers.{i}.blocks.0", dim, window, heads, kv=True)
        block(f"decoder.layers.{i}.blocks.1", dim, window, heads)
        pair(f"decoder.layers.{i}.Upsample.norm", 2 * dim)
        pair(f"decoder.layers.{i}.Upsample.up", 2 * dim, dim, 2, 2, 2, bias=dim)
    for i in range(3):
        pair(f"final.{i}.up", 48 * 2**i, 1, 2, 2, 2, bias=1)
    return shapes


def official_index(window: int) -> Tensor:
    place = torch.tensor(list(itertools.product(range(window), repeat=3)))
    d = place[:, None] - place[None] + window - 1
    return d @ torch.tensor([3 * window - 1, 2 * window - 1, 1])


def cheap_state(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of those shapes that take almost no room in a file: each repeats one number of its own."""
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("relative_position_index"):
            state[name] = official_index(round(shape[0] ** (1 / 3)))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(number)
        else:
            state[name] = torch.tensor(number / 1024).expand(shape)
    return state


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Weights that keep activations near 1 and make every one of them matter."""
    torch.manual_seed(0)
    state = cheap_state(shapes)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and "table" not in name:
            state[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "norm.weight", "bn.weight")) or (
            ".norm" in name and "weight" in name
        ):
            state[name] = torch.rand(tensor.shape) + 0.5
        else:
            state[name] = torch.randn(tensor.shape) * 0.3
    return state


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def alice() -> dict[str, Tensor]:
    return cheap_state(alice_shapes())


@pytest.fixture(scope="module")
def sam() -> dict[str, Tensor]:
    return cheap_state(sam_shapes())


def test_the_rules_give_as_many_names_and_numbers_as_the_authors_files():
    assert (len(sam_shapes()), sum(map(math.prod, sam_shapes().values()))) == (138, 32_842_709)
    assert len(sam_shapes(semantic=True)) == 146
    assert (len(alice_shapes()), sum(map(math.prod, alice_shapes().values()))) == (251, 10_815_299)


# -- the published networks, written plainly -----------------------------------------------------------------


def plain_sam(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    def conv_norm(name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv3d(x, weight, stride=stride, padding=tuple(k // 2 for k in weight.shape[2:]))
        mean, var, gain, bias = (
            state[f"{name}.bn.{p}"].view(-1, 1, 1, 1)
            for p in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        return F.conv3d(x, weight, state[f"{name}.conv.bias"], padding=weight.shape[-1] // 2)

    x = conv_norm("backbone.conv1", x).relu()
    outs = []
    for layer, stride in [(1, (1, 2, 2)), (2, (1, 2, 2)), (3, (1, 2, 2)), (4, (2, 2, 2))]:
        name = f"backbone.layer{layer}"
        y = conv_norm(f"{name}.0.conv2", conv_norm(f"{name}.0.conv1", x, stride).relu())
        x = (y + conv_norm(f"{name}.0.downsample", x, stride)).relu()
        x = (conv_norm(f"{name}.1.conv2", conv_norm(f"{name}.1.conv1", x).relu()) + x).relu()
        if layer == 1:
            even = x.shape[2] // 2 * 2
            x = torch.maximum(x[:, :, 0:even:2], x[:, :, 1:even:2])
        outs.append(x)

    total = conv("neck.lateral_convs.2", outs[2])
    for i in (1, 0):
        finer = conv(f"neck.lateral_convs.{i}", outs[i])
        for axis in (2, 3, 4):  # nearest: cell k of n reads floor(k m / n)
            n, m = finer.shape[axis], total.shape[axis]
            total = total.index_select(axis, torch.arange(n) * m // n)
        total = finer + total
    fine = conv("neck.fpn_convs.0", total)
    coarse = conv("read_out_head.fpn_convs.0", conv("read_out_head.lateral_convs.0", outs[3]))
    return fine / fine.norm(dim=1, keepdim=True), coarse / coarse.norm(dim=1, keepdim=True)


def plain_nnformer(state: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One sample (1, 1, 64, 64, 64) -> encoder maps, decoder maps, logits; tokens are (N, C), S-major."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def tokens(x: Tensor) -> Tensor:
        return x[0].flatten(1).T

    def volume(x: Tensor) -> Tensor:
        side = round(x.shape[0] ** (1 / 3))
        return x.T.reshape(1, -1, side, side, side)

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return tokens(
            F.conv3d(volume(x), state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=1)
        )

    def up(name: str, x: Tensor) -> Tensor:
        return tokens(F.conv_transpose3d(volume(x), state[f"{name}.weight"], state[f"{name}.bias"], stride=2))

    def attention(
        name: str, query: Tensor, context: Tensor | None, window: int, heads: int, shift: int
    ) -> Tensor:
        side, channels = round(query.shape[0] ** (1 / 3)), query.shape[1]
        if context is None:
            q, k, v = linear(f"{name}.qkv", query).chunk(3, -1)
        else:
            q, (k, v) = query, linear(f"{name}.kv", context).chunk(2, -1)
        local = torch.tensor(list(itertools.product(range(window), repeat=3)))
        bias = state[f"{name}.relative_position_bias_table"][official_index(window)].permute(2, 0, 1)
        out = torch.zeros_like(query)
        for corner in itertools.product(range(0, side, window), repeat=3):
            place = (local + torch.tensor(corner) + shift) % side
            row = place @ torch.tensor([side * side, side, 1])
            far = ((place[:, None] - place[None]).abs() >= window).any(-1)
            a, b, c = (part[row].view(len(row), heads, -1).transpose(0, 1) for part in (q, k, v))
            score = a @ b.transpose(1, 2) / (channels / heads) ** 0.5 + bias - 100.0 * far
            out[row] = (score.softmax(-1) @ c).transpose(0, 1).reshape(len(row), channels)
        return linear(f"{name}.proj", out)

    def mlp(name: str, x: Tensor) -> Tensor:
        return x + linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))

    def block(name: str, x: Tensor, stage: int, shifted: bool) -> Tensor:
        window, heads = (4, 4, 8, 4)[stage], 6 * 2**stage
        shift = 2 if shifted and stage < 2 else 0  # the last two stages are one window each
        x = x + attention(f"{name}.attn", norm(f"{name}.norm1", x), None, window, heads, shift)
        return mlp(name, x)

    name = "model_down.patch_embed"
    x = norm(f"{name}.proj1.norm1", gelu(conv(f"{name}.proj1.conv1", tokens(x), stride=2)))
    x = norm(f"{name}.proj1.norm2", gelu(conv(f"{name}.proj1.conv2", x)))
    x = norm(f"{name}.proj2.norm1", gelu(conv(f"{name}.proj2.conv1", x)))
    x = norm(f"{name}.norm", conv(f"{name}.proj2.conv2", x))
    maps, decoded, logits = [], [], []
    for i in range(4):
        for j in (0, 1):
            x = block(f"model_down.layers.{i}.blocks.{j}", x, i, shifted=j == 1)
        maps.append(norm(f"model_down.norm{i}", x))
        if i < 3:
            name = f"model_down.layers.{i}.downsample"
            x = conv(f"{name}.reduction", norm(f"{name}.norm", gelu(x)), stride=2)

    x = maps[3]
    for i in (2, 1, 0):
        name = f"decoder.layers.{i}"
        above = up(f"{name}.Upsample.up", norm(f"{name}.Upsample.norm", x))
        query, context = norm(f"{name}.blocks.0.norm1", above), norm(f"{name}.blocks.0.norm1", maps[i])
        attended = attention(f"{name}.blocks.0.attn", query, context, (4, 4, 8)[i], 6 * 2**i, 0)
        x = mlp(f"{name}.blocks.0", above + maps[i] + attended)
        x = block(f"{name}.blocks.1", x, i, shifted=True)
        decoded.append(x)
    logits = [up(f"final.{i}.up", decoded[2 - i]) for i in range(3)]
    return tuple([volume(t) for t in group] for group in (maps, decoded, logits))


@pytest.mark.slow
def test_the_loaded_nnformer_computes_what_is_published(tmp_path):
    state = random_state(alice_shapes())
    torch.save(under("module.backbone.", state), tmp_path / "student.pth")
    with pytest.warns(UserWarning, match="position table"):
        network = load_alice_nnformer(tmp_path / "student.pth")
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        want = plain_nnformer(state, x)
        maps = network.encode(x)
        got = (maps, network.decode(maps), network(x))
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_loaded_sam_computes_what_is_published(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in random_state(sam_shapes()).items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, tmp_path / "SAM.pth")
    network = load_sam(tmp_path / "SAM.pth")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    x = torch.randn(1, 1, 9, 35, 43) * 50
    with torch.no_grad():
        got = network(x)
        want = plain_sam({k: v.float() for k, v in state.items()}, x)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# -- wrappings -----------------------------------------------------------------------------------------------


def quietly_load(path, **kwargs) -> NNFormer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_alice_nnformer(path, **kwargs)


def check_alice(network: NNFormer, state: dict[str, Tensor], final: bool = True) -> None:
    """Some tensor of each rule of the name table arrived."""
    ours = network.state_dict()
    pairs = {
        "encoder.mask_token": "model_down.mask_token",
        "encoder.norms.3.bias": "model_down.norm3.bias",
        "encoder.layers.1.downsample.reduction.weight": "model_down.layers.1.downsample.reduction.weight",
        "decoder.layers.2.upsample.norm.bias": "decoder.layers.2.Upsample.norm.bias",
        "decoder.layers.0.blocks.0.attn.kv.weight": "decoder.layers.0.blocks.0.attn.kv.weight",
    } | ({"final.1.weight": "final.1.up.weight"} if final else {})
    for name, official in pairs.items():
        torch.testing.assert_close(ours[name], state[official].float(), rtol=0, atol=0)
    assert not network.training
    assert network.settings["relative_index"] == "official"


def test_every_wrapping_of_the_authors_nnformer_loads(tmp_path, alice):
    bare = {name: tensor for name, tensor in alice.items() if not name.startswith("final.")}
    head = {"head.mlp.0.weight": torch.zeros(3, 2)}
    files = {
        "flat with an empty state_dict": bare | {"state_dict": {}},
        "nested": {"state_dict": alice},
        "bare": OrderedDict(alice),
        "ddp": under("module.backbone.", alice) | under("module.", head),
        "backbone": under("backbone.", alice) | head,
        "model": {"model": alice, "epoch": 3},
        "student in state_dict": {"student": {"state_dict": under("module.", alice)}},
        "half": {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in alice.items()}},
    }
    for what, content in files.items():
        torch.save(content, tmp_path / "file.pth")
        check_alice(
            quietly_load(tmp_path / "file.pth"),
            alice if what != "half" else files[what]["state_dict"],
            final="flat" not in what,
        )


def training_file(alice: dict[str, Tensor]) -> dict[str, object]:
    head = {"head.last_layer.weight_g": torch.ones(4, 1)}
    teacher = {k: v + 1 if v.is_floating_point() else v for k, v in alice.items() if k.endswith("bias")}
    return {
        "student": under("module.backbone.", alice) | under("module.", head),
        "teacher": under("backbone.", alice | teacher) | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 7,
        "args": argparse.Namespace(lr=5e-5, sizes=[1, 2]),
        "alice_loss": {"center": torch.zeros(1, 512)},
    }


def test_a_training_file_gives_the_network_asked_for(tmp_path, alice):
    torch.save(training_file(alice), tmp_path / "checkpoint.pth")
    student = quietly_load(tmp_path / "checkpoint.pth")
    teacher = quietly_load(tmp_path / "checkpoint.pth", network="teacher")
    check_alice(student, alice)
    torch.testing.assert_close(teacher.encoder.norms[0].bias, student.encoder.norms[0].bias + 1)
    weights = read_alice_nnformer(tmp_path / "checkpoint.pth")
    assert "head.last_layer.weight_g" in weights.ignored
    assert any("projection head" in note for note in weights.notes)


def test_a_training_file_without_the_network_asked_for_is_refused(tmp_path, alice):
    torch.save({"teacher": under("backbone.", alice)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds the teacher only"):
        load_alice_nnformer(tmp_path / "file.pth")
    with pytest.raises(ValueError, match="'student' or 'teacher'"):
        load_alice_nnformer(tmp_path / "file.pth", network="both")


@pytest.mark.parametrize("kind", ["learnable", "none", "sincos"])
def test_the_lost_position_table_is_replaced_with_a_warning(tmp_path, alice, kind):
    torch.save(alice, tmp_path / "file.pth")
    with pytest.warns(UserWarning, match="do not hold the position table"):
        network = load_alice_nnformer(tmp_path / "file.pth", position_embedding=kind)
    table = network.encoder.position_table
    assert (table is None) == (kind == "none")
    assert isinstance(table, torch.nn.Parameter) == (kind == "learnable")
    assert kind != "learnable" or not table.any()
    assert kind != "sincos" or table.any()


def test_a_file_that_holds_its_position_table_keeps_it(tmp_path, alice):
    table = torch.rand(1, 32**3, 48)
    torch.save(alice | {"model_down.absolute_pos_embed": table}, tmp_path / "file.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = load_alice_nnformer(tmp_path / "file.pth")
    torch.testing.assert_close(network.encoder.position_table.data, table, rtol=0, atol=0)


def check_sam(network: SAM, state: dict[str, Tensor]) -> None:
    ours = network.state_dict()
    for name, official in {
        "stem.norm.running_var": "backbone.conv1.bn.running_var",
        "layer3.1.conv2.conv.weight": "backbone.layer3.1.conv2.conv.weight",
        "layer4.0.shortcut.norm.bias": "backbone.layer4.0.downsample.bn.bias",
        "fine_head.laterals.2.weight": "neck.lateral_convs.2.conv.weight",
        "fine_head.smooth.bias": "neck.fpn_convs.0.conv.bias",
        "coarse_head.laterals.0.bias": "read_out_head.lateral_convs.0.conv.bias",
        "coarse_head.smooth.weight": "read_out_head.fpn_convs.0.conv.weight",
    }.items():
        torch.testing.assert_close(ours[name], state[official], rtol=0, atol=0)
    assert not network.training


def test_every_wrapping_of_the_authors_sam_loads(tmp_path, sam):
    uncounted = {k: v for k, v in sam.items() if not k.endswith("num_batches_tracked")}
    files = {
        "mmcv": {"meta": {"iter": 38000}, "state_dict": OrderedDict(sam), "optimizer": {"state": {}}},
        "model": {"model": under("module.", sam)},
        "bare, without counters": uncounted,
        "losses": {"state_dict": sam | {"supcriterion.weight": torch.ones(2), "criterion.w": torch.ones(2)}},
    }
    for content in files.values():
        torch.save(content, tmp_path / "SAM.pth")
        check_sam(load_sam(tmp_path / "SAM.pth"), sam)


def test_the_semantic_head_of_uae_s_is_reported_and_ignored(tmp_path, caplog):
    state = cheap_state(sam_shapes(semantic=True))
    torch.save({"state_dict": state}, tmp_path / "UAE.pth")
    with caplog.at_level("INFO", logger="custom.transfer.official"):
        load_sam(tmp_path / "UAE.pth")
    assert "138 tensors loaded, 8 ignored" in caplog.text
    assert "UAE-S present" in caplog.text


# -- refusals ------------------------------------------------------------------------------------------------


def test_partial_files_are_refused_and_every_key_named(tmp_path, alice, sam):
    for state, load, gone, bent in [
        (alice, load_alice_nnformer, "decoder.layers.1.Upsample.up.bias", "model_down.norm2.weight"),
        (alice, load_alice_nnformer, "final.2.up.bias", "model_down.mask_token"),
        (sam, load_sam, "neck.fpn_convs.0.conv.weight", "backbone.layer2.0.conv1.bn.running_mean"),
    ]:
        spoiled = dict(state) | {bent: torch.zeros(5), "surprise.weight": torch.zeros(1)}
        del spoiled[gone]
        torch.save({"state_dict": spoiled}, tmp_path / "file.pth")
        with pytest.raises(ValueError) as error:
            load(tmp_path / "file.pth")
        text = str(error.value)
        assert f"missing (1): {gone}" in text
        assert "unexpected (1): surprise.weight" in text
        assert f"mis-shaped (1): {bent} (5,) instead of" in text


def test_weights_that_are_not_finite_are_refused(tmp_path, sam):
    torch.save(sam | {"neck.fpn_convs.0.conv.bias": torch.full((128,), torch.nan)}, tmp_path / "SAM.pth")
    with pytest.raises(ValueError, match=r"not finite \(1\): neck\.fpn_convs\.0\.conv\.bias"):
        load_sam(tmp_path / "SAM.pth")


def test_another_width_of_sam_is_refused_in_one_sentence(tmp_path, sam):
    torch.save(sam | {"backbone.conv1.conv.weight": torch.zeros(32, 1, 3, 7, 7)}, tmp_path / "SAM.pth")
    with pytest.raises(ValueError, match=r"shape \(32, 1, 3, 7, 7\).*width of 64"):
        load_sam(tmp_path / "SAM.pth")


def test_another_relative_index_is_refused(tmp_path, alice):
    name = "model_down.layers.0.blocks.0.attn.relative_position_index"
    torch.save(alice | {name: alice[name].flip(0)}, tmp_path / "file.pth")
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.relative_position_index is not the authors' index"
    ):
        load_alice_nnformer(tmp_path / "file.pth")


def test_files_of_another_kind_are_named_for_what_they_are(tmp_path, alice, sam):
    def refused(content: object, load, message: str) -> None:
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "file.pth")

    refused({"state_dict": sam}, load_alice_nnformer, "use load_sam")
    refused(alice, load_sam, "use load_alice_nnformer")
    refused(training_file(alice), load_sam, "use load_alice_nnformer")
    meta = {"image_encoder.pos_embed": torch.zeros(1, 2), "mask_decoder.x": torch.zeros(1)}
    refused(meta, load_sam, "Meta's Segment Anything")
    refused(meta, load_alice_nnformer, "Meta's Segment Anything")
    other = {"encoder.conv.weight": torch.zeros(2), "b": torch.zeros(1)}
    refused(other, load_sam, r"not a SAM checkpoint.*first keys are encoder\.conv\.weight, b")
    refused(other, load_alice_nnformer, r"first keys are encoder\.conv\.weight, b")
    refused({"epoch": 3}, load_sam, "holds no tensors; its keys are epoch")
    refused([torch.zeros(2)], load_sam, "holds a list")


def test_unreadable_files_are_named(tmp_path, sam):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_sam(tmp_path / "nothing.pth")
    torch.save(sam, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for what, data in {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "a page": b"<!DOCTYPE html><html>not found</html>",
        "noise": bytes(range(256)),
    }.items():
        path = tmp_path / f"{what}.pth"
        path.write_bytes(data)
        for load in (load_sam, load_alice_nnformer):
            with pytest.raises(ValueError, match=rf"{what}\.pth is not a checkpoint that torch can read"):
                load(path)


class Surprise:
    """A class of somebody's, whose unpickling must not happen."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("this ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_are_never_unpickled_and_the_way_out_is_told(tmp_path, sam, zipped):
    surprise = Surprise()
    surprise.value = 1
    path = tmp_path / "file.pth"
    torch.save({"state_dict": sam, "meta": surprise}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds more than weights: .*Surprise") as error:
        load_sam(path)
    assert "weights_only=False" in str(error.value)


@pytest.mark.slow
def test_the_command_in_the_refusal_makes_a_file_that_loads(tmp_path, sam, monkeypatch):
    import subprocess
    import sys

    path = tmp_path / "file.pth"
    torch.save({"state_dict": sam, "meta": {"when": __import__("datetime").date(2024, 5, 1)}}, path)
    with pytest.raises(ValueError, match="more than weights") as error:
        load_sam(path)
    command = str(error.value).splitlines()[-1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    check_sam(load_sam(tmp_path / "weights.pth"), sam)


def test_a_namespace_carries_values_only(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.5), "x": torch.ones(2)}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth")["args"].lr == 0.5


def test_what_was_loaded_is_logged(tmp_path, sam, caplog):
    torch.save(sam, tmp_path / "SAM.pth")
    with caplog.at_level("INFO", logger="custom.transfer.official"):
        load_sam(tmp_path / "SAM.pth")
    assert "138 tensors loaded, 0 ignored" in caplog.text
