"""Save and load SAM's weights: a safetensors file with metadata, checked when loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from custom.errors import AliceError
from custom.files import parse_json, replacing
from custom.landmarks.sam.network import SAM
from custom.landmarks.sam.scan_grid import HU_RANGE, SPACING_MM

FORMAT = "alice-sam-2"
KEY = "sam"  # the metadata is one JSON text under this key
NAMES = {"torch.float16": torch.float16, "torch.float32": torch.float32}


def save_sam(
    path: str | PathLike[str],
    model: nn.Module,
    metadata: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """Write SAM's weights and the metadata needed to use them.

    Args:
        path: ``.safetensors``.
        model: SAM; DDP-wrapped or not.
        metadata: plain values, such as the training data and steps.
        dtype: of the floating-point tensors in the file; float16 halves it.

    Returns:
        The metadata as written, with format, width, embedding_dim, spacing, HU range and the weights' sha256.

    Raises:
        AliceError: for another suffix or type, another network than SAM, weights that are not finite (or too
            large for ``dtype``), or if the file cannot be written.
    """
    path = Path(path)
    network = getattr(model, "module", model)
    if not isinstance(network, SAM):
        raise AliceError(f"save_sam writes SAM, got {type(network).__name__}.")
    if path.suffix != ".safetensors" or str(dtype) not in NAMES:
        raise AliceError(f"{path}: write to .safetensors, in float16 or float32 (got {dtype}).")
    state = {}
    for name, value in network.state_dict().items():
        value = value.detach().cpu()
        state[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
        if not torch.isfinite(state[name]).all():
            raise AliceError(f"{name} is not finite in {dtype}. Look at the run; or save as float32.")
    content = {
        **metadata,
        "format": FORMAT,
        **network.settings,
        "parameters": sum(p.numel() for p in network.parameters()),
        "dtype": str(dtype),
        "spacing_mm": SPACING_MM,
        "hu_range": list(HU_RANGE),
        "orientation": "LPS",
        "sha256": sha256_of(state),
    }
    _write(path, state, content)
    return content


def load_sam_weights(path: str | PathLike[str]) -> SAM:
    """SAM with the weights of a file that ``save_sam`` wrote, in evaluation mode, float32, on the CPU.

    Args:
        path: ``.safetensors``; nothing is unpickled.

    Returns:
        The network; :func:`read_sam_metadata` reads the file's metadata.

    Raises:
        AliceError: if the file is missing, damaged, altered, of another kind or another grid, or if a tensor
            is missing, unknown, or of another shape.
    """
    metadata, state = _read(Path(path))
    model = SAM(metadata["width"], metadata["embedding_dim"])
    wanted = model.state_dict()
    faults = [f"{name}: missing" for name in wanted.keys() - state.keys()]
    faults += [f"{name}: not one of SAM's" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name}: {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if faults:
        raise AliceError(
            f"{path}: does not fill SAM(width={metadata['width']}):\n  " + "\n  ".join(sorted(faults))
        )
    if (found := sha256_of(state)) != metadata["sha256"]:
        raise AliceError(
            f"{path}: its tensors were altered (sha256 {found[:12]}, written {metadata['sha256'][:12]})."
        )
    model.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()})
    model.eval().weights_sha256 = metadata["sha256"]
    return model


def read_sam_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """The metadata of a file that ``save_sam`` wrote, checked for format and grid.

    Raises:
        AliceError: as :func:`load_sam_weights`, except for tensors.
    """
    return _read(Path(path), tensors=False)[0]


def note_in_weights(path: str | PathLike[str], notes: Mapping[str, Any]) -> dict[str, Any]:
    """Add notes to the metadata of a file that ``save_sam`` wrote; tensors and their sha256 stay the same.

    Args:
        path: ``.safetensors``; the file is replaced as a whole.
        notes: plain values, such as a calibrated ``threshold``.

    Returns:
        The metadata as written.

    Raises:
        AliceError: as :func:`load_sam_weights`, or if a note would change a value that describes the tensors.
    """
    path = Path(path)
    metadata, state = _read(path)
    fixed = {
        "format",
        "width",
        "embedding_dim",
        "parameters",
        "dtype",
        "spacing_mm",
        "hu_range",
        "orientation",
        "sha256",
    }
    if barred := fixed & set(notes):
        raise AliceError(f"{path}: {', '.join(sorted(barred))} describe the tensors and cannot be noted.")
    content = {**metadata, **notes}
    _write(path, state, content)
    return content


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """Checksum of a state dict: names, shapes, types and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # as bytes, since numpy lacks bfloat16; flat, since torch views neither scalars nor odd strides as
        # bytes
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, state: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    with replacing(path, sync=True, failures=(OSError, SafetensorError)) as draft:
        save_file(dict(state), draft, metadata={KEY: json.dumps(content)})


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise AliceError(
            f"{path}: no such file. Name SAM's weights; the bundle's are in bundles/sam_landmarks/models."
        )
    if path.suffix != ".safetensors":
        raise AliceError(
            f"{path}: SAM's own weights are .safetensors. For the authors' SAM.pth: custom.transfer.official.load_sam."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = parse_json((file.metadata() or {}).get(KEY, "{}"), path)
            state = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise AliceError(
            f"{path}: not a readable safetensors file ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else None
        raise AliceError(
            f"{path}: not SAM's weights as save_sam writes them (format {found!r}, expected {FORMAT!r}). "
            "Use the weights in bundles/sam_landmarks/models, or export your run again."
        )
    for name in ("width", "embedding_dim"):
        if not isinstance(metadata.get(name), int) or metadata[name] < 1:
            raise AliceError(
                f"{path}: its metadata says {name} = {metadata.get(name)!r}, a positive number is needed."
            )
    grid = {"spacing_mm": SPACING_MM, "hu_range": list(HU_RANGE), "orientation": "LPS"}
    for name, wanted in grid.items():
        if metadata.get(name) != wanted:
            raise AliceError(
                f"{path}: was trained with {name} = {metadata.get(name)!r}; this version embeds {wanted!r}."
            )
    if not isinstance(metadata.get("sha256"), str):
        raise AliceError(f"{path}: its metadata has no sha256 of the weights.")
    return metadata, state
