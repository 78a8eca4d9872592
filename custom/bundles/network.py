"""The network that a bundle serves: built from its inference config, filled whole, with what one must know to feed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser
from monai.transforms import Compose, Orientationd, ScaleIntensityRanged, Spacingd
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from custom.errors import AliceError
from custom.files import read_json, read_torch
from custom.transfer.encoder_weights import WeightsError, sha256_of
from custom.transfer.state_dicts import is_state, told_keys, way_out

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")


class BundleError(AliceError):
    """A folder that is no bundle, or a config that lacks a part; the message names the file."""


class Deployable(NamedTuple):
    """A network with its weights, and what one must know to feed it."""

    network: nn.Module  # in evaluation mode, on the CPU
    input_shape: tuple[int, ...]  # (C, X, Y, Z): one sliding window
    metadata: dict[str, Any]


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder has an inference config."""
    return any((Path(folder) / "configs" / name).is_file() for name in _CONFIGS)


def read_bundle(
    folder: str | Path, weights: str | Path | None = None, overrides: Sequence[str] = ()
) -> Deployable:
    """The network of a bundle's inference config with its weights, all of them.

    As in every MONAI tool, the config's ``$`` expressions are run: open only bundles you trust.

    Args:
        folder: with ``configs/inference.yaml`` (or .json) holding ``network_def``, ``inferer`` and ``preprocessing``.
        weights: other than the bundle's ``models/model.pt`` or, where that is missing, ``models/model.safetensors``.
        overrides: config files on top, as ``swin_unetr.yaml``: paths, or names in the bundle's ``configs``.

    Raises:
        BundleError: if the folder is no bundle, or its config lacks a part.
        WeightsError: if the weights are missing, damaged, or of another network.
    """
    folder = Path(folder).resolve()
    found = [folder / "configs" / name for name in _CONFIGS if (folder / "configs" / name).is_file()][:1]
    if not found:
        raise BundleError(f"{folder}: no bundle (looked for configs/{', configs/'.join(_CONFIGS)}).")
    for name in overrides:
        beside = folder / "configs" / name
        if not (beside.is_file() or Path(name).is_file()):
            raise BundleError(f"{name}: no such config file, nor is there {beside}.")
        found.append(beside if beside.is_file() else Path(name))
    parser = ConfigParser()
    parser.read_config([str(file) for file in found])
    for key in ("network_def", "inferer"):
        if key not in parser:
            raise BundleError(f"{found[0]}: has no {key!r}, so there is nothing to export.")
    if "bundle_root" in parser:
        parser["bundle_root"] = str(folder)
    network = parser.get_parsed_content("network_def")
    roi = getattr(parser.get_parsed_content("inferer"), "roi_size", None)
    if not isinstance(roi, Sequence) or not all(isinstance(side, int) and side > 0 for side in roi):
        raise BundleError(
            f"{found[0]}: its inferer has no fixed roi_size (found {roi}), so no size to export."
        )
    about: dict[str, Any] = {}
    if (meta := folder / "configs" / "metadata.json").is_file():
        about = read_json(meta, error=BundleError)
    formats = about.get("network_data_format", {})
    channels = formats.get("inputs", {}).get("image", {}).get("num_channels", 1)
    path = Path(weights) if weights else _own_weights(folder)
    state = load_whole(network, path)
    metadata = {
        "name": about.get("name", folder.name),
        "version": about.get("version"),
        "labels": formats.get("outputs", {}).get("pred", {}).get("channel_def"),
        **(_preprocessing(parser.get_parsed_content("preprocessing")) if "preprocessing" in parser else {}),
        "roi_size": list(roi),
        "weights": path.name,
        "sha256": sha256_of(state),
    }
    return Deployable(network.eval().cpu(), (channels, *roi), metadata)


def _own_weights(folder: Path) -> Path:
    """A release has both files, with the same tensors; a checkout has the second one."""
    files = [folder / "models" / name for name in ("model.pt", "model.safetensors")]
    return next((file for file in files if file.is_file()), files[0])


def load_whole(network: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Fill a network with every tensor of a ``.safetensors``, or of a state dict that ``torch.save`` wrote.

    The state dict may lie under ``model``, as MONAI Label writes it.

    Returns:
        The state dict as it lies in the file.

    Raises:
        WeightsError: naming the file and the first tensors that are missing, extra or mis-shaped.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file. Train the bundle first, or name other weights: --weights FILE"
        )
    try:
        state: Any = (
            load_file(path) if path.suffix == ".safetensors" else read_torch(path, error=WeightsError)
        )
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not readable as weights ({error}).") from error
    content = state
    if isinstance(state, dict) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    if not is_state(state):
        way = way_out(str(path), content, wanted) or told_keys(content)
        raise WeightsError(f"{path}: holds no state dict, neither by itself nor under 'model': {way}.")
    state = dict(state)
    try:
        network.load_state_dict(_fitting(network, state))
    except RuntimeError as error:
        if way := way_out(str(path), content, wanted):
            raise WeightsError(f"{path} does not fit {type(network).__name__}: {way}.") from error
        faults = [line.strip()[:300] for line in str(error).splitlines()[1:]]
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        listed = "\n  ".join(faults[:5])
        raise WeightsError(
            f"{path} does not fit {type(network).__name__} of the config:\n  {listed}{more}"
        ) from error
    return state


def _fitting(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what only some versions of MONAI make: cross-attention that no block uses."""
    if any(getattr(module, "with_cross_attention", False) for module in network.modules()):
        return state
    unused = {name: tensor for name, tensor in network.state_dict().items() if "cross_attn." in name}
    return {name: tensor for name, tensor in state.items() if "cross_attn." not in name} | unused


def _preprocessing(transforms: Any) -> dict[str, Any]:
    """Orientation, spacing and intensity window, read off a bundle's transforms."""
    steps = transforms.flatten().transforms if isinstance(transforms, Compose) else list(transforms)
    found: dict[str, Any] = {}
    for step in steps:
        if isinstance(step, Orientationd):
            found["orientation"] = step.ornt_transform.axcodes
        elif isinstance(step, Spacingd):
            found["spacing"] = [float(side) for side in step.spacing_transform.pixdim]
        elif isinstance(step, ScaleIntensityRanged):
            found["window_hu"] = [float(step.scaler.a_min), float(step.scaler.a_max)]
            found["scaled_to"] = [step.scaler.b_min, step.scaler.b_max]
    return found
