"""Save encoder weights and load them into stock networks: all tensors, or an error that names each misfit."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monai
import torch
from monai.networks.nets import UNETR, SwinUNETR, ViT, ViTAutoEnc
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2, SwinTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.nnformer import NNFormer
from custom.encoders.positions import resize_positions
from custom.errors import AliceError
from custom.files import parse_json, read_json, read_torch, replacing, write_text
from custom.landmarks.sam.weights import sha256_of
from custom.transfer.pickled import plain_values, told_pickled
from custom.transfer.published import (
    CONV,
    NotRead,
    class_token_refusal,
    find_encoder,
    misfit_hint,
    other_index,
)
from custom.transfer.state_dicts import is_state, told_keys

logger = logging.getLogger(__name__)

FORMAT = "alice-encoder-1"
_POSITIONS = ("patch_embedding.position_embeddings", "position_table")  # MONAI's ViT, our nnFormer
_FIRST_LAYERS = (CONV, "patch_embed.proj.weight")


class WeightsError(AliceError):
    """Weights that do not fit, or a file that cannot be read; the message names every tensor or the file."""


@dataclass
class LoadReport:
    """What ``load_encoder`` did. Printed, it is a table."""

    path: str
    network: str
    place: str = ""  # where in the file the encoder lay, and what beside it was left out; "" for a plain file
    wanted: int = 0  # tensors of the network's encoder
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)  # tensor -> how it was changed
    unused: list[str] = field(default_factory=list)  # tensors that MONAI's forward pass never touches
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        wanted = (
            "method",
            "iterations",
            "scans",
            "spacing",
            "window_hu",
            "profile",
            "orientation",
            "crop_size",
            "monai_version",
            "sha256",
        )
        rows = [
            ("file", self.path),
            *([("taken from", self.place)] if self.place else []),
            ("network", self.network),
            (
                "encoder tensors filled",
                f"{len(self.loaded)} of {self.wanted} ({len(self.loaded) / self.wanted:.0%})",
            ),
            ("adapted", "; ".join(f"{k}: {v}" for k, v in self.adapted.items()) or "none"),
            ("unused by MONAI, left out", str(len(self.unused))),
            *((key, str(self.metadata[key])) for key in wanted if key in self.metadata),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def save_encoder(
    path: str | Path, encoder: nn.Module, metadata: dict[str, Any], half: bool = False
) -> dict[str, Any]:
    """Write an encoder's state dict and the metadata needed to use it.

    Args:
        path: ``.safetensors``, or ``.pt`` for a plain state dict (with the metadata in a ``.json`` beside
            it).
        encoder: a network with MONAI's keys.
        metadata: plain values.
        half: store float16, for a file of half the size; loading converts back to float32.

    Returns:
        The metadata as written, with format, versions and the sha256 of the weights.

    Raises:
        WeightsError: for another suffix, or if the file cannot be written.
    """
    path = Path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    # monai_version is the version that writes this file, since the keys depend on it
    metadata = {**metadata, "format": FORMAT, "monai_version": monai.__version__, "sha256": sha256_of(state)}
    if path.suffix not in (".safetensors", ".pt"):
        raise WeightsError(
            f"{path}: write to .safetensors or .pt, not {path.suffix or 'a name without suffix'}."
        )
    failures = (OSError, RuntimeError, SafetensorError)  # torch reports a full disk as RuntimeError
    with replacing(path, sync=True, error=WeightsError, failures=failures) as draft:
        if path.suffix == ".safetensors":
            save_file(state, draft, metadata={"format": "pt", "alice": json.dumps(metadata)})
        else:
            with open(draft, "wb") as file:
                torch.save(state, file)
            write_text(path.with_suffix(".json"), json.dumps(metadata, indent=1), error=WeightsError)
    return metadata


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read state dict and metadata of a file that ``save_encoder`` wrote; only tensors are unpickled.

    Raises:
        WeightsError: if the file is missing, damaged, altered, or of another kind.
    """
    content, metadata = read_content(path)
    if not is_state(content):
        kind = (
            "a training checkpoint: use alice export RUN"
            if isinstance(content, dict) and "student" in content
            else "something other than a state dict"
        )
        raise WeightsError(f"{path}: holds {kind}, not encoder weights; {told_keys(content)}.")
    return content, metadata


