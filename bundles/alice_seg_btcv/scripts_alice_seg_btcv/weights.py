"""Weights: reading them, and saying why they do not fit before a run starts."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pickled import plain_values, told_pickled
from .published import (
    Found,
    NotRead,
    class_token_refusal,
    find_encoder,
    misfit_hint,
    other_index,
)
from .state_dicts import is_state, told_keys, way_out

logger = logging.getLogger(__name__)


def shipped(bundle_root: str) -> str:
    """The bundle's weights: ``models/model.pt``, or ``models/model.safetensors`` where that is the only file.

    A checkout holds the second, a release both, with the same tensors. MONAI Label reads the first alone, so it comes
    first here, too.
    """
    path = f"{bundle_root}/models/model.pt"
    other = f"{bundle_root}/models/model.safetensors"
    return other if os.path.isfile(other) and not os.path.isfile(path) else path


def read_state(path: str) -> dict[str, Tensor]:
    """State dict of a ``.safetensors``, or of a file of ``torch.save``, where it may lie under ``model``."""
    content = _read(path)
    return content.get("model", content) if isinstance(content, dict) else content


def _read(path: str) -> Any:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file  # segmenting with model.pt does without this package

        return load_file(path)
    with plain_values():
        return torch.load(path, map_location="cpu", weights_only=True)


def fitting(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a network takes it, whichever version of MONAI made either of them.

    MONAI 1.4 and 1.5 make cross-attention in every transformer block, 1.6 only where it is used. What a network
    makes, does not use and is not given keeps its values.
    """
    if any(getattr(module, "with_cross_attention", False) for module in network.modules()):
        return dict(state)
    own = {name: tensor for name, tensor in network.state_dict().items() if "cross_attn." in name}
    return own | {name: tensor for name, tensor in state.items() if "cross_attn." not in name or name in own}


class LoadWeights:
    """Handler that fills a network when the run starts: all of its tensors, or an error.

    Args:
        path: of the weights.
        network: to fill.
    """

    def __init__(self, path: str, network: nn.Module) -> None:
        self.path, self.network = path, network

    def attach(self, engine: Any) -> None:
        """Called by MONAI's engines."""
        from ignite.engine import Events  # programs that read the preprocessing alone do without ignite

        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        self.network.load_state_dict(fitting(self.network, read_state(self.path)), strict=True)
        logger.info(f"Restored all tensors from {self.path}")


def checkpoint_problems(network: nn.Module, checkpoints: str | Sequence[str]) -> list[str]:
    """Say why weights cannot fill a network: no such file, damaged, or of another network.

    Args:
        network: to be filled.
        checkpoints: path of its weights, or several paths.

    Returns:
        One sentence for each file that cannot be used.
    """
    paths = [checkpoints] if isinstance(checkpoints, str) else checkpoints
    return [told for path in paths if (told := _checkpoint_problem(network, str(path)))]


def _checkpoint_problem(network: nn.Module, path: str) -> str:
    if not os.path.isfile(path):
        return f"checkpoint: {path}: no such file."
    if not is_whole(path):
        kind = "" if path.endswith(".safetensors") else ", or no file of torch.save"
        return f"checkpoint: {path} is damaged or cut short{kind}. Download or train it again."
    misfit = misfit_of(network, path)
    return f"checkpoint: {path} does not fit the network: {misfit}." if misfit else ""


def encoder_problems(encoder: nn.Module, pretrained: str | None, roi_size: Sequence[int]) -> list[str]:
    """Say why a pre-trained encoder cannot be used: no such file, damaged, or another encoder.

    Args:
        encoder: part of the network that ``pretrained`` fills.
        pretrained: path of what ``alice export`` wrote, or of a published checkpoint that holds such an encoder
            (docs/checkpoints.md of the project); None for none.
        roi_size: voxels of a crop along x, y, z.

    Returns:
        At most one sentence.
    """
    if not pretrained:
        return []
    path = str(pretrained)
    if not os.path.isfile(path):
        return [f"pretrained: {path}: no such file; make it with alice export."]
    if not is_whole(path):
        return [
            f"pretrained: {path} is damaged or cut short, or neither of alice export nor of torch.save; export or "
            "download it again."
        ]
    try:
        state = _encoder_state(encoder, path)[0]
    except ValueError as error:
        misfit = str(error)
    else:
        misfit = differences(encoder, state) or _other_heads(encoder, path)
    if not misfit:
        return []
    way = ""
    if "position_embeddings is [" in misfit:
        size = str(list(roi_size)).replace(" ", "")
        way = (
            f" For a crop of another size: alice export RUN --to FILE --img_size {size}, or for a published "
            f"checkpoint alice convert {path} --to FILE --img_size {size}."
        )
    return [f"pretrained: {path} does not fit the encoder: {misfit}.{way}"]


