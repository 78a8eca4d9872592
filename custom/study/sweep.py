"""Make every run of a plan that is missing: one process at a time, each what a user would type."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.bundles.estimate import estimate
from custom.data.layouts import case_name
from custom.data.scans import Scan, list_scans
from custom.engine.run_log import read_log
from custom.errors import AliceError, plain_message, shown
from custom.evaluation.scores.csv_rows import write_rows
from custom.evaluation.scores.rules import ScoringRule
from custom.evaluation.scores.score_folder import plain_rule, score_folder
from custom.files import write_text
from custom.study.plan import FIGURES, PRETRAIN, Plan, Run, bundle_words, runs_of, trained_arms, trials_of

logger = logging.getLogger(__name__)

TOLERANCE_MM = 2.0  # of the NSD; that of alice score --rules plain
FEWEST_STEPS = 10  # of a pre-training; a budget for fewer is a slip


class RunFailed(AliceError):
    """A run of the sweep ended with an error."""


class Sweep:
    """All runs of a plan in one folder. What is there is not made again.

    Args:
        plan: what is compared.
        scans: folder, datalist or manifest of images, with labels where the plan fine-tunes.
        work: folder for everything that is made.
    """

    def __init__(self, plan: Plan, scans: str | Path, work: str | Path) -> None:
        self.plan, self.scans, self.work = plan, Path(scans), Path(work).resolve()
        self.failed: dict[str, str] = {}  # folder of a run -> what went wrong

    def run(self) -> None:
        """Prepare, examine every arm, choose rates, and make the runs.

        Raises:
            AliceError: before any training, if an arm, network or the data are refused.
        """
        self.prepare()
        self.examine()
        self.choose()
        listed = list(runs_of(self.plan))
        for number, run in enumerate(listed, start=1):
            start = time.perf_counter()
            try:
                told = "made" if self.make(run) else "was there"
            except RunFailed as error:
                self.failed[run.folder.as_posix()] = told = str(error)
            seconds = time.perf_counter() - start
            print(f"{number} of {len(listed)}: {run.folder.as_posix()}: {told} ({seconds:.0f} s)", flush=True)

    # -- before the first run ------------------------------------------------------

    def prepare(self) -> None:
        """Write the lists of scans, and label maps without what the plan drops.

        ``scans.json`` holds all scans: the store of pre-training is built from it, since the probe measures those held back.
        ``labelled.json`` has the labelled ones; those held back are fold 0, which no run trains on. ``held_back.json`` has the
        images of the latter. ``split.json`` and ``split_choose.json`` name the scans that a pre-training sees and is measured on.

        Raises:
            AliceError: if WORK was made by other settings or of other scans, or a role has nobody or somebody of another.
        """
        found = list_scans(self.scans)
        stamp, made_of = self.work / "settings.sha256", self._digest(found)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") != made_of:
            raise AliceError(
                f"{self.work}: its runs were made with other settings or of other scans; name another folder."
            )
        roles = self._roles(found)
        records = [self._record(scan, fold=0 if scan.name in roles["held_back"] else 1) for scan in found]
        labelled = [record for record in records if "label" in record]
        if self.plan.labelled and not {0, 1} <= {record["fold"] for record in labelled}:
            raise AliceError(
                f"{self.scans}: labels are needed of scans held back ({self.plan.held_back!r}) and of others."
            )
        images = [{"image": record["image"]} for record in labelled if record["fold"] == 0]
        lists = {
            "scans": {"training": [{k: v for k, v in record.items() if k != "fold"} for record in records]},
            "labelled": {"training": labelled},
            "held_back": {"testing": images},
            "split": {"split": [roles["training"] + roles["choosing"], roles["held_back"]]},
            "split_choose": {"split": [roles["training"], roles["choosing"]]},
        }
        for name, content in lists.items():
            write_text(self.work / f"{name}.json", json.dumps(content, indent=1))
        write_text(stamp, made_of)

    def _roles(self, found: Sequence[Scan]) -> dict[str, list[str]]:
        """Names of scans by role; no patient has two."""
        patterns = {"held_back": self.plan.held_back, "choosing": self.plan.choose.get("scans")}
        roles: dict[str, list[str]] = {"held_back": [], "choosing": [], "training": []}
        patients: dict[str, str] = {}
        for scan in found:
            hits = [role for role, p in patterns.items() if p and re.search(p, case_name(scan.image))]
            if len(hits) > 1:
                raise AliceError(
                    f"{shown(scan.name)}: matches held_back and choose::scans; rates are never chosen on what is reported."
                )
            role = hits[0] if hits else "training"
            if patients.setdefault(scan.patient, role) != role:
                raise AliceError(
                    f"{shown(scan.name)}: its patient {shown(scan.patient)} is in two roles ({patients[scan.patient]} and {role}); "
                    "let the patterns take all scans of a patient."
                )
            roles[role].append(scan.name)
        for role, pattern in patterns.items():
            if pattern and not roles[role]:
                raise AliceError(f"{self.scans}: no scan of {len(found)} matches {role} {pattern!r}.")
        if len({p for p, role in patients.items() if role == "training"}) < 2:
            raise AliceError(
                f"{self.scans}: {len(roles['training'])} of {len(found)} scans are left to train on; two patients are needed."
            )
        return roles

    def _digest(self, found: Sequence[Scan]) -> str:
        """Of the settings, and of which files the scans are and how large."""
        files = [path.resolve() for scan in found for path in (scan.image, scan.label) if path is not None]
        content = [self.plan.digest, [[str(path), path.stat().st_size] for path in files]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _record(self, scan: Scan, fold: int) -> dict[str, Any]:
        record = {"image": str(scan.image.resolve()), "patient": scan.patient, "fold": fold}
        if scan.label is not None:
            label = scan.label.resolve()
            if self.plan.drop_labels:
                label = _without(label, self.plan.drop_labels, self.work / "labels" / scan.name / label.name)
            record["label"] = str(label)
        return record

    def examine(self) -> None:
        """Take a few steps of every arm, so that what cannot run is refused by name, and costs are known.

        Writes ``examined/NETWORK/ARM.json``: what a step takes, and the iterations that the budget buys.

        Raises:
            AliceError: naming network and arm.
        """
        for network in self.plan.networks:
            for arm in trained_arms(self.plan):
                path = self.work / "examined" / network / f"{arm}.json"
                if path.is_file():
                    continue
                files = self.plan.pretrain_files(network, arm)
                overrides = {
                    "dataset_dir": str(self.work / "scans.json"),
                    "store_dir": str(self.store(files)),
                }
                self._build_store(files, overrides)
                made = in_process(
                    _measure,
                    self.work / "examine.log",
                    [str(f) for f in [*files, self._split()]],
                    overrides,
                    path,
                )
                if made is not None:
                    raise AliceError(f"{arm}, {network}: {made}")
                self._iterations(path, f"{arm}, {network}")

    def _build_store(self, files: Sequence[Path], overrides: dict[str, str]) -> None:
        if not (Path(overrides["store_dir"]) / "index.json").is_file():
            told = in_process(_build, self.work / "build.log", [str(f) for f in files], overrides)
            if told is not None:
                raise AliceError(told)

    def _iterations(self, path: Path, who: str) -> None:
        """Add to an arm's costs the iterations that the budget buys."""
        costs = json.loads(path.read_text(encoding="utf-8"))
        for unit, budget in self.plan.budget.items():
            costs["iterations"] = math.floor(budget / costs[f"{unit} a step"])
            if costs["iterations"] < FEWEST_STEPS:
                path.unlink()
                raise AliceError(
                    f"{who}: a budget of {budget:g} {unit} is {costs['iterations']} steps; take a larger one."
                )
        write_text(path, json.dumps(costs, indent=1))

    def store(self, files: Sequence[Path]) -> Path:
        """The store of a pre-training: one for each spacing."""
        spacing = self.plan.settings(*files)["spacing"]
        return self.work / ("store-" + "x".join(f"{float(mm):g}" for mm in spacing))

    def _split(self, choosing: bool = False) -> Path:
        return self.work / ("split_choose.json" if choosing else "split.json")

    # -- the runs ------------------------------------------------------------------

    def choose(self) -> None:
        """Try the plan's learning rates for every arm. ``chosen.json`` has the figures of all, and the best rate.

        A rate that diverges has the figure null. An arm of which all diverge fails; the sweep goes on.
        """
        chosen: dict[str, Any] = {}
        for run in trials_of(self.plan):
            figure = self._trial(run)
            of_arm = chosen.setdefault(
                f"{run.network}/{run.arm}", {"by": self.plan.choose["by"], "tried": {}}
            )
            of_arm["tried"][f"{run.rate:g}"] = figure
            told = "failed" if figure is None else f"{self.plan.choose['by']} {figure:.4f}"
            print(f"{run.folder.as_posix()}: {told}", flush=True)
        for of_arm in chosen.values():
            sign = FIGURES[self.plan.choose["by"]]
            ended = {
                float(rate): sign * value for rate, value in of_arm["tried"].items() if value is not None
            }
            of_arm["rate"] = max(ended, key=lambda rate: ended[rate]) if ended else None
        if chosen:
            write_text(self.work / "chosen.json", json.dumps(chosen, indent=1))

    def _trial(self, run: Run) -> float | None:
        folder = self.work / run.folder
        result = folder / "figure.json"
        if not result.is_file():
            try:
                self.pretrain(run)
                value = last_probe(folder).get(self.plan.choose["by"])
            except RunFailed as error:
                logger.warning("%s", error)
                value = None
            finite = value is not None and math.isfinite(value)
            write_text(result, json.dumps(value if finite else None))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        found = json.loads(result.read_text(encoding="utf-8"))
        return None if found is None else float(found)

    def make(self, run: Run) -> bool:
        """Make a run unless it is there; whether there was something to do.

        Raises:
            RunFailed: naming the log.
        """
        folder = self.work / run.folder
        if run.labelled is None:
            if (folder / "encoder.safetensors").is_file():
                return False
            self.pretrain(run)
            self._export(run)
            return True
        if (folder / "rows.csv").is_file():
            return False
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        self.finetune(run)
        predictions = folder / "predictions"
        words = bundle_words(
            self.plan.bundle,
            self.plan.inference_files(run.network),
            {
                "dataset_dir": self.work / "held_back.json",
                "output_dir": predictions,
                "checkpoint": folder / "checkpoints" / "last.pt",
            },
        )
        execute(words, folder / "predict.log")
        scored = score_folder(predictions, self.work / "labelled.json", self._rule(), fold=0, seed=run.seed)
        write_rows(folder / "rows.csv", scored.rows)
        shutil.rmtree(folder / "checkpoints")  # 100 MB a run
        return True

    def _rule(self) -> ScoringRule:
        return plain_rule(self.plan.organs, TOLERANCE_MM)

    def pretrain(self, run: Run) -> None:
        """A pre-training, or a trial of a rate; a stopped one goes on."""
        plan, folder = self.plan, self.work / run.folder
        files = plan.pretrain_files(run.network, run.arm)
        costs = json.loads(
            (self.work / "examined" / run.network / f"{run.arm}.json").read_text(encoding="utf-8")
        )
        settings: dict[str, Any] = {
            "dataset_dir": self.work / "scans.json",
            "store_dir": self.store(files),
            "output_dir": folder,
            "seed": run.seed,
            "probe_every": costs["iterations"],
        }
        if plan.budget:
            settings["iterations"] = costs["iterations"]
        if rate := run.rate or self._chosen(run):
            settings["learning_rate"] = rate
        words = bundle_words(PRETRAIN, [*files, self._split(choosing=run.rate is not None)], settings)
        spent = execute(words, folder / "pretrain.log")
        before = json.loads((folder / "spent.json").read_text()) if (folder / "spent.json").is_file() else {}
        write_text(folder / "spent.json", json.dumps({k: v + before.get(k, 0.0) for k, v in spent.items()}))

    def _chosen(self, run: Run) -> float | None:
        if not self.plan.choose:
            return None
        chosen = json.loads((self.work / "chosen.json").read_text(encoding="utf-8"))
        rate: float | None = chosen[f"{run.network}/{run.arm}"]["rate"]
        if rate is None:
            raise RunFailed(f"{run.arm}, {run.network}: no learning rate that was tried ended well.")
        return rate

    def _export(self, run: Run) -> None:
        folder = self.work / run.folder
        words = ["custom.cli", "export", str(folder), "--to", str(folder / "encoder.safetensors")]
        if self.plan.labelled:
            roi = self.plan.settings(*self.plan.finetune_files(run.network, next(iter(self.plan.ways))))[
                "roi_size"
            ]
            settings = self.plan.settings(*self.plan.pretrain_files(run.network, run.arm))
            if "img_size" in settings["network_def"] and list(roi) != list(settings["crop_size"]):
                words += ["--img_size", json.dumps(list(roi))]
        execute(words, folder / "export.log")

    def finetune(self, run: Run) -> None:
        """A fine-tuning; arms of a row differ in ``pretrained`` alone."""
        folder = self.work / run.folder
        settings = {
            "dataset_dir": self.work / "labelled.json",
            "output_dir": folder,
            "ckpt_dir": folder,
            "labelled": run.labelled,
            "seed": run.seed,
            "fold_seed": run.seed,
        }
        if self.plan.arms[run.arm]:
            encoder = self.work / Run(run.network, run.arm, run.seed).folder / "encoder.safetensors"
            if not encoder.is_file():
                raise RunFailed(f"{run.arm}, {run.network}: its pre-training of seed {run.seed} failed.")
            settings["pretrained"] = encoder
        assert run.way is not None
        words = bundle_words(self.plan.bundle, self.plan.finetune_files(run.network, run.way), settings)
        execute(words, folder / "finetune.log")


