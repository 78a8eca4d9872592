"""A trained network for runtimes other than Python: TorchScript, ONNX or OpenVINO, compared with the original before it is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import monai
import numpy as np
import torch
from monai.data.torchscript_utils import save_net_with_metadata
from torch import Tensor, nn
from torch.nn import functional

from custom.bundles.network import Deployable
from custom.errors import AliceError
from custom.transfer.encoder_weights import sha256_of

logger = logging.getLogger(__name__)

FORMAT = "alice-network-1"
SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx", "openvino": ".xml"}
TOLERANCE = (
    1e-3  # ours; of the largest logit. Measured for SwinUNETR: TorchScript 0, ONNX 1e-6, OpenVINO 3e-4
)
HALF_TOLERANCE = 1e-2  # ours; weights stored as float16
_OPSET = 18


class DeployError(AliceError):
    """A network that cannot be exported, or an exported one that cannot be used; the message names the file."""


class Comparison(NamedTuple):
    """An exported network beside the original, on a window that neither was made with."""

    max_difference: float  # of logits
    relative: float  # the same, over the largest logit
    agreement: float  # share of voxels with the same label

    def __str__(self) -> str:
        return (
            f"largest difference {self.max_difference:.2g} ({self.relative:.2g} of the largest output), "
            f"same label in {self.agreement:.3%} of voxels"
        )


def export_network(
    deployable: Deployable,
    kind: str,
    path: str | Path,
    *,
    half: bool = False,
    tolerance: float | None = None,
) -> Comparison:
    """Write a network for another runtime; the file appears only after it gave the same answer as the network.

    The written file is read back by its own runtime (PyTorch, ONNX Runtime, OpenVINO on the CPU in float32) and run
    on a window that it was not made with. Metadata lie inside: MONAI's ``load_net_with_metadata`` reads them
    from TorchScript, ``metadata_props["alice"]`` holds them in ONNX, ``rt_info["alice"]`` in OpenVINO.

    Args:
        deployable: of ``read_bundle``.
        kind: ``torchscript`` (traced; any batch size), ``onnx`` or ``openvino`` (one window at a time).
        path: with the suffix .ts, .onnx or .xml; OpenVINO adds a .bin beside its .xml.
        half: store OpenVINO's weights as float16, for files of half the size.
        tolerance: largest difference allowed, over the largest output; 1e-3, or 1e-2 with ``half``.

    Raises:
        DeployError: for another kind or suffix, a missing package, a network that cannot be converted,
            or a difference above the tolerance. An older file at ``path`` then stays as it was.
    """
    path = Path(path)
    if kind not in SUFFIXES:
        raise DeployError(f"Export to {', '.join(SUFFIXES)}, not {kind!r}.")
    if path.suffix != SUFFIXES[kind]:
        raise DeployError(f"{path}: {kind} is written to a file that ends in {SUFFIXES[kind]}.")
    if half and kind != "openvino":
        raise DeployError(f"half stores float16 weights for openvino only, not for {kind}.")
    limit = tolerance if tolerance is not None else HALF_TOLERANCE if half else TOLERANCE
    network = deployable.network.eval()
    metadata = {
        **deployable.metadata,
        "format": FORMAT,
        "input_shape": list(deployable.input_shape),
        "monai_version": monai.__version__,
        "torch_version": str(torch.__version__),
        "weights_stored_as": "float16" if half else "float32",
    }
    write, read = _RUNTIMES[kind]
    window = sample_window((1, *deployable.input_shape), seed=0)
    unseen = sample_window((2 if kind == "torchscript" else 1, *deployable.input_shape), seed=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
        torch.no_grad(),
        _without_checkpointing(network),
    ):
        draft = Path(folder) / path.name
        try:
            with warnings.catch_warnings():  # that a trace may not generalise: the comparison finds that out
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                write(network, window, draft, metadata, half)
        except DeployError:
            raise
        except Exception as error:  # converters raise every kind of error, TypeError and IndexError included
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise DeployError(
                f"{type(network).__name__} cannot be converted to {kind}: {type(error).__name__}: {first}"
            ) from error
        comparison = compare(network(unseen), read(draft)(unseen))
        if not comparison.relative <= limit:  # a nan is no match either
            raise DeployError(
                f"{path}: not written, since the {kind} network answers differently: {comparison}; "
                f"allowed is {limit:g}. Raise it with --tolerance if that is good enough."
            )
        if kind == "openvino":  # two files: without .xml there is no model, so none is ever half replaced
            path.unlink(missing_ok=True)
            os.replace(draft.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(draft, path)
    return comparison


def compare(expected: Tensor, found: Tensor) -> Comparison:
    """How far two outputs (B, C, X, Y, Z) lie apart.

    Raises:
        DeployError: if their shapes differ.
    """
    if expected.shape != found.shape:
        raise DeployError(f"The exported network gives {tuple(found.shape)}, not {tuple(expected.shape)}.")
    difference = (expected - found).abs().max().item()
    same = (expected.argmax(1) == found.argmax(1)).float().mean().item()
    return Comparison(difference, difference / max(expected.abs().max().item(), 1e-12), same)


def sample_window(shape: Sequence[int], seed: int) -> Tensor:
    """Smooth blobs with grain in [0, 1], as windowed CT has them: (B, C, X, Y, Z)."""
    chance = torch.Generator().manual_seed(seed)
    coarse = torch.rand((*shape[:2], *[max(2, side // 12) for side in shape[2:]]), generator=chance)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 2]
    blobs = functional.interpolate(coarse, list(shape[2:]), mode=mode)
    return (1.6 * blobs - 0.3 + 0.03 * torch.randn(tuple(shape), generator=chance)).clamp(0, 1)


class OpenVINONetwork(nn.Module):
    """An OpenVINO export in the place of a bundle's network: windows in, logits out, on the CPU.

    It has no parameters. Offered a state dict, as ``CheckpointLoader`` does, it checks that the export was made
    from just those weights, so that an outdated export is not used by mistake.

    Args:
        path: .xml of ``alice export BUNDLE --to openvino``.
        precision: f32, or bf16 on a CPU that computes in it (about twice as fast, with slightly other logits).
        num_threads: of OpenVINO; 0 leaves the choice to it.
        cache_dir: where to keep the compiled network, which takes seconds to make.

    Raises:
        DeployError: if the file or OpenVINO is missing, or the CPU does not compute in ``precision``.
    """

    def __init__(
        self, path: str | Path, precision: str = "f32", num_threads: int = 0, cache_dir: str | None = None
    ) -> None:
        super().__init__()
        self.path, self.precision = Path(path), precision
        if not self.path.is_file() or not self.path.with_suffix(".bin").is_file():
            raise DeployError(f"{path}: no such network. Make it with: alice export BUNDLE --to openvino")
        core = _openvino().Core()
        able = {name.lower() for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}
        able = {"f32"} | ({"bf16"} & able)
        if precision not in able:
            raise DeployError(
                f"precision: {precision!r} is not to be had on this CPU; use {' or '.join(sorted(able))}."
            )
        try:
            model = core.read_model(self.path)
        except RuntimeError as error:
            raise DeployError(f"{path}: not readable as an OpenVINO network. Export it again.") from error
        known = model.has_rt_info(["alice"])
        self.metadata: dict[str, Any] = json.loads(model.get_rt_info(["alice"]).astype(str)) if known else {}
        self.input_shape = tuple(model.inputs[0].shape)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if num_threads:
            options["INFERENCE_NUM_THREADS"] = num_threads
        if cache_dir:
            options["CACHE_DIR"] = str(cache_dir)
        self._compiled = core.compile_model(model, "CPU", options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z), one window after the other."""
        if tuple(x.shape[1:]) != self.input_shape[1:]:
            raise DeployError(
                f"{self.path} was exported for windows of {self.input_shape[1:]}, not {tuple(x.shape[1:])}: "
                "set the inferer's roi_size to that, or export again."
            )
        rows = x.detach().to("cpu", torch.float32).as_subclass(Tensor).numpy()
        answers = [np.array(self._compiled([np.ascontiguousarray(row[None])])[0]) for row in rows]
        return torch.from_numpy(np.concatenate(answers)).to(x.device)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Nothing to load; raises ``DeployError`` unless the export was made from these weights."""
        if self.metadata.get("sha256") != sha256_of(dict(state_dict)):
            raise DeployError(
                f"{self.path} was not made from these weights (sha256 differs). "
                "Make it anew with: alice export BUNDLE --to openvino"
            )
        return super().load_state_dict({}, strict=True)


@contextlib.contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Activation checkpointing is for training, and exporters stumble over it."""
    switched: list[Any] = [m for m in network.modules() if getattr(m, "use_checkpoint", None) is True]
    for module in switched:
        module.use_checkpoint = False
    try:
        yield
    finally:
        for module in switched:
            module.use_checkpoint = True