def read_content(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """What a file of weights holds, with the metadata if ``save_encoder`` wrote it. No object of the file is run.

    Raises:
        WeightsError: if the file is missing, damaged, altered, or holds objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Make it with: alice export RUN --to {path.name}")
    metadata: dict[str, Any] = {}
    content: Any
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("alice", "{}")
                metadata = parse_json(text, path, error=WeightsError)
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        else:
            content = _read_torch(path)
            if (beside := path.with_suffix(".json")).is_file():
                told = read_json(beside, error=WeightsError, advice="Export the weights again.")
                # published checkpoints may have a JSON of their authors beside them
                metadata = told if isinstance(told, dict) and told.get("format") == FORMAT else {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not readable as weights ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    if "sha256" in metadata and is_state(content) and sha256_of(content) != metadata["sha256"]:
        raise WeightsError(f"{path}: the weights differ from their checksum. Copy or export the file again.")
    return content, metadata


def _read_torch(path: Path) -> Any:
    try:
        with plain_values():
            return read_torch(path, error=WeightsError)
    except WeightsError as error:
        if error.__cause__ and (told := told_pickled(path, error.__cause__)):
            raise WeightsError(f"{path} {told}") from error
        raise


def load_encoder(
    network: nn.Module,
    path: str | Path,
    *,
    interpolate_positions: bool = False,
    adapt_channels: bool = False,
    grid: Sequence[int] | None = None,
    which: str = "",
    drop_class_token: bool = False,
    verbose: bool = False,
) -> LoadReport:
    """Fill every tensor of a network's encoder from a file; on any misfit raise an error and change nothing.

    The file is one of ``alice export``, or a published checkpoint: the encoder is found below ``state_dict``, ``net``,
    ``module.``, ``swinViT.`` and the like, and its tensors get the network's names (``docs/checkpoints.md``).

    Args:
        network: stock ``UNETR``, ``ViT``, ``ViTAutoEnc``, ``SwinUNETR`` or ``SwinTransformer``; or
            ``NNFormer``.
        path: of the file.
        interpolate_positions: resize the position table if the network has another token grid.
        adapt_channels: repeat the first layer over more input channels, divided by their number.
        grid: the network's tokens along x, y, z, for a network that does not know them itself (stock ViT).
        which: ``student`` or ``teacher``, or another key or prefix, for a file that holds several encoders.
        drop_class_token: leave out the class token of a transformer that was trained with one, for a network that has
            none. Its features then differ from those of the network that was trained.
        verbose: print the report.

    Returns:
        What was loaded, adapted, and left out because MONAI never uses it.

    Raises:
        WeightsError: naming every missing, extra and mis-shaped tensor, and the argument that would help.
    """
    encoder, own_grid = _encoder_of(network)
    wanted = _encoder_tensors(network, encoder)
    content, metadata = read_content(path)
    kind = type(network).__name__
    report = LoadReport(str(path), kind, metadata=metadata)
    try:
        found = find_encoder(content, _shapes(wanted), which)
    except NotRead as error:
        raise WeightsError(f"{path} does not fit {kind}; nothing was loaded: {error}.") from error
    state = found.state
    report.place, report.adapted = found.told(), dict(found.changed)
    report.unused = sorted({*found.unused, *(k for k in wanted if "cross_attn" in k)})
    wanted = {k: v for k, v in wanted.items() if "cross_attn" not in k}
    if found.class_token is not None:
        if "cls_token" in encoder.state_dict():
            wanted["cls_token"], state["cls_token"] = encoder.state_dict()["cls_token"], found.class_token
        elif drop_class_token:
            report.adapted["cls_token"] = (
                "left out: features differ from those of the network that was trained"
            )
        else:
            raise WeightsError(f"{path}: nothing was loaded: {class_token_refusal(kind)}.")

    def positions(table: Tensor, here: Tensor) -> tuple[Tensor | None, str]:
        return _fit_positions(table, here, metadata, grid or own_grid, interpolate_positions)

    fit: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | None, str]]] = dict.fromkeys(
        _POSITIONS, positions
    )
    fit |= dict.fromkeys(_FIRST_LAYERS, lambda kernel, here: _fit_channels(kernel, here, adapt_channels))
    faults = _unlike_settings(network, metadata.get("network", {}))
    faults += [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in state]
    faults += [f"extra: {name} {tuple(state[name].shape)}" for name in state if name not in wanted]
    filled = {}
    for name in (n for n in wanted if n in state):
        fitted, how = fit[name](state[name], wanted[name]) if name in fit else (state[name], "")
        if fitted is None or fitted.shape != wanted[name].shape:
            shapes = f"{tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} here"
            faults.append(f"shape: {name} is {shapes}{how}")
            continue
        if how:
            report.adapted[name] = how
        filled[name] = fitted
    if (index := other_index(encoder, found)) and not faults:
        faults.append(index)
    if faults:
        hint = misfit_hint(found, _shapes(wanted))
        head = "".join(f"\n  {told}" for told in (hint, found.told()) if told)
        listed = "\n  ".join(faults)
        raise WeightsError(f"{path} does not fit {kind}; nothing was loaded:{head}\n  {listed}")
    with torch.no_grad():
        for name, tensor in filled.items():
            wanted[name].copy_(tensor)
    report.wanted, report.loaded = len(wanted), list(filled)
    if verbose:
        print(report)
    return report


def _shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def build_encoder(metadata: dict[str, Any]) -> nn.Module:
    """Build the encoder that a file's metadata describes, with fresh weights.

    Raises:
        WeightsError: if the metadata names another network.
    """
    kinds: dict[str, type[nn.Module]] = {
        "MaskedViT": MaskedViT,
        "MaskedSwin": MaskedSwin,
        "NNFormer": NNFormer,
        "SwinTransformer": SwinTransformer,
    }
    if metadata.get("network_type") not in kinds:
        raise WeightsError(
            f"The metadata names the network {metadata.get('network_type')!r}; known: {', '.join(kinds)}."
        )
    return kinds[metadata["network_type"]](**metadata["network"])


def resize_encoder(encoder: nn.Module, settings: dict[str, Any], img_size: Sequence[int]) -> nn.Module:
    """A copy of the encoder for crops of another size: its position table interpolated, all else the same.

    Args:
        encoder: the encoder of a run.
        settings: the arguments that it was built with, including ``img_size`` and ``patch_size``.
        img_size: voxels along x, y, z of the new crops.

    Raises:
        WeightsError: for an encoder without a position table, or a size that its patches do not divide.
    """
    name = next((n for n in _POSITIONS if n in encoder.state_dict()), None)
    if name is None:
        kind = type(encoder).__name__
        raise WeightsError(f"{kind} has no position table and fits crops of any size: leave img_size out.")
    patch = settings["patch_size"]
    if len(img_size) != 3 or any(s < p or s % p for s, p in zip(img_size, patch, strict=True)):
        raise WeightsError(f"img_size {list(img_size)}: patches of {list(patch)} voxels do not divide it.")
    here, there = (
        [s // p for s, p in zip(size, patch, strict=True)] for size in (settings["img_size"], img_size)
    )
    resized = copy.deepcopy(encoder)
    table = dict([*resized.named_parameters(), *resized.named_buffers()])[name]
    table.data = resize_positions(table.data, here, there)
    return resized


def _encoder_of(network: nn.Module) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The part of a network that pre-training fills, and its token grid if it knows it."""
    if isinstance(network, UNETR):
        return network.vit, tuple(network.feat_size)
    if isinstance(network, MaskedViT):
        return network, network.grid
    if isinstance(network, (ViT, ViTAutoEnc)):
        return network, None
    if isinstance(network, SwinUNETR):
        return network.swinViT, None
    if isinstance(network, SwinTransformer):
        return network, None
    if isinstance(network, NNFormer):
        return network.encoder, tuple(network.encoder.grid)
    known = "UNETR, ViT, ViTAutoEnc, SwinUNETR or NNFormer"
    raise WeightsError(f"{type(network).__name__} is not a network for these encoders: use {known}.")


def _unlike_settings(network: nn.Module, settings: dict[str, Any]) -> list[str]:
    """Settings that differ although all names and shapes of tensors agree; a strict load would not notice."""
    faults = []
    swin = network.swinViT if isinstance(network, SwinUNETR) else network
    if isinstance(swin, SwinTransformer):
        here = _merging_of(swin)
        there = settings.get("downsample", here)
        if there != here:
            fix = f"build the network with downsample={there!r}"
            faults.append(f"downsample: {there!r} in the file, {here!r} here: {fix}")
    vit = network.vit if isinstance(network, UNETR) else network
    if isinstance(vit, (ViT, ViTAutoEnc)):
        here = vit.blocks[0].attn.num_heads
        there = settings.get("num_heads", here)
        if there != here:
            faults.append(
                f"num_heads: {there} in the file, {here} here: build the network with num_heads={there}"
            )
    if isinstance(network, NNFormer):
        here = network.settings["relative_index"]
        there = settings.get("relative_index", here)
        if there != here:
            fix = f"build the network with relative_index={there!r}"
            faults.append(f"relative_index: {there!r} in the file, {here!r} here: {fix}")
    return faults


def _merging_of(swin: SwinTransformer) -> str:
    merging = swin.layers1[0].downsample
    if isinstance(merging, PatchMerging):  # a subclass of the next, with another order of octants
        return "merging"
    return "mergingv2" if isinstance(merging, PatchMergingV2) else type(merging).__name__


def _encoder_tensors(network: nn.Module, encoder: nn.Module) -> dict[str, Tensor]:
    decoder = ("conv3d_transpose",) if isinstance(network, ViTAutoEnc) else ()
    classifier = ("cls_token", "classification_head")  # of a ViT that classifies; not part of the encoder
    return {k: v for k, v in encoder.state_dict().items() if not k.startswith((*decoder, *classifier))}


def _fit_positions(
    table: Tensor, wanted: Tensor, metadata: dict[str, Any], grid: Sequence[int] | None, allowed: bool
) -> tuple[Tensor | None, str]:
    settings = metadata.get("network", {})
    if "img_size" not in settings:
        same = table.shape == wanted.shape
        return table, "" if same else " (alice convert FILE --img_size interpolates a table for other crops)"
    from_grid = [s // p for s, p in zip(settings["img_size"], settings["patch_size"], strict=True)]
    if grid is None:
        same = table.shape == wanted.shape
        return (
            table,
            ""
            if same
            else f" (token grid {from_grid} in the file: pass grid= and interpolate_positions=True)",
        )
    if list(grid) == from_grid:
        return table, ""
    if not allowed:
        # grids such as 12x12x4 and 8x8x9 have equally many tokens, but need different tables
        return (
            None,
            f" (token grid {from_grid} in the file, {list(grid)} here: pass interpolate_positions=True)",
        )
    return resize_positions(table, from_grid, grid), f"interpolated from grid {from_grid} to {list(grid)}"


def _fit_channels(kernel: Tensor, wanted: Tensor, allowed: bool) -> tuple[Tensor, str]:
    if kernel.ndim != 5 or kernel.shape[1] == wanted.shape[1] or kernel.shape[1] != 1:
        return kernel, ""
    if not allowed:
        return kernel, " (pass adapt_channels=True to repeat the one input channel)"
    channels = wanted.shape[1]
    return kernel.expand(-1, channels, -1, -1, -1) / channels, f"1 input channel repeated over {channels}"