def last_probe(folder: Path) -> dict[str, float]:
    """Figures of the last probe of a run, as ``{retrieval: ...}``."""
    found: dict[str, float] = {}
    for line in read_log(folder):
        found |= {
            key.removeprefix("probe/"): value for key, value in line.items() if key.startswith("probe/")
        }
    return found


def execute(words: Sequence[str], log: Path) -> dict[str, float]:
    """``python -m WORDS`` in a process of its own, its command and output in a file.

    The process is forked, so that a sweep of many short runs imports torch and MONAI once.

    Returns:
        Seconds on the clock and of the CPU.

    Raises:
        RunFailed: naming the log and its last line, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"python -m {shlex.join(words)}\n")
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("fork").Process(target=_as_command, args=(list(words), log))
    process.start()
    process.join()
    if process.exitcode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(f"{log}: exit code {process.exitcode}; it ends with: {shown(lines[-1])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}


def _into(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def _as_command(words: list[str], log: Path) -> None:
    _into(log)
    sys.argv = ["-m", *words[1:]]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def in_process(function: Callable[..., None], log: Path, *arguments: Any) -> str | None:
    """Call a function in a process of its own; what it refuses, or None."""
    log.parent.mkdir(parents=True, exist_ok=True)
    receiving, sending = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_called, args=(function, log, sending, arguments)
    )
    process.start()
    sending.close()
    try:
        told: str | None = receiving.recv()
    except EOFError:
        told = f"ended without a word; see {log}"
    process.join()
    return told


def _called(function: Callable[..., None], log: Path, sending: Any, arguments: Sequence[Any]) -> None:
    _into(log)
    try:
        function(*arguments)
        sending.send(None)
    except Exception as error:
        message = plain_message(error)
        sending.send(message if message is not None else f"{type(error).__name__}: {error} (see {log})")
        raise


def _build(files: list[str], overrides: dict[str, str]) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(files)
    for key, value in overrides.items():
        parser.set(value, key)
    parser.get_parsed_content("store")


def _measure(files: list[str], overrides: dict[str, str], to: Path) -> None:
    """What a step of a pre-training takes on this machine."""
    made = {figure.name: figure.value for figure in estimate(files, overrides).figures}
    costs = {
        "iterations": made["iterations"],
        "crops a step": made["crops a step"],
        "seconds a step": 3600 * (made["hours"] or 0.0) / (made["iterations"] or 1.0),
        "flops a step": 1e12 * (made["TFLOP a step"] or 0.0),
        "parameters": made["parameters, encoder"],
        "parameters trained": made["parameters, trained"],
    }
    write_text(to, json.dumps(costs, indent=1))


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
