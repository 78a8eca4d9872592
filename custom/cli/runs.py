"""Commands about pre-training runs: probe, picture, profile, estimate."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from json import dumps as to_json
from pathlib import Path
from typing import Any

from custom.errors import AliceError, shown


def probe(
    run: str,
    store: str | None = None,
    names: Sequence[str] | None = None,
    embeddings: str | None = None,
    device: str = "cpu",
    json: str | None = None,
) -> None:
    """Measure a run's frozen encoder on held-back scans, beside an untrained twin and raw intensities.

    The columns: retrieval, how often the same region of another patient is the nearest one; place, how far the most similar
    token of another patient lies from the right place, mm; linear, how well organs are read off single tokens (mean r).
    Intervals are 95 % bootstrap intervals over patients.

    Args:
        run: the run's output_dir, or one of its checkpoints.
        store: other than the one it was trained from.
        names: scans to measure on; the run's held-back ones by default.
        embeddings: of alice embed for these scans; adds what SAM errs on the same points.
        device: cpu or cuda.
        json: also write the numbers to this file.
    """
    import numpy as np
    import torch

    from custom.data.store.volume_store import VolumeStore
    from custom.encoders.tokens import token_encoder
    from custom.evaluation.place_error import aligner_error
    from custom.evaluation.probe import encoder_probe
    from custom.files import write_text
    from custom.landmarks.aligners.make import make_aligner
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import build_encoder

    loaded = load_run(run)
    volumes = VolumeStore(store or loaded.summary["store_dir"])
    chosen = list(names or loaded.summary["held_back"])
    options = {"crop_size": loaded.summary["crop_size"], "window_hu": loaded.summary["window_hu"]}
    measure = encoder_probe(volumes, chosen, **options, device=device)
    if measure is None:
        raise AliceError(
            f"{chosen or 'No scan'}: a probe needs scans of two patients. Name some with --names."
        )
    torch.manual_seed(loaded.summary["seed"])
    untrained = token_encoder(build_encoder(loaded.summary)).eval().to(device)
    rows = {
        "raw intensities": measure.raw(untrained.patch),
        "untrained": measure.measure(untrained),
        f"step {loaded.iteration}": measure.measure(loaded.student.encoder.to(device)),
    }
    columns = {"retrieval": "retrieval", "place_mm": "place, mm", "linear": "linear"}
    print(f"{'':<18}" + "".join(f"{title:<24}" for title in columns.values()))
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{_cell(row.get(key)):<24}" for key in columns))
    last = rows[f"step {loaded.iteration}"]
    least, chance = last["place_least_mm"].value, last["place_chance_mm"].value
    print(f"{'chance':<18}{last['chance'].value:<24.3f}{chance:<24.1f}0")
    print(f"{'the nearest token':<18}{'':<24}{least:.1f}")
    for name in ("coordinate", *(["sam"] if embeddings else [])):
        errors = aligner_error(make_aligner(name, volumes, embeddings), volumes, measure.places)
        print(f"{f'aligner {name}':<18}{'':<24}{np.mean(list(errors.values())):.1f}")
    patients = {volumes.patient(name) for name in measure.names}
    kind = "organs' centroids" if measure.places is not measure.points else "a lattice in the body's box"
    print(f"{len(measure.names)} scans of {len(patients)} patients; places are {kind}.")
    if json:
        content = {name: {key: list(figure) for key, figure in row.items()} for name, row in rows.items()}
        write_text(json, to_json(content, indent=1) + "\n")


def properties(
    run: str,
    store: str | None = None,
    names: Sequence[str] | None = None,
    boxes: int = 64,
    batch: int = 32,
    device: str = "cpu",
    json: str | None = None,
) -> None:
    """Measure how well parts and wholes fit together in a run's frozen encoder, beside an untrained twin (ACE's protocols).

    The columns: composition, the cosine of a crop's mean token with the mean of its eight octants'; mismatched, the same with
    other patients' octants; decomposition, how often what a crop loses with a box is most like that box, among those of
    a batch; retrieval, how often the whole crop is. Intervals are 95 % bootstrap intervals over patients.

    Args:
        run: the run's output_dir, or one of its checkpoints.
        store: other than the one it was trained from.
        names: scans to measure on; the run's held-back ones by default.
        boxes: how many crops are cut, a multiple of batch.
        batch: boxes among which the right one is looked for; chance is one in batch.
        device: cpu or cuda.
        json: also write the numbers to this file.
    """
    import torch

    from custom.data.store.volume_store import VolumeStore
    from custom.encoders.tokens import token_encoder
    from custom.evaluation.properties import PartsProbe
    from custom.files import write_text
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import build_encoder

    loaded = load_run(run)
    volumes = VolumeStore(store or loaded.summary["store_dir"])
    chosen = list(names or loaded.summary["held_back"])
    options = {"crop_size": loaded.summary["crop_size"], "window_hu": loaded.summary["window_hu"]}
    probe = PartsProbe(volumes, chosen, **options, boxes=boxes, batch=batch, device=device)
    torch.manual_seed(loaded.summary["seed"])
    untrained = token_encoder(build_encoder(loaded.summary)).to(device)
    rows = {
        "untrained": probe.measure(untrained),
        f"step {loaded.iteration}": probe.measure(loaded.student.encoder.to(device)),
    }
    columns = ("composition", "mismatched", "decomposition", "retrieval")
    print(f"{'':<18}" + "".join(f"{title:<24}" for title in columns))
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{_cell(row[key]):<24}" for key in columns))
    print(f"{'chance':<18}{'':<48}" + f"{1 / batch:<24.3f}" * 2)
    print(f"{boxes} crops of {len(chosen)} scans; the right box is looked for among {batch}.")
    if json:
        content = {name: {key: list(figure) for key, figure in row.items()} for name, row in rows.items()}
        write_text(json, to_json(content, indent=1) + "\n")


def _cell(figure: Sequence[float] | None) -> str:
    """A value and its interval, where there is one."""
    if figure is None:
        return "-"
    digits = 3 if abs(figure[0]) < 2 else 1
    interval = "" if math.isnan(figure[1]) else f" [{figure[1]:.{digits}f}, {figure[2]:.{digits}f}]"
    return f"{figure[0]:.{digits}f}{interval}"


def picture(run: str, to: str = "picture.png") -> None:
    """Draw what a run has learnt: curves, a reconstruction, and one place found in another patient.

    Args:
        run: the run's output_dir.
        to: the PNG to write.
    """
    from custom.engine.run_log import read_log
    from custom.methods.run_folder import load_run
    from custom.methods.run_page import picture_of

    loaded = load_run(run)
    figure, scans = picture_of(loaded, read_log(loaded.folder))
    of = loaded.summary
    figure.suptitle(
        f"{of['network_type']} after {loaded.iteration} of {of['iterations']} iterations, {of['scans']} scans"
    )
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)
    print(f"{to}: {shown(scans)}")


def report(
    run: str, other: str | None = None, to: str = "report.html", live: bool = False, every: int = 30
) -> None:
    """Write a page about a run, or about two: curves and what they should look like, probe, alarms, a picture, settings.

    The page is one file that needs no network.

    Args:
        run: the run's output_dir; it may still be training.
        other: of a second run, drawn beside it.
        to: the HTML file to write.
        live: write it again until every run has all its steps, or until Ctrl-C; a browser that shows it loads it again.
        every: seconds between two writes.
    """
    import time

    from custom.methods.run_page import ended, run_page

    if every < 1:
        raise AliceError(f"--every {every}: give at least 1 second.")
    folders = [run, *([other] if other else [])]
    while True:
        done = not live or all(ended(folder) for folder in folders)
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        run_page(folders, refresh=None if done else every).write(to)
        print(f"{to}{'' if done else ', written again every ' + str(every) + ' s'}", flush=True)
        if done:
            return
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return


def profile(config: str | Sequence[str], steps: int = 8, **overrides: Any) -> None:
    """Time the parts of a training step: loader, transfer, views, online, decoder, target, losses, backward, ...

    Args:
        config: a bundle's train.yaml, or "['train.yaml','smoke.yaml']".
        steps: steps to time, after two of warm-up.
        overrides: of the config, as in ``monai.bundle run`` (--dataset_dir DIR --batch_size 4).
    """
    from monai.bundle import ConfigWorkflow

    from custom.bundles.preflight import check_files
    from custom.engine.profile import StepProfile

    files = [config] if isinstance(config, str) else list(config)
    overrides = check_files(files, overrides)
    with tempfile.TemporaryDirectory() as folder:
        asked = ConfigWorkflow(files, workflow_type="train", logging_file=False, **overrides)
        store = overrides.get("store_dir") or asked.parser.get_parsed_content("store_dir")
        quiet = {
            "output_dir": folder,
            "store_dir": store,
            "iterations": steps + 2,
            "warmup": 0,
            "checkpoint_every": 0,
        }
        quiet |= {
            "probe_every": steps + 9,
            "monitor_every": steps + 9,
            "probe": None,
            "resume": False,
            "preflight": None,
        }
        workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **(overrides | quiet))
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train::trainer")
        timed = StepProfile(skip=2)
        timed.attach(trainer)
        trainer.run()
    print(f"{'section':<10}{'ms a step':>12}{'share':>8}")
    for name, (milliseconds, share) in timed.shares().items():
        print(f"{name:<10}{milliseconds:>12.1f}{share:>8.1%}")


def estimate(
    config: str | Sequence[str],
    measure: bool = True,
    processes: int = 1,
    json: str | bool = False,
    **overrides: Any,
) -> None:
    """Say what a pre-training run will take: disk, and by a few real steps on this device memory, speed and hours.

    Args:
        config: a bundle's train.yaml, or "['train.yaml','swin.yaml']".
        measure: take those steps; without them only the disk is told.
        processes: GPUs of the run.
        json: write it as JSON: to a file of this name, or to the terminal.
        overrides: of the config, as in ``monai.bundle run`` (--dataset_dir DIR --batch_size 4).
    """
    from custom.bundles.estimate import estimate as estimate_run

    files = [config] if isinstance(config, str) else list(config)
    made = estimate_run(files, overrides, processes, measure)
    if json is True:
        print(made.to_json())
        return
    print(made.table())
    if json:
        Path(json).write_text(made.to_json() + "\n", encoding="utf-8")