def _write_torchscript(
    network: nn.Module, window: Tensor, path: Path, metadata: dict[str, Any], half: bool
) -> None:
    traced = torch.jit.trace(network, window, check_trace=False)  # scripting fails for SwinUNETR
    save_net_with_metadata(traced, str(path), meta_values=metadata)


def _write_onnx(network: nn.Module, window: Tensor, path: Path, metadata: dict[str, Any], half: bool) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name, "onnx")
    program = torch.onnx.export(
        network, (window,), dynamo=True, opset_version=_OPSET, input_names=["image"], output_names=["pred"],
        verbose=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props["alice"] = json.dumps(metadata)
    program.save(path, external_data=False)


def _write_openvino(
    network: nn.Module, window: Tensor, path: Path, metadata: dict[str, Any], half: bool
) -> None:
    openvino = _openvino()
    traced = torch.jit.freeze(torch.jit.trace(network, window, check_trace=False))
    with _unreported():
        model = openvino.convert_model(traced, example_input=window, input=[list(window.shape)])
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"pred"})
    model.set_rt_info(json.dumps(metadata), ["alice"])
    openvino.save_model(model, path, compress_to_fp16=half)


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """``openvino.convert_model`` sends usage statistics unless the variable ``CI`` is set."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def _read_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.jit.load(path, map_location="cpu")


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    runtime = _package("onnxruntime", "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def _package(name: str, extra: str) -> Any:
    """A package of an optional extra."""
    try:
        return __import__(name)
    except ImportError as error:
        raise DeployError(f"{name} is not installed: pip install 'alice-monai[{extra}]'") from error


def _openvino() -> Any:
    return _package("openvino", "cpu")


_RUNTIMES: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "torchscript": (_write_torchscript, _read_torchscript),
    "onnx": (_write_onnx, _read_onnx),
    "openvino": (_write_openvino, OpenVINONetwork),
}
