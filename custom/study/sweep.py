"""Make every run of a plan that is missing: one process at a time, each what a user would type."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
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
import torch

from custom.bundles.estimate import estimate
from custom.bundles.preflight import check_keys
from custom.data.intake.manifest import Manifest, is_manifest
from custom.data.layouts import case_name
from custom.data.scans import Scan, list_scans
from custom.data.store.volume_store import VolumeStore
from custom.engine.run_log import read_log
from custom.errors import AliceError, plain_message, shown
from custom.evaluation.probe import encoder_probe
from custom.evaluation.scores.csv_rows import write_rows
from custom.evaluation.scores.rules import ScoringRule
from custom.evaluation.scores.score_folder import plain_rule, score_folder
from custom.files import write_text
from custom.methods.run_folder import load_run
from custom.processes import end_with_parent, locked
from custom.study.plan import (
    FIGURES,
    PRETRAIN,
    Plan,
    Run,
    bundle_words,
    digest_of,
    runs_of,
    trained_arms,
    trials_of,
)

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
            AliceError: before any training, if an arm, network or the data are refused, or another sweep is at work here.
        """
        with locked(self.work / "sweep.lock", "alice compare-methods", instead="another work folder"):
            self.prepare()
            self.examine()
            self.choose()
            listed = list(runs_of(self.plan))
            for number, run in enumerate(listed, start=1):
                start = time.perf_counter()
                try:
                    told = "made" if self.make(run) else "was there"
                except AliceError as error:
                    self.failed[run.folder.as_posix()] = told = str(error)
                seconds = time.perf_counter() - start
                print(
                    f"{number} of {len(listed)}: {run.folder.as_posix()}: {told} ({seconds:.0f} s)",
                    flush=True,
                )

    # -- before the first run ------------------------------------------------------

    def prepare(self) -> None:
        """Write the lists of scans, and label maps without what the plan drops.

        ``scans.json`` holds all scans: the store of pre-training is built from it, since the probe measures those held back.
        ``labelled.json`` has the labelled ones; those held back are fold 0, which no run trains on. ``held_back.json`` has the
        images of the latter. ``split.json`` and ``split_choose.json`` name the scans that a pre-training sees and is measured on.

        Raises:
            AliceError: if WORK was made by other settings or of other scans, or a role has nobody or somebody of another.
        """
        found = _scans_of(self.scans)
        stamp, made_of = self.work / "settings.sha256", self._digest(found)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") != made_of:
            raise AliceError(
                f"{self.work}: its runs were made with other settings or of other scans; name another folder."
            )
        roles = self._roles(found)
        write_text(stamp, made_of)  # before labels are copied, so that no other settings take the copies over
        records = [self._record(scan, fold=0 if scan.name in roles["held_back"] else 1) for scan in found]
        labelled = [record for record in records if "label" in record]
        if self.plan.labelled and not {0, 1} <= {record["fold"] for record in labelled}:
            raise AliceError(
                f"{self.scans}: labels are needed of scans held back ({self.plan.held_back!r}) and of others."
            )
        there = len({record["patient"] for record in labelled if record["fold"] == 1})
        if too_many := [n for n in self.plan.labelled if isinstance(n, int) and n > there]:
            raise AliceError(
                f"{self.scans}: labelled asks for {too_many} patients; {there} are labelled and not held back."
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
        for role in ("choosing", "held_back"):
            if (
                roles[role]
                and len({p for p, r in patients.items() if r == role}) < 2
                and (role == "choosing" or not self.plan.labelled)
            ):
                raise AliceError(
                    f"{self.scans}: one patient matches {role} {patterns[role]!r}; the probe compares two or more."
                )
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

        Writes ``examined/NETWORK/ARM.json``: what a step takes, and of which settings that is.

        Raises:
            AliceError: naming network and arm.
        """
        for network in self.plan.networks:
            for way in self.plan.ways if self.plan.labelled else ():
                self._check_settings(network, way)
            for arm in trained_arms(self.plan):
                files = self.plan.pretrain_files(network, arm)
                path, made_of = self._examined(network, arm), digest_of(*files)
                if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("made_of") == made_of:
                    self._costs(network, arm)
                    continue
                overrides = {
                    "dataset_dir": str(self.work / "scans.json"),
                    "store_dir": str(self.store(files)),
                }
                self._build_store(files, overrides)
                named = [str(f) for f in [*files, self._split()]]
                told = in_process(_measure, self.work / "examine.log", named, overrides, path, made_of)
                if told is not None:
                    raise AliceError(f"{arm}, {network}: {told}")
                self._costs(network, arm)

    def _check_settings(self, network: str, way: str) -> None:
        """Refuse a setting of fine-tuning or inference that its bundle does not have, or that its objects do not take."""
        for files in (self.plan.finetune_files(network, way), self.plan.inference_files(network)):
            base, *overrides = files
            complete = self.plan.settings(base)
            for path in overrides:
                own = self.plan.settings(path)
                text = json.dumps(own, default=str)
                check_keys(complete, {k: v for k, v in own.items() if f"@{k}" not in text}, str(path))
                complete |= own

    def _examined(self, network: str, arm: str) -> Path:
        return self.work / "examined" / network / f"{arm}.json"

    def _costs(self, network: str, arm: str) -> dict[str, Any]:
        """What a step of an arm takes, and the iterations that the budget buys.

        Raises:
            AliceError: if these are very few.
        """
        costs: dict[str, Any] = json.loads(self._examined(network, arm).read_text(encoding="utf-8"))
        for unit, budget in self.plan.budget.items():
            costs["iterations"] = math.floor(budget / costs[f"{unit} a step"])
            if costs["iterations"] < FEWEST_STEPS:
                raise AliceError(
                    f"{arm}, {network}: a budget of {budget:g} {unit} is {costs['iterations']} steps; take a larger one."
                )
        return costs

    def _build_store(self, files: Sequence[Path], overrides: dict[str, str]) -> None:
        if not (Path(overrides["store_dir"]) / "index.json").is_file():
            told = in_process(_build, self.work / "build.log", [str(f) for f in files], overrides)
            if told is not None:
                raise AliceError(told)

    def store(self, files: Sequence[Path]) -> Path:
        """The store of a pre-training: one for each spacing."""
        spacing = self.plan.settings(*files)["spacing"]
        return self.work / ("store-" + "x".join(f"{float(mm):g}" for mm in spacing))

    def _split(self, choosing: bool = False) -> Path:
        return self.work / ("split_choose.json" if choosing else "split.json")

    # -- the runs ------------------------------------------------------------------

    def choose(self) -> None:
        """Try the plan's learning rates for every arm. ``chosen.json`` has the figures of all, and the best rate.

        A rate that diverges has the figure null, and the sweep goes on. A trial that fails otherwise is not judged: its arm waits
        for the next sweep, which tries it again.
        """
        chosen: dict[str, Any] = {}
        failed = set()
        for run in trials_of(self.plan):
            name = f"{run.network}/{run.arm}"
            of_arm = chosen.setdefault(name, {"by": self.plan.choose["by"], "tried": {}})
            try:
                figure = self._trial(run)
            except AliceError as error:
                failed.add(name)
                print(f"{run.folder.as_posix()}: {error}", flush=True)
                continue
            of_arm["tried"][f"{run.rate:g}"] = figure
            told = "diverged" if figure is None else f"{self.plan.choose['by']} {figure:.4f}"
            print(f"{run.folder.as_posix()}: {told}", flush=True)
        for name, of_arm in chosen.items():
            sign = FIGURES[self.plan.choose["by"]]
            ended = {
                float(rate): sign * value for rate, value in of_arm["tried"].items() if value is not None
            }
            of_arm["rate"] = (
                max(ended, key=lambda rate: ended[rate]) if ended and name not in failed else None
            )
        if chosen:
            write_text(self.work / "chosen.json", json.dumps(chosen, indent=1))

    def _trial(self, run: Run) -> float | None:
        """The figure of a rate; None if it diverged."""
        folder = self.work / run.folder
        self._same(run)
        result = folder / "figure.json"
        if not result.is_file():
            value = None
            try:
                self.pretrain(run)
                value = self._probe(run)["trained"].get(self.plan.choose["by"])
                if value is None:
                    raise RunFailed(f"{folder}: the probe has no {self.plan.choose['by']} on these scans.")
            except RunFailed as error:
                if "not finite" not in str(error):  # of the engine's NonFiniteLoss
                    raise
            write_text(result, json.dumps(value if value is not None and math.isfinite(value) else None))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        found = json.loads(result.read_text(encoding="utf-8"))
        return None if found is None else float(found)

    def _same(self, run: Run) -> None:
        """Refuse a folder whose run was made with other settings; note those of a new one.

        Raises:
            AliceError: naming the folder.
        """
        path, made_of = self.work / run.folder / "made_of.sha256", self._made_of(run)
        if not path.is_file():
            write_text(path, made_of)
        elif path.read_text(encoding="utf-8") != made_of:
            raise AliceError(
                f"{path.parent}: was made with other settings. Delete it to make it again, or name another work folder."
            )

    def _made_of(self, run: Run) -> str:
        """All that decides what a run gives, but the scans."""
        plan = self.plan
        spends: list[Any] = []
        if plan.arms[run.arm]:
            files = plan.pretrain_files(run.network, run.arm)
            rate = run.rate if run.rate is not None else self._chosen(run)
            spends = [*files, self._costs(run.network, run.arm)["iterations"], rate, run.seed]
        if run.labelled is None:
            return digest_of(*spends)
        assert run.way is not None
        tuned = [*plan.finetune_files(run.network, run.way), *plan.inference_files(run.network)]
        return digest_of(*spends, plan.bundle, *tuned, run.labelled, run.seed)

    def make(self, run: Run) -> bool:
        """Make a run unless it is there; whether there was something to do.

        Raises:
            AliceError: naming the log, if it fails; or the folder, if it was made with other settings.
        """
        folder = self.work / run.folder
        self._same(run)
        if run.labelled is None:
            if (folder / "probe.json").is_file():
                return False
            self.pretrain(run)
            self._export(run)
            self._probe(run)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return True
        if (folder / "rows.csv").is_file():
            return False
        for path in folder.iterdir():  # what an interrupted run left
            if path.name != "made_of.sha256":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
        """A pre-training, or a trial of a rate; a stopped one goes on.

        Raises:
            RunFailed: if it ends with an error, or before its last step.
        """
        plan, folder = self.plan, self.work / run.folder
        files = plan.pretrain_files(run.network, run.arm)
        steps = int(self._costs(run.network, run.arm)["iterations"])
        settings: dict[str, Any] = {
            "dataset_dir": self.work / "scans.json",
            "store_dir": self.store(files),
            "output_dir": folder,
            "seed": run.seed,
            "probe_every": steps + 1,  # the untrained encoder alone; the exported one is probed afterwards
        }
        if plan.budget:
            settings["iterations"] = steps
        if rate := run.rate or self._chosen(run):
            settings["learning_rate"] = rate
        words = bundle_words(PRETRAIN, [*files, self._split(choosing=run.rate is not None)], settings)
        execute(words, folder / "pretrain.log")
        done = max((line["step"] for line in read_log(folder)), default=0)
        if done < steps:
            raise RunFailed(f"{folder}: was stopped after {done} of {steps} steps; the next sweep goes on.")

    def _chosen(self, run: Run) -> float | None:
        if not self.plan.choose:
            return None
        chosen = json.loads((self.work / "chosen.json").read_text(encoding="utf-8"))
        rate: float | None = chosen[f"{run.network}/{run.arm}"]["rate"]
        if rate is None:
            raise RunFailed(f"{run.arm}, {run.network}: no learning rate that was tried ended well.")
        return rate

    def _probe(self, run: Run) -> dict[str, Any]:
        """Measure the encoder that is exported; ``probe.json`` has the figures, untrained and trained, and those of each patient."""
        folder = self.work / run.folder
        told = in_process(
            _probe_run, folder / "probe.log", folder, self._split(run.rate is not None), folder / "probe.json"
        )
        if told is not None:
            raise RunFailed(f"{folder}: {told}")
        found: dict[str, Any] = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
        return found

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
        settings: dict[str, Any] = {
            "dataset_dir": self.work / "labelled.json",
            "output_dir": folder,
            "ckpt_dir": folder,
            "labelled": run.labelled,
            "seed": run.seed,
            "fold_seed": run.seed,
            "validate::dataset::data": [],  # the last network is scored, not the best on the patients that score it
        }
        if self.plan.arms[run.arm]:
            encoder = self.work / Run(run.network, run.arm, run.seed).folder / "encoder.safetensors"
            if not encoder.is_file():
                raise RunFailed(f"{run.arm}, {run.network}: its pre-training of seed {run.seed} failed.")
            settings["pretrained"] = encoder
        assert run.way is not None
        words = bundle_words(self.plan.bundle, self.plan.finetune_files(run.network, run.way), settings)
        execute(words, folder / "finetune.log")
        last = torch.load(folder / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)[
            "trainer"
        ]
        if last["iteration"] < last["max_epochs"] * last["epoch_length"]:
            raise RunFailed(
                f"{folder}: was stopped after {last['iteration']} steps; the next sweep begins it again."
            )


def execute(words: Sequence[str], log: Path) -> None:
    """``python -m WORDS`` in a process of its own, its command and output in a file.

    The process is forked, so that a sweep of many short runs imports torch and MONAI once. It ends with this one.

    Raises:
        RunFailed: naming the log and its last line, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"python -m {shlex.join(words)}\n")
    process = multiprocessing.get_context("fork").Process(target=_as_command, args=(list(words), log))
    process.start()
    process.join()
    if process.exitcode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(f"{log}: exit code {process.exitcode}; it ends with: {shown(lines[-1])}")