def with_encoder(network: nn.Module, encoder: nn.Module, pretrained: str | None) -> nn.Module:
    """The network, its encoder filled from ``pretrained`` (every tensor), if that is given.

    Raises:
        NotRead: if the file holds no such encoder, or several.
        RuntimeError: if a tensor is missing, extra or of another shape.
    """
    if pretrained:
        encoder.load_state_dict(_encoder_state(encoder, str(pretrained))[0], strict=True)
    return network


def _encoder_state(encoder: nn.Module, path: str) -> tuple[dict[str, Tensor], Found]:
    """An encoder's tensors in a file as the encoder takes them, complete or not; and where they were found."""
    try:
        content = _read(path)
    except (
        Exception
    ) as error:  # a file of pickled objects, or a damaged one, makes torch raise almost anything
        raise NotRead(told_pickled(path, error) or _unreadable(error)) from error
    shapes = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = find_encoder(content, shapes)
    if found.class_token is not None:
        raise NotRead(class_token_refusal(type(encoder).__name__))
    state = fitting(encoder, found.state | found.unused)
    if differences(encoder, state) and (hint := misfit_hint(found, shapes)):
        raise NotRead(hint)
    if index := other_index(encoder, found):
        raise NotRead(index)
    return state, found


def told_start(encoder: nn.Module, pretrained: str | None) -> str:
    """Where training starts, in words."""
    if not pretrained:
        return "encoder: from scratch (pretrained is not set)"
    told = _encoder_state(encoder, str(pretrained))[1].told()
    return f"encoder: {len(encoder.state_dict())} tensors from {pretrained}{f' ({told})' if told else ''}"


def misfit_of(network: nn.Module, path: str) -> str:
    """Why a file of weights does not fill a network: where in it the tensors lie, or the first three names that differ.

    A network without any tensor, such as one of another runtime, takes what it is given.
    """
    want = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        content, state = _read(path), read_state(path)
    except (
        Exception
    ) as error:  # a file of pickled objects, or a damaged one, makes torch raise almost anything
        return _unreadable(error)
    fits = fitting(network, state) if is_state(state) else {}
    if not want:
        return "" if is_state(state) else told_keys(state)
    if not (misfit := differences(network, fits)):
        return ""
    return way_out(path, content, want) or (misfit if fits else told_keys(state))


def _unreadable(error: Exception) -> str:
    told = str(error).strip().splitlines() or [type(error).__name__]
    return f"it holds more than tensors, or is damaged ({told[0][:200]}); save network.state_dict() alone"


def differences(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The first three names in which a state dict and a network differ; "" if they agree in names and shapes."""
    want = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    have = {name: list(tensor.shape) for name, tensor in state.items()}
    faults = [
        f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'known')}"
        for name in {**want, **have}
        if want.get(name) != have.get(name)
    ]
    return ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")


def is_whole(path: str) -> bool:
    """Whether a file of weights reaches its end."""
    if not path.endswith(".safetensors"):
        return zipfile.is_zipfile(path)
    start, header = _safetensors_header(path)
    ends = [start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return max(ends, default=-1) == os.path.getsize(path)


def _safetensors_header(path: str) -> tuple[int, dict[str, Any]]:
    """Where the tensors start, in bytes, and the header; an empty one if it is cut short or damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length >= os.path.getsize(path) - 8:
            return 8 + length, {}
        try:
            return 8 + length, json.loads(file.read(length))
        except ValueError:
            return 8 + length, {}


def _other_heads(encoder: nn.Module, path: str) -> str:
    """The number of heads shows in no tensor's shape, but in what ``alice export`` wrote.

    It wrote that into a ``.safetensors``, and into a ``.json`` beside a ``.pt``.
    """
    told = "{}"
    if path.endswith(".safetensors"):
        told = _safetensors_header(path)[1].get("__metadata__", {}).get("alice", told)
    elif os.path.isfile(beside := path[:-3] + ".json"):
        with open(beside, encoding="utf-8") as file:
            told = file.read()
    about = json.loads(told)
    if not isinstance(about, dict) or not str(about.get("format", "")).startswith("alice-encoder"):
        return ""  # a JSON of the authors of a published checkpoint
    heads = about.get("network", {}).get("num_heads")
    counts = (getattr(module, "num_heads", None) for module in encoder.modules())
    own = next((count for count in counts if isinstance(count, int)), None)
    return f"num_heads is {heads!r}, not {own!r}" if isinstance(heads, int) and heads != own else ""
