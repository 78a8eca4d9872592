"""What an experiment of docs/experiments is: its plan, its runs, and the command line of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

REPO = Path(__file__).resolve().parents[1]
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
        drop_labels: label values that become background, in training and in the references, and are not scored.
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
    def scored(self) -> list[str]:
        """The organs that are compared: all but those whose labels are dropped."""
        kept = enumerate(self.organs, start=1)
        return [organ for value, organ in kept if value not in self.drop_labels]

    @property
    def digest(self) -> str:
        """Of all settings that make the runs; not of what is compared."""
        names = sorted({"task.yaml", "finetune.yaml", *(n for files in self.arms.values() for n in files)})
        made_by = [self.bundle, self.held_back, self.drop_labels, *(self._read(name) for name in names)]
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def _read(self, name: str) -> dict[str, Any]:
        return dict(ConfigParser.load_config_file(config_of(self.folder, name)))


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
        if not config_of(folder, name).is_file():
            raise ValueError(
                f"{path}: names {name}, which is neither beside it nor a config of alice_pretrain."
            )
    if strange := sorted({arm for pair in plan.compare for arm in pair} - set(plan.arms)):
        raise ValueError(f"{path}: compares {strange}; its arms are {sorted(plan.arms)}.")
    return plan


def config_of(folder: Path, name: str) -> Path:
    """An override beside the plan, else one that the pre-training bundle has."""
    beside = folder / name
    return beside if beside.is_file() else bundle_config("alice_pretrain", name)


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
        *(config_of(plan.folder.resolve(), name) for name in plan.arms[run.arm]),
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
