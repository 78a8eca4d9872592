"""What a pre-training run will take: disk, memory, samples a second, hours; each number measured or modelled."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from custom.bundles.estimate_data import (
    READ_SECONDS,
    MadeUpPairs,
    embedding_bytes,
    folder_bytes,
    held_by_bodies,
    scans_of,
    seconds_a_pair,
)
from custom.bundles.estimate_run import STEPS, dry_run, matmul_rate, parser_of
from custom.bundles.estimate_step import META, StepModel, StepParts, model_step
from custom.bundles.preflight import check_keys
from custom.data.errors import ScanError
from custom.data.remote import is_url
from custom.data.store.needs import BYTES_A_VOXEL, MARGIN_MM, needs_of
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError

MEASURED, MODELLED, UNKNOWN = "measured", "modelled", "unknown"
_CHEAP_SECONDS = 20.0  # a dry run that is expected to take less is made without being asked for
_EFFICIENCY = 0.4  # of a large matrix product's speed that a step reaches (a guess of ours, hence "modelled")
_WORKER_BYTES = 250e6  # private memory of a loader worker before it reads anything (a guess of ours)


@dataclass
class Figure:
    """One number of an estimate; ``value`` None is what cannot be known here, and ``note`` says why."""

    name: str
    value: float | None
    unit: str
    how: str
    note: str = ""


@dataclass
class Estimate:
    """All figures, in the order in which they are printed; ``bound`` is ``loader``, ``device`` or ``""`` if unknown."""

    figures: list[Figure] = field(default_factory=list)
    bound: str = ""

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    def add(self, name: str, value: float | None, unit: str, how: str, note: str = "") -> Figure:
        """Append a figure."""
        figure = Figure(name, value, unit, UNKNOWN if value is None else how, note)
        self.figures.append(figure)
        return figure

    def table(self) -> str:
        """For the terminal."""
        lines = [f"{'what':<28}{'value':>12} {'unit':<10}{'how':<10}note"]
        for one in self.figures:
            value = (
                "?" if one.value is None else f"{one.value:,.3g}" if one.value < 1000 else f"{one.value:,.0f}"
            )
            lines.append(f"{one.name:<28}{value:>12} {one.unit:<10}{one.how:<10}{one.note}".rstrip())
        said = {"loader": "The loader sets the pace.", "device": "The device sets the pace."}
        lines.append(said.get(self.bound, "What sets the pace is not known."))
        return "\n".join(lines)


def estimate(
    files: Sequence[str],
    overrides: dict[str, Any] | None = None,
    measure: bool | None = None,
    processes: int = 1,
) -> Estimate:
    """Estimate a run of a pre-training config; nothing is written, built or trained.

    Args:
        files: ``train.yaml`` and configs that change some of its keys, as for ``monai.bundle run``.
        overrides: further keys.
        measure: time a few steps on this device: True does, False does not, None does if they are cheap.
        processes: of the run (GPUs); one step of each is one step of the run.

    Returns:
        Figures; sizes in GB of 10^9 bytes.

    Raises:
        ConfigKeyError: for an override that names no key.
        ValueError: for settings that no run would accept, or a number of processes below 1.
    """
    if processes < 1:
        raise AliceError(f"processes must be at least 1, got {processes}.")
    complete = ConfigParser.load_config_file(files[0])
    for file in files[1:]:
        check_keys(complete, ConfigParser.load_config_file(file), file)
    check_keys(complete, overrides or {}, "the command line")
    settings = parser_of(files, overrides, processes)
    get = settings.get_parsed_content
    made = Estimate()
    model = _model_of(files, overrides, processes)
    store = _place(get("store_dir"))
    there = is_url(str(store)) or (Path(store) / "index.json").is_file()
    opened = VolumeStore(store) if there else None
    corpus = _disk(made, get, store, opened, model)
    _host_memory(made, get, opened, corpus)
    device = get("device")
    _device_memory_model(made, get, model, device)
    _pace(made, files, overrides, processes, get, store, opened, model, device, measure)
    return made


def to_json(made: Estimate) -> str:
    """``{"figures": [{"name", "value", "unit", "how", "note"}], "bound"}``."""
    return json.dumps(asdict(made), indent=1)


# -- the config -----------------------------------------------------------------------------------------------


def _model_of(files: Sequence[str], overrides: dict[str, Any] | None, processes: int) -> StepModel:
    """The step on the meta device."""
    wanted = parser_of(files, overrides, processes).get_parsed_content("amp")
    parser = parser_of(files, overrides, processes, device="$torch.device('meta')", amp=bool(wanted))
    optimizer = dict(parser["optimizer"])
    optimizer.pop("fused", None)  # the fused kernel does not know the meta device, and keeps the same moments
    parser.set(optimizer, "optimizer")
    get = parser.get_parsed_content
    return model_step(
        StepParts(
            student=get("student").train(),
            teacher=get("teacher").eval(),
            loss=get("loss").to(META),
            make_optimizer=lambda: get("optimizer"),
            view=get("make_view"),
            masking=get("make_mask"),
            crop_size=tuple(get("crop_size")),
            pairs=get("batch_size"),
            accumulate=get("accumulate"),
            bf16=bool(wanted),
        )
    )


# -- disk and memory ------------------------------------------------------------------------------------------


def _place(setting: Any) -> str | Path:
    """A folder or file of the config, or a URL as it is."""
    return str(setting) if is_url(str(setting)) else Path(str(setting)).expanduser()


def _disk(made: Estimate, get: Any, store: str | Path, opened: VolumeStore | None, model: StepModel) -> int:
    """Rows for the disk; how many scans there are."""
    spacing = [float(n) for n in get("spacing")]
    source = _place(get("dataset_dir"))
    scans, volumes = 0, []
    if opened is not None:
        scans, volumes = (
            len(opened),
            [math.prod(opened.shape(name)) * math.prod(spacing) for name in opened.names],
        )
        made.add("scans", scans, "", MEASURED, str(store))
        if isinstance(store, Path):
            made.add("disk: store", folder_bytes(store) / 1e9, "GB", MEASURED)
        else:
            size = sum(volumes) / math.prod(spacing) * BYTES_A_VOXEL / 1e9
            made.add("disk: store", size, "GB", MODELLED, f"its copy in {opened.path}")
    elif is_url(str(source)) or Path(source).exists():
        try:
            listed = scans_of(source)
        except ScanError as error:
            made.add("scans", None, "", UNKNOWN, str(error))
            made.add("disk: store", None, "GB", UNKNOWN)
        else:
            scans = len(listed)
            wanted = needs_of(
                listed, Path(store), {"spacing": spacing, "crop_margin_mm": MARGIN_MM}, max(1, get("workers"))
            )
            made.add("scans", scans, "", MEASURED, f"{source}, before any is refused")
            made.add(
                "disk: store",
                wanted.bytes / 1e9,
                "GB",
                MODELLED,
                f"from headers; {wanted.free / 1e9:.3g} GB are free",
            )
            made.add("hours to build it", wanted.seconds / 3600, "h", MODELLED, f"{get('workers')} workers")
            volumes = [wanted.bytes / BYTES_A_VOXEL * math.prod(spacing) / max(1, scans)] * scans
    else:
        made.add("scans", None, "", UNKNOWN, f"dataset_dir {source} is not there")
        made.add("disk: store", None, "GB", UNKNOWN, "give --dataset_dir, or --store_dir of a built store")
    embeddings = get("embeddings_dir")
    if embeddings is None:
        made.add("disk: embeddings", 0.0, "GB", MEASURED, "the aligner needs none")
    elif Path(str(embeddings)).is_dir():
        made.add("disk: embeddings", folder_bytes(Path(str(embeddings))) / 1e9, "GB", MEASURED)
    else:
        embedded = sum(map(embedding_bytes, volumes)) / 1e9 if volumes else None
        made.add(
            "disk: embeddings",
            embedded,
            "GB",
            MODELLED,
            "of the authors' network, half of each scan being body; ours takes two fifths",
        )
    kept = get("keep_checkpoints") + 1  # one more while the next is written
    made.add(
        "disk: checkpoints",
        kept * model.checkpoint / 1e9,
        "GB",
        MODELLED,
        f"{kept} of {model.checkpoint / 1e9:.3g} GB",
    )
    return scans


def _host_memory(made: Estimate, get: Any, opened: VolumeStore | None, scans: int) -> None:
    voxels, batch, workers = math.prod(get("crop_size")), get("batch_size"), get("workers")
    batch_bytes = 2 * batch * voxels * 4
    body = 0.0
    if opened is not None:
        usual = sorted(math.prod(opened.shape(name)) for name in opened.names)[len(opened) // 2]
        body = held_by_bodies(len(opened), usual)
    reader = 3 * batch_bytes + body  # two batches ready, one in the making
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
    made.add("RAM: training process", (own + batch_bytes + (0 if workers else body)) / 1e9, "GB", MODELLED)
    made.add("RAM: workers", workers * (_WORKER_BYTES + reader) / 1e9, "GB", MODELLED, f"{workers} processes")
    store = made["disk: store"]
    made.add("RAM: page cache", store.value, "GB", store.how, "to read each chunk from disk only once")


def _device_memory_model(made: Estimate, get: Any, model: StepModel, device: torch.device) -> None:
    kind = "bf16" if get("amp") else "fp32"
    made.add("device: weights and EMA", (model.weights + model.teacher) / 1e9, "GB", MODELLED)
    made.add("device: optimizer moments", model.moments / 1e9, "GB", MODELLED)
    made.add("device: gradients", model.gradients / 1e9, "GB", MODELLED)
    rest = (model.transient - model.gradients) / 1e9
    made.add("device: activations", rest, "GB", MODELLED, f"views and crops with them, {kind}")
    note = (
        "of live tensors; allocator and CUDA take about 0.6 GB and 10 % more" if device.type == "cuda" else ""
    )
    made.add("device: peak", model.total / 1e9, "GB", MODELLED, note)


# -- pace -----------------------------------------------------------------------------------------------------


def _pace(
    made: Estimate,
    files: Sequence[str],
    overrides: dict[str, Any] | None,
    processes: int,
    get: Any,
    store: str | Path,
    opened: VolumeStore | None,
    model: StepModel,
    device: torch.device,
    measure: bool | None,
) -> None:
    batch, iterations = get("batch_size"), get("iterations")
    made.add("TFLOP a step", model.flops / 1e12, "", MODELLED)
    rate = matmul_rate(device, get("amp"))
    seconds, how, note = (
        model.flops / (rate * _EFFICIENCY),
        MODELLED,
        f"{rate / 1e12:.3g} TFLOP/s x {_EFFICIENCY:g}",
    )
    cheap = device.type == "cuda" or seconds * (STEPS + 3) < _CHEAP_SECONDS
    if measure or (measure is None and cheap):
        seconds, peak = dry_run(files, overrides, processes)
        how, note = MEASURED, f"{STEPS} steps on {device}"
        made.add(
            "device: peak in a step",
            peak / 1e9,
            "GB",
            MEASURED,
            "CUDA's allocator" if device.type == "cuda" else "live tensors",
        )
    made.add("seconds a step, device", seconds, "s", how, note)
    workers = max(1, get("workers"))
    collate = get("masked_batch")
    if opened is not None:
        reader = parser_of(
            files,
            overrides,
            processes,
            store={"_target_": "custom.data.store.volume_store.VolumeStore", "path": str(store)},
        )
        each = seconds_a_pair(reader.get_parsed_content("train::dataset"), collate, batch)
        how_each, note = MEASURED, "pairs of this store, one process"
    else:
        made_up = seconds_a_pair(MadeUpPairs(get("crop_size")), collate, batch, at_least=0.5)
        each = 2 * math.prod(get("crop_size")) * READ_SECONDS + made_up
        how_each, note = MODELLED, "no store yet: crops by the voxel, masks and plans measured"
    made.add("CPU ms a pair, loader", 1e3 * each, "ms", how_each, note)
    cores = os.cpu_count() or 1
    at_once = max(1.0, min(workers, cores / processes))
    loading = batch * each / at_once
    made.add("seconds a step, loader", loading, "s", MODELLED, f"{workers} workers on {cores} cores")
    alone = get("workers") == 0 or (device.type == "cpu" and cores <= 1)
    step = loading + seconds if alone else max(loading, seconds)
    made.add("pairs a second", processes * batch / step, "", how, "all processes")
    made.add(
        "hours", iterations * step / 3600, "h", how, f"{iterations} iterations; probes and building apart"
    )
    made.bound = "loader" if loading > seconds else "device"