def _into(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def _as_command(words: list[str], log: Path) -> None:
    end_with_parent()
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
    end_with_parent()
    _into(log)
    try:
        function(*arguments)
        sending.send(None)
    except Exception as error:
        message = plain_message(error)
        sending.send(message if message is not None else f"{type(error).__name__}: {error} (see {log})")
        raise


def _scans_of(source: Path) -> list[Scan]:
    """The scans of a folder, datalist or manifest."""
    return Manifest.load(source).scans() if is_manifest(source) else list_scans(source)


def _build(files: list[str], overrides: dict[str, str]) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(files)
    for key, value in overrides.items():
        parser.set(value, key)
    parser.get_parsed_content("store")


def _probe_run(folder: Path, split: Path, to: Path) -> None:
    """Figures of the encoder that a run exports, on the scans that its split holds back."""
    run = load_run(folder)
    held = json.loads(split.read_text(encoding="utf-8"))["split"][1]
    options = {name: run.summary[name] for name in ("crop_size", "window_hu")}
    probe = encoder_probe(VolumeStore(run.summary["store_dir"]), held, **options)
    if probe is None:
        raise AliceError("a probe needs scans of two patients; let the patterns take more of them.")
    trained = probe(run.student.encoder)
    first = next(line for line in read_log(folder) if line["step"] == 0)
    found = {
        "step": run.iteration,
        "untrained": {k: first.get(f"probe/{k}") for k in FIGURES},
        "trained": {k: trained.get(k) for k in FIGURES},
        "by_patient": probe.by_patient,
    }
    write_text(to, json.dumps(found, indent=1))


def _measure(files: list[str], overrides: dict[str, str], to: Path, made_of: str) -> None:
    """What a step of a pre-training takes on this machine."""
    made = {figure.name: figure.value for figure in estimate(files, overrides).figures}
    costs = {
        "made_of": made_of,
        "iterations": made["iterations"],
        "crops a step": made["crops a step"],
        "seconds a step": 3600 * (made["hours"] or 0.0) / (made["iterations"] or 1.0),
        "flops a step": 1e12 * (made["TFLOP a step"] or 0.0),
        "parameters": made["parameters, encoder"],
        "parameters trained": made["parameters, trained"],
    }
    write_text(to, json.dumps(costs, indent=1))


def _without(label: Path, values: Sequence[int], to: Path) -> Path:
    """A copy of a label map with some values made background.

    Raises:
        AliceError: for a label that is no NIfTI.
    """
    if not to.is_file():
        if not label.name.endswith((".nii", ".nii.gz")):
            raise AliceError(f"{label}: drop_labels needs labels in NIfTI.")
        found = nib.load(label)
        voxels = np.asarray(found.dataobj)
        to.parent.mkdir(parents=True, exist_ok=True)
        draft = to.with_name(f"draft-{os.getpid()}-{to.name}")
        kept = np.where(np.isin(voxels, values), 0, voxels).astype(np.uint16)
        nib.save(nib.Nifti1Image(kept, found.affine), draft)
        os.replace(draft, to)
    return to
