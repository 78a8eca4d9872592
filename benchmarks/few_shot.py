"""Pre-trained against scratch with few labels: runs an experiment of docs/experiments, one process at a time.

    OMP_NUM_THREADS=1 python benchmarks/few_shot.py docs/experiments/openkbp SCANS WORK
    python benchmarks/few_shot_report.py docs/experiments/openkbp WORK

Each run is what a user would type: ``python -m monai.bundle run`` on the bundles' own configs and the experiment's
overrides, ``alice export``, ``alice score --rules plain``. Every run's command, log and rows.csv stay in WORK; what is
finished is not run again. The last network of a fine-tuning is scored, never the best on the patients that score it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from few_shot_plan import Plan, Run, finetune_words, predict_words, pretrain_words, read_plan, runs_of
from tqdm import tqdm

from custom.cli.weights import export
from custom.data.layouts import case_name
from custom.data.scans import Scan, list_scans
from custom.evaluation.scores.csv_rows import write_rows
from custom.evaluation.scores.score_folder import plain_rule, score_folder
from custom.files import write_text

TOLERANCE_MM = 2.0  # of the NSD; that of alice score --rules plain


def prepare(plan: Plan, scans: Path, work: Path) -> None:
    """Write the three datalists, and label maps without what the plan drops.

    ``unlabelled.json`` and ``labelled.json`` hold the training patients, ``labelled.json`` those held back, too (as
    fold 0, which no run trains on); ``held_back.json`` has their images alone.

    Raises:
        ValueError: if WORK was made by other settings or of other scans, nobody is held back, or nobody is left.
    """
    pairs = [scan for scan in list_scans(scans) if scan.label]
    stamp, made_of = work / "settings.sha256", _digest(plan, pairs)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != made_of:
        raise ValueError(
            f"{work}: its runs were made with other settings or of other scans; name another folder."
        )
    held = {scan.name for scan in pairs if re.search(plan.held_back, case_name(scan.image))}
    if not 0 < len(held) < len(pairs):
        raise ValueError(
            f"{scans}: {len(held)} of {len(pairs)} labelled cases match held_back {plan.held_back!r}."
        )
    records = []
    for scan in tqdm(pairs, desc="labels", disable=None):
        assert scan.label is not None
        label = scan.label.resolve()
        if plan.drop_labels:
            label = _without(label, plan.drop_labels, work / "labels" / scan.name / label.name)
        record = {
            "image": str(scan.image.resolve()),
            "label": str(label),
            "patient": scan.patient,
            "fold": int(scan.name not in held),
        }
        records.append(record)
    images = {fold: [{"image": r["image"]} for r in records if r["fold"] == fold] for fold in (0, 1)}
    lists = {
        "labelled": {"training": records},
        "unlabelled": {"training": images[1]},
        "held_back": {"testing": images[0]},
    }
    for name, content in lists.items():
        write_text(work / f"{name}.json", json.dumps(content, indent=1))
    write_text(stamp, made_of)


def _digest(plan: Plan, pairs: Sequence[Scan]) -> str:
    """Of the settings, and of which files the scans are and how large."""
    files = [path.resolve() for scan in pairs for path in (scan.image, scan.label) if path is not None]
    content = [plan.digest, [[str(path), path.stat().st_size] for path in files]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _without(label: Path, values: Sequence[int], to: Path) -> Path:
    """A copy of a label map with some values made background."""
    if not to.is_file():
        found = nib.load(label)
        voxels = np.asarray(found.dataobj)
        to.parent.mkdir(parents=True, exist_ok=True)
        draft = to.with_name(f"draft-{os.getpid()}-{to.name}")
        kept = np.where(np.isin(voxels, values), 0, voxels).astype(np.uint8)
        nib.save(nib.Nifti1Image(kept, found.affine), draft)
        os.replace(draft, to)
    return to


def do(plan: Plan, run: Run, work: Path) -> bool:
    """Make a run unless it is there; whether there was something to do."""
    folder = work / run.folder
    if run.labelled is None:
        encoder = folder / "encoder.safetensors"
        if encoder.is_file():
            return False
        execute(pretrain_words(plan, run, work), folder / "pretrain.log")
        export(str(folder), str(encoder))
        return True
    if (folder / "rows.csv").is_file():
        return False
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    execute(finetune_words(plan, run, work), folder / "finetune.log")
    execute(predict_words(plan, run, work), folder / "predict.log")
    rule = plain_rule(plan.organs, TOLERANCE_MM)
    scored = score_folder(folder / "predictions", work / "labelled.json", rule, fold=0, seed=run.seed)
    write_rows(folder / "rows.csv", scored.rows)
    shutil.rmtree(folder / "checkpoints")  # 100 MB a run
    return True


def execute(words: Sequence[str], log: Path) -> None:
    """``python -m WORDS`` in a process of its own, its command and output in a file.

    The process is forked, so that a sweep of many short runs imports torch and MONAI once.

    Raises:
        RuntimeError: naming the log, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"python -m {shlex.join(words)}\n", encoding="utf-8")
    process = multiprocessing.get_context("fork").Process(target=_as_command, args=(list(words), log))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{log}: exit code {process.exitcode}; its last lines say why.")


def _as_command(words: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = ["-m", *words[1:]]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Prepare, then every run that is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="a folder of docs/experiments")
    parser.add_argument("scans", type=Path, help="images and labels")
    parser.add_argument("work", type=Path, help="folder for everything that is made")
    asked = parser.parse_args()
    plan, work = read_plan(asked.experiment), asked.work.resolve()
    prepare(plan, asked.scans, work)
    for run in (listed := list(runs_of(plan))):
        start = time.perf_counter()
        made = do(plan, run, work)
        took = f"{time.perf_counter() - start:.0f} s" if made else "was there"
        print(f"{listed.index(run) + 1} of {len(listed)}: {run.folder.as_posix()}: {took}", flush=True)


if __name__ == "__main__":
    main()
