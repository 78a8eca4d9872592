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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from tqdm import tqdm

from custom.cli import export
from custom.data.scans import list_scans
from custom.evaluation.datalists import case_name
from custom.evaluation.rows import write_rows
from custom.evaluation.scoring import plain_rule, score_folder
from custom.files import write_text

REPO = Path(__file__).resolve().parents[1]
TOLERANCE_MM = 2.0  # of the NSD; that of alice score --rules plain
Labelled = int | float  # patients, or a share of them; as ``labelled`` of the segmentation bundles


@dataclass(frozen=True)
class Plan:
    """An experiment, from its plan.yaml; see docs/experiments/README.md.

    Attributes:
        folder: where plan.yaml and the overrides lie.
        bundle: of segmentation.
        held_back: regular expression on names of cases: these are scored and never trained on.
        arms: name -> overrides of pre-training; none of them is from scratch.
        labelled: how many patients are labelled.
        seeds: of pre-training, of fine-tuning, and of who is labelled.
        compare: pairs of arms, A and B.
        drop_labels: label values that become background, in training and in the references.
    """

    folder: Path
    bundle: str
    held_back: str
    arms: dict[str, list[str]]
    labelled: list[Labelled]
    seeds: list[int]
    compare: list[list[str]]
    drop_labels: list[int] = field(default_factory=list)

    @property
    def organs(self) -> list[str]:
        """In the order of the label's value: the task's, else the bundle's."""
        settings = ConfigParser.load_config_file(bundle_config(self.bundle, "train.yaml"))
        return list((settings | self._read("task.yaml"))["labels"])

    @property
    def digest(self) -> str:
        """Of all settings that make the runs; not of what is compared."""
        names = sorted({"task.yaml", "finetune.yaml", *(n for files in self.arms.values() for n in files)})
        made_by = [self.bundle, self.held_back, self.drop_labels, *(self._read(name) for name in names)]
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def _read(self, name: str) -> dict[str, Any]:
        return dict(ConfigParser.load_config_file(self.folder / name))


def read_plan(folder: str | Path) -> Plan:
    """The plan of an experiment.

    Raises:
        ValueError: naming the file, for a key that is unknown or missing, an override or an arm that is not there.
    """
    folder = Path(folder)
    path = folder / "plan.yaml"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a folder of docs/experiments.")
    try:
        plan = Plan(folder=folder, **ConfigParser.load_config_file(path))
    except TypeError as error:
        raise ValueError(f"{path}: {error}.") from error
    for name in ("task.yaml", "finetune.yaml", *(n for files in plan.arms.values() for n in files)):
        if not (folder / name).is_file():
            raise ValueError(f"{path}: names {name}, which is not beside it.")
    if strange := sorted({arm for pair in plan.compare for arm in pair} - set(plan.arms)):
        raise ValueError(f"{path}: compares {strange}; its arms are {sorted(plan.arms)}.")
    return plan


def bundle_config(bundle: str, name: str) -> Path:
    return REPO / "bundles" / bundle / "configs" / name


@dataclass(frozen=True)
class Run:
    """One pre-training (``labelled`` is None) or one fine-tuning."""

    arm: str
    seed: int
    labelled: Labelled | None = None

    @property
    def folder(self) -> Path:
        """In WORK; ``seed`` stands in it as ``alice compare`` reads it."""
        kind = "pretrain" if self.labelled is None else f"labelled-{labelled_name(self.labelled)}"
        return Path("runs") / self.arm / kind / f"seed{self.seed}"


def labelled_name(labelled: Labelled) -> str:
    """3, all, 10pc: for the names of files."""
    if isinstance(labelled, int):
        return str(labelled)
    return "all" if labelled == 1.0 else f"{100 * labelled:g}pc"


def runs_of(plan: Plan) -> Iterator[Run]:
    """All runs in order: one seed after the other, and in each the pre-trainings first."""
    for seed in plan.seeds:
        yield from (Run(arm, seed) for arm, files in plan.arms.items() if files)
        yield from (Run(arm, seed, labelled) for labelled in plan.labelled for arm in plan.arms)


def pretrain_words(plan: Plan, run: Run, work: Path) -> list[str]:
    """The command line of a pre-training."""
    files = [
        bundle_config("alice_pretrain", "train.yaml"),
        *(plan.folder.resolve() / name for name in plan.arms[run.arm]),
    ]
    return _bundle_run(
        "alice_pretrain",
        files,
        dataset_dir=work / "unlabelled.json",
        store_dir=work / "store",
        output_dir=work / run.folder,
        seed=run.seed,
    )


def finetune_words(plan: Plan, run: Run, work: Path) -> list[str]:
    """The command line of a fine-tuning; arms of a row differ in ``pretrained`` alone."""
    files = [
        bundle_config(plan.bundle, "train.yaml"),
        *(plan.folder.resolve() / n for n in ("task.yaml", "finetune.yaml")),
    ]
    start = (
        {"pretrained": work / Run(run.arm, run.seed).folder / "encoder.safetensors"}
        if plan.arms[run.arm]
        else {}
    )
    return _bundle_run(
        plan.bundle,
        files,
        dataset_dir=work / "labelled.json",
        output_dir=work / run.folder,
        ckpt_dir=work / run.folder,
        labelled=run.labelled,
        seed=run.seed,
        fold_seed=run.seed,
        **start,
    )


def predict_words(plan: Plan, run: Run, work: Path) -> list[str]:
    """The command line that segments the patients held back."""
    files = [bundle_config(plan.bundle, "inference.yaml"), plan.folder.resolve() / "task.yaml"]
    return _bundle_run(
        plan.bundle,
        files,
        dataset_dir=work / "held_back.json",
        output_dir=work / run.folder / "predictions",
        checkpoint=work / run.folder / "checkpoints" / "last.pt",
    )


def _bundle_run(bundle: str, files: Sequence[Path], **settings: Any) -> list[str]:
    words = ["monai.bundle", "run", "--config_file", str([str(path) for path in files])]
    words += ["--bundle_root", str(REPO / "bundles" / bundle)]
    words += ["--logging_file", str(bundle_config(bundle, "logging.conf"))]
    return words + [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def prepare(plan: Plan, scans: Path, work: Path) -> None:
    """Write the three datalists, and label maps without what the plan drops.

    ``unlabelled.json`` and ``labelled.json`` hold the training patients, ``labelled.json`` those held back, too (as
    fold 0, which no run trains on); ``held_back.json`` has their images alone.

    Raises:
        ValueError: if WORK was made by other settings, nobody is held back, or nobody is left.
    """
    stamp = work / "settings.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != plan.digest:
        raise ValueError(f"{work}: its runs were made with other settings; name another folder.")
    pairs = [scan for scan in list_scans(scans) if scan.label]
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
            label = _without(label, plan.drop_labels, work / "labels" / label.name)
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
    write_text(stamp, plan.digest)


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
