"""Turn a published checkpoint into a file of ours: the network is built from the shapes, then filled whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.nnformer import NNFormer
from custom.errors import AliceError
from custom.files import sha256_of_file
from custom.transfer.encoder_weights import LoadReport, WeightsError, load_encoder, read_content
from custom.transfer.published import CONV, POSITIONS, in_network_names
from custom.transfer.state_dicts import states

# a tensor that only an encoder of the family has
_ANCHORS = {
    "swin": "layers1.0.blocks.0.attn.relative_position_bias_table",
    "vit": "blocks.0.attn.out_proj.weight",
    "nnformer": "patch_embed.proj1.conv1.weight",
}


@dataclass
class Converted:
    """An encoder out of a published checkpoint.

    Attributes:
        encoder: with the weights of the file, on the CPU, in evaluation mode.
        metadata: for ``save_encoder``.
        report: what was loaded.
        assumed: settings that no tensor shows, in words.
    """

    encoder: nn.Module
    metadata: dict[str, Any]
    report: LoadReport
    assumed: list[str]


def convert(
    path: str | Path,
    *,
    which: str = "",
    drop_class_token: bool = False,
    num_heads: int | None = None,
    trained_size: Sequence[int] | None = None,
) -> Converted:
    """Read the encoder of a published checkpoint, whatever wraps it.

    Args:
        path: of the file.
        which: as for ``load_encoder``.
        drop_class_token: as for ``load_encoder``.
        num_heads: of a plain transformer, whose tensors do not show it; by default one head for 64 channels.
        trained_size: voxels along x, y, z of the crops that a plain transformer was trained on; by default the cube that has as
            many tokens as the file's position table.

    Raises:
        WeightsError: if the file holds no encoder that is known here, or several, or a part of one.
    """
    content, metadata = read_content(path)
    if "network_type" in metadata:
        raise WeightsError(f"{path}: is a file of alice export already; it needs no conversion.")
    family, state = _encoder_in(path, content, which)
    assumed: list[str] = []
    if family == "swin":
        network = _swin(state)
    elif family == "vit":
        network = _vit(path, state, num_heads, trained_size, assumed)
    else:
        network = NNFormer(position_embedding="none", relative_index="official")
    if family != "vit" and (num_heads or trained_size):
        raise WeightsError(
            f"{path}: holds a {family} encoder, whose tensors show heads and windows: leave num_heads and trained_size out."
        )
    report = load_encoder(network, path, which=which, drop_class_token=drop_class_token)
    about = {
        "network_type": type(network).__name__,
        "network": getattr(network, "settings", None) or _swin_settings(state),
        "method": "converted",
        "converted": {
            "file": Path(path).name,
            "sha256": sha256_of_file(path),
            "taken": report.place or "all of it",
            "adapted": report.adapted,
            "assumed": assumed,
        },
    }
    encoder = network.encoder if isinstance(network, NNFormer) else network
    return Converted(encoder.eval(), about, report, assumed)


def _encoder_in(path: str | Path, content: Any, which: str) -> tuple[str, dict[str, Tensor]]:
    """The family of the encoder in a file, and the tensors below the first such one, by the family's names."""
    for keys, state in states(content):
        for family, anchor in _ANCHORS.items():
            try:
                named, _ = in_network_names(state, family)
            except ValueError as error:
                raise WeightsError(f"{path}: {error}.") from error
            for prefix in (
                name[: -len(anchor)] for name in named if name == anchor or name.endswith(f".{anchor}")
            ):
                below = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
                first = CONV if family == "vit" else anchor
                linear = first.replace("embeddings.weight", "embeddings.1.weight")
                if (not which or which in (*keys, *prefix.split("."))) and {first, linear} & set(below):
                    return family, below
    told = f" under {which!r}" if which else ""
    names = [name for _, state in states(content) for name in state]
    held = (
        f"the first of its {len(names)} tensors are {', '.join(names[:3])}"
        if names
        else "it holds no tensors"
    )
    raise WeightsError(
        f"{path}: holds no encoder{told} that is known here: MONAI's ViT or SwinTransformer, or Alice's nnFormer; {held}."
    )


def _swin_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    table = "layers{}.0.blocks.0.attn.relative_position_bias_table"
    kernel = state["patch_embed.proj.weight"]
    offsets, _ = state[table.format(1)].shape
    window = (round(offsets ** (1 / 3)) + 1) // 2
    stages = sorted({m[1] for name in state if (m := re.match(r"layers(\d)\.0\.blocks\.0\.", name))})
    first = state["layers1.0.blocks.0.mlp.linear1.weight"]
    return {
        "in_chans": kernel.shape[1],
        "embed_dim": kernel.shape[0],
        "window_size": [window] * 3,
        "patch_size": list(kernel.shape[2:]),
        "depths": [_blocks(state, rf"layers{stage}\.0\.blocks\.(\d+)\.") for stage in stages],
        "num_heads": [state[table.format(stage)].shape[1] for stage in stages],
        "mlp_ratio": first.shape[0] / first.shape[1],
        "qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in state,
        "patch_norm": "patch_embed.norm.weight" in state,
        "spatial_dims": 3,
        "use_v2": any(name.startswith("layers1c.") for name in state),
    }


def _swin(state: Mapping[str, Tensor]) -> nn.Module:
    settings = _swin_settings(state)
    if settings["use_v2"]:  # our visible-only Swin has no residual convolutions
        return SwinTransformer(**settings)
    return MaskedSwin(**{key: value for key, value in settings.items() if key != "use_v2"})


def _vit(
    path: str | Path,
    state: Mapping[str, Tensor],
    num_heads: int | None,
    img_size: Sequence[int] | None,  # of the crops it was trained on
    assumed: list[str],
) -> MaskedViT:
    width, mlp = state["blocks.0.mlp.linear1.weight"].shape[1], state["blocks.0.mlp.linear1.weight"].shape[0]
    if CONV not in state:
        raise WeightsError(
            f"{path}: its first layer is MONAI's perceptron, which does not show the patch's sides; load it with "
            "load_encoder into the network it was trained in."
        )
    channels, patch = state[CONV].shape[1], list(state[CONV].shape[2:])
    if num_heads is None:
        num_heads = max(width // 64, 1)
        assumed.append(f"num_heads {num_heads}: one head for 64 channels; --num_heads says another")
    if img_size is None:
        if POSITIONS not in state:
            raise WeightsError(
                f"{path}: has no position table; say the crops it was trained on with --trained_size."
            )
        tokens = state[POSITIONS].shape[1]
        side = next((round((tokens - extra) ** (1 / 3)) for extra in (0, 1)
                     if round((tokens - extra) ** (1 / 3)) ** 3 == tokens - extra), None)  # fmt: skip
        if side is None:
            raise WeightsError(
                f"{path}: its {tokens} positions are those of no cube; say the crops it was trained on with --trained_size."
            )
        img_size = [side * p for p in patch]
        assumed.append(f"img_size {img_size}: a cube of {side}^3 tokens; --trained_size says another")
    try:
        return MaskedViT(
            channels, img_size, patch, hidden_size=width, mlp_dim=mlp, num_heads=num_heads,
            num_layers=_blocks(state, r"blocks\.(\d+)\.attn\."), qkv_bias="blocks.0.attn.qkv.bias" in state,
        )  # fmt: skip
    except (AliceError, ValueError) as error:
        raise WeightsError(f"{path}: no network can be built from its shapes: {error}") from error


def _blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for name in state if (m := re.match(pattern, name)))
