"""What a pre-training run will take: disk from the scans' headers, the rest from a few real steps on this machine."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from custom.bundles.preflight import check_files
from custom.data.errors import ScanError
from custom.data.grid.profiles import window_of
from custom.data.intake.manifest import Manifest, is_manifest
from custom.data.remote import is_url
from custom.data.scans import Scan, list_scans
from custom.data.store.build_cost import build_cost
from custom.data.store.volume_store import VolumeStore
from custom.engine.cost import PeakLiveBytes
from custom.engine.profile import StepProfile
from custom.errors import AliceError

STEPS = 3  # timed, after one of warm-up and one whose memory and FLOPs are counted


@dataclass
class Figure:
    """One number of an estimate; ``value`` None is what cannot be known here, and ``note`` says why."""

    name: str
    value: float | None
    unit: str
    note: str = ""


@dataclass
class Estimate:
    """All figures, in the order in which they are printed."""

    figures: list[Figure] = field(default_factory=list)

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    def add(self, name: str, value: float | None, unit: str, note: str = "") -> None:
        """Append a figure."""
        self.figures.append(Figure(name, value, unit, note))

    def table(self) -> str:
        """For the terminal."""
        lines = [f"{'what':<28}{'value':>12} {'unit':<10}note"]
        for one in self.figures:
            value = (
                "?"
                if one.value is None
                else f"{one.value:,.{0 if one.value >= 1000 else 3}{'f' if one.value >= 1000 else 'g'}}"
            )
            lines.append(f"{one.name:<28}{value:>12} {one.unit:<10}{one.note}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """``{"figures": [{"name", "value", "unit", "note"}]}``."""
        return json.dumps(asdict(self), indent=1)


class MadeUpStore:
    """Four patients of noise in the shape of a store's volumes: for steps where no store is built yet.

    Args:
        spacing: mm along x, y, z.
        shape: voxels of each volume along x, y, z.
        profile: of intensities.
    """

    def __init__(self, spacing: Sequence[float], shape: Sequence[int], profile: str = "ct") -> None:
        self.spacing, self.profile, self.path = list(spacing), profile, Path("made-up")
        self.names = ["a", "b", "c", "d"]
        self._shape = tuple(int(n) for n in shape)

    def __len__(self) -> int:
        return len(self.names)

    def patient(self, name: str) -> str:
        return name

    def has_label(self, name: str) -> bool:
        return False

    def verify(self, name: str) -> None:
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def window(self, window_hu: Sequence[float]) -> tuple[float, float]:
        return window_of(self.profile, window_hu)

    def affine(self, name: str) -> np.ndarray:
        return np.diag([*self.spacing, 1.0])

    def body_box_mm(self, name: str) -> np.ndarray:
        return np.array([[0.0, 0.0, 0.0], self._shape])

    def body_voxels(self, name: str) -> np.ndarray:
        return np.argwhere(np.ones([max(1, n // 8) for n in self._shape])) * 8

    def read_crop(self, name: str, start: Sequence[int], size: Sequence[int], fill: Any = None) -> np.ndarray:
        return np.random.default_rng(0).integers(-1000, 1000, size).astype(np.int16)


def estimate(
    files: Sequence[str],
    overrides: dict[str, Any] | None = None,
    processes: int = 1,
    measure: bool = True,
) -> Estimate:
    """Estimate a run of a pre-training config. No store is built, and nothing is kept.

    Args:
        files: ``train.yaml`` and configs that change some of its keys, as for ``monai.bundle run``.
        overrides: further keys.
        processes: of the run (GPUs); each is taken to be as fast as this one device.
        measure: take a few real steps on the config's device; without it only the disk is told.

    Returns:
        Figures; sizes in GB of 10^9 bytes.

    Raises:
        ConfigKeyError: for an override that names no key.
        AliceError: for settings that no run would accept, or a number of processes below 1.
    """
    if processes < 1:
        raise AliceError(f"processes must be at least 1, got {processes}.")
    overrides = check_files(files, overrides or {})
    parser = ConfigParser()
    parser.read_config(list(files))
    for key, value in overrides.items():
        parser.set(value, key)
    get = parser.get_parsed_content
    made = Estimate()
    store = _place(get("store_dir"))
    there = is_url(str(store)) or (Path(store) / "index.json").is_file()
    opened = VolumeStore(store) if there else None
    _disk(made, get, store, opened)
    if measure:
        _steps(made, files, overrides, processes, opened)
    return made


def scans_of(source: str | Path) -> list[Scan]:
    """The scans of a manifest (or its URL), folder or datalist, with what a manifest knows of their grids.

    Nothing is decoded, or fetched but the manifest.
    """
    if is_url(str(source)):
        return Manifest.load(str(source)).scans(fetch=False)
    return Manifest.load(source).scans(fetch=False) if is_manifest(source) else list_scans(source)


def _place(setting: Any) -> str | Path:
    """A folder or file of the config, or a URL as it is."""
    return str(setting) if is_url(str(setting)) else Path(str(setting)).expanduser()


def _disk(made: Estimate, get: Any, store: str | Path, opened: VolumeStore | None) -> None:
    source, spacing, workers = (
        _place(get("dataset_dir")),
        [float(n) for n in get("spacing")],
        max(1, get("workers")),
    )
    if opened is not None:
        made.add("scans", len(opened), "", str(store))
        size = sum(p.stat().st_size for p in Path(opened.path).rglob("*") if p.is_file())
        made.add(
            "disk: store",
            size / 1e9,
            "GB",
            "as it lies there" if isinstance(store, Path) else f"fetched so far into {opened.path}",
        )
        return
    if not is_url(str(source)) and not Path(source).exists():
        made.add("scans", None, "", f"dataset_dir {source} is not there")
        made.add("disk: store", None, "GB", "give --dataset_dir, or --store_dir of a built store")
        return
    try:
        listed = scans_of(source)
    except ScanError as error:
        made.add("scans", None, "", str(error))
        made.add("disk: store", None, "GB")
        return
    needs = build_cost(listed, Path(store), spacing, workers=workers)
    made.add("scans", len(listed), "", f"{source}, before any is refused")
    made.add(
        "disk: store", needs.bytes / 1e9, "GB", f"at most, from headers; {needs.free / 1e9:.3g} GB are free"
    )
    made.add("hours to build it", needs.seconds / 3600, "h", f"{workers} workers")


def _steps(
    made: Estimate,
    files: Sequence[str],
    overrides: dict[str, Any],
    processes: int,
    opened: VolumeStore | None,
) -> None:
    """Rows that a few steps of the real trainer tell: on the built store, else on made-up volumes."""
    config = ConfigParser()
    config.read_config(list(files))
    for key, value in overrides.items():
        config.set(value, key)
    if "get_node_local_rank" in str(config.get("device")):
        config.set("$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')", "device")
    whole = ConfigParser(dict(config.get()))  # settings as they will be, before the trial changes any
    iterations, workers, batch = (
        whole.get_parsed_content(k) for k in ("iterations", "workers", "batch_size")
    )
    with tempfile.TemporaryDirectory() as folder:
        trial: dict[str, Any] = {
            "preflight": None,
            "output_dir": folder,
            "iterations": STEPS + 2,
            "warmup": 0,
            "workers": 0,
        }
        trial |= {"checkpoint_every": 0, "resume": False, "probe": None, "summary": {}, "train::handlers": []}
        if opened is not None:
            trial["store"] = {
                "_target_": "custom.data.store.volume_store.VolumeStore",
                "path": str(opened.path),
            }
        else:
            shape = [2 * n for n in whole.get_parsed_content("crop_size")]
            trial["store"] = {"_target_": f"{__name__}.MadeUpStore", "spacing": "@spacing", "shape": shape}
            trial |= {"aligner": "random", "embeddings_dir": None} if "aligner" in config.get() else {}
        for key, value in trial.items():
            config.set(value, key)
        trainer = config.get_parsed_content("train::trainer")
        trainer.saved_at = STEPS + 2  # nothing is kept
        counted = _Counted()
        counted.attach(trainer)
        timed = StepProfile(skip=2)
        timed.attach(trainer)
        with _quiet():
            trainer.run()
    shares = timed.shares()
    loader = shares["loader"][0] / 1e3
    device = sum(ms for name, (ms, _) in shares.items() if name != "loader") / 1e3
    cuda = trainer.device.type == "cuda"
    made.add("iterations", iterations, "", f"{batch * processes} samples each")
    made.add("crops a step", batch * processes * trainer.crops, "")
    made.add("parameters, encoder", _count(trainer.online.encoder), "")
    made.add(
        "parameters, trained", _count(trainer.online) + _count(trainer.loss), "encoder, decoder and heads"
    )
    kept = 3  # two checkpoints stay, one more is being written
    modules = [m for m in (trainer.online, trainer.teacher, trainer.loss) if m is not None]
    size = sum(_bytes(m) for m in modules) + 2 * sum(
        4 * p.numel() for g in trainer.optimizer.param_groups for p in g["params"]
    )
    made.add("disk: checkpoints", kept * size / 1e9, "GB", f"{kept} of {size / 1e9:.3g} GB")
    note = "CUDA's allocator" if cuda else "live tensors"
    made.add("device: peak in a step", counted.peak / 1e9, "GB", f"{note}, on {trainer.device}")
    made.add(
        "TFLOP a step",
        counted.flops / 1e12,
        "",
        "matrix products, convolutions and attention, backward included",
    )
    made.add("seconds a step, device", device, "s", f"{STEPS} steps on {trainer.device}")
    source = "this store" if opened is not None else "made-up volumes: reading them is not in it"
    made.add("CPU ms a sample, loader", 1e3 * loader / batch, "ms", f"one process, {source}")
    cores = os.cpu_count() or 1
    at_once = max(1.0, min(workers, cores / processes))
    loading = loader / at_once
    step = loading + device if workers == 0 or (not cuda and cores <= 1) else max(loading, device)
    made.add(
        "samples a second",
        processes * batch / step,
        "",
        "the loader sets the pace" if loading > device else "the device sets the pace",
    )
    made.add("hours", iterations * step / 3600, "h", f"{iterations} iterations; probes and building apart")


class _Counted:
    """Counts memory and FLOPs of the second step."""

    def __init__(self) -> None:
        self.peak, self.flops = 0, 0
        self._flops: Any = nullcontext()
        self._bytes: Any = nullcontext()

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=2), self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), self._stop)

    def _start(self, engine: Any) -> None:
        engine.optimizer.zero_grad(set_to_none=True)
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        else:
            self._bytes = PeakLiveBytes()
        self._flops = FlopCounterMode(display=False)
        self._bytes.__enter__()
        self._flops.__enter__()

    def _stop(self, engine: Any) -> None:
        self._flops.__exit__(None, None, None)
        self._bytes.__exit__(None, None, None)
        self.flops = self._flops.get_total_flops()
        if engine.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(engine.device)
            return
        held = [m for m in (engine.online, engine.teacher, engine.loss) if m is not None]
        moments = [
            v for state in engine.optimizer.state.values() for v in state.values() if torch.is_tensor(v)
        ]
        self.peak = (
            self._bytes.peak + sum(map(_bytes, held)) + sum(t.numel() * t.element_size() for t in moments)
        )


def _count(module: nn.Module | None) -> int:
    """Parameters that an optimizer trains."""
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@contextmanager
def _quiet() -> Any:
    """The trainer's own log lines are of no use here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
