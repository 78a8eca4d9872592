"""What a comparison of methods is: its plan, its runs, and the config files of each."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from custom.bundles.shipped import bundles_folder
from custom.errors import AliceError

PRETRAIN = "alice_pretrain"
UNITS = ("crops", "seconds", "flops")
FIGURES = {"retrieval": 1, "linear": 1, "place_mm": -1}  # of the probe; 1 where more is better
Labelled = int | float  # patients, or a share of them; as ``labelled`` of the segmentation bundles


@dataclass(frozen=True)
class Plan:
    """A comparison, from its plan.yaml; see docs/compare_methods.md.

    Attributes:
        folder: where plan.yaml and its overrides lie.
        held_back: regular expression on names of cases: these are reported and never trained on.
        arms: name -> override files of pre-training; ``[train.yaml]`` is the bundle as it stands, none is from scratch.
        seeds: of pre-training, of fine-tuning, and of who is labelled.
        bundle: of segmentation; used if ``labelled`` names any.
        labelled: how many patients are labelled; none compares the encoders by the probe alone.
        pretrain: override files of every arm, before the arm's own.
        networks: name -> ``{pretrain: [...], finetune: [...]}``, override files of that network.
        ways: name -> override files of fine-tuning.
        budget: ``{crops: N}``, ``{seconds: N}`` or ``{flops: N}`` that each pre-training spends; without it the configs say.
        choose: ``{learning_rate: [...], scans: REGEX, by: retrieval | linear | place_mm}``: every arm tries these rates without
            the scans that match, and is measured on them; the best one is used. Without it the configs say.
        compare: pairs of arms, A and B; by default the first arm with each other one.
        drop_labels: label values that become background, in training and in the references, and are not scored.
        published: lines about figures of others, to stand below the tables.
    """

    folder: Path
    held_back: str
    arms: dict[str, list[str]]
    seeds: list[int]
    bundle: str = "alice_seg_btcv"
    labelled: list[Labelled] = field(default_factory=list)
    pretrain: list[str] = field(default_factory=list)
    networks: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"unetr": {}})
    ways: dict[str, list[str]] = field(default_factory=lambda: {"tuned": []})
    budget: dict[str, float] = field(default_factory=dict)
    choose: dict[str, Any] = field(default_factory=dict)
    compare: list[list[str]] = field(default_factory=list)
    drop_labels: list[int] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[list[str]]:
        """Arms that are compared."""
        first, *others = self.arms
        return self.compare or [[first, other] for other in others]

    @property
    def rates(self) -> list[float]:
        """Learning rates that every arm tries."""
        return [float(rate) for rate in self.choose.get("learning_rate", [])]

    @property
    def organs(self) -> list[str]:
        """In the order of the label's value: the task's, else the bundle's."""
        settings = self.settings(bundle_config(self.bundle, "train.yaml"), *self.task)
        return list(settings["labels"])

    @property
    def scored(self) -> list[str]:
        """The organs that are compared: all but those whose labels are dropped."""
        kept = enumerate(self.organs, start=1)
        return [organ for value, organ in kept if value not in self.drop_labels]

    @property
    def task(self) -> list[Path]:
        """What is segmented: an override of training and of inference, if the plan has one."""
        return [path for path in [self.folder / "task.yaml"] if path.is_file()]

    def pretrain_files(self, network: str, arm: str) -> list[Path]:
        """The config files of a pre-training."""
        names = [*self.networks[network].get("pretrain", []), *self.pretrain, *self.arms[arm]]
        return [
            self.file(PRETRAIN, name) for name in ["train.yaml", *(n for n in names if n != "train.yaml")]
        ]

    def finetune_files(self, network: str, way: str) -> list[Path]:
        """The config files of a fine-tuning."""
        of_network = [self.file(self.bundle, name) for name in self.networks[network].get("finetune", [])]
        short = [path for path in [self.folder / "finetune.yaml"] if path.is_file()]
        of_way = [self.file(self.bundle, name) for name in self.ways[way]]
        return [bundle_config(self.bundle, "train.yaml"), *of_network, *self.task, *short, *of_way]

    def inference_files(self, network: str) -> list[Path]:
        """The config files that segment scans."""
        of_network = [self.file(self.bundle, name) for name in self.networks[network].get("finetune", [])]
        return [bundle_config(self.bundle, "inference.yaml"), *of_network, *self.task]

    def file(self, bundle: str, name: str) -> Path:
        """An override beside the plan, else one of a bundle."""
        beside = (self.folder / name).resolve()
        return beside if beside.is_file() else bundle_config(bundle, name)

    @staticmethod
    def settings(*files: Path) -> dict[str, Any]:
        """Top-level keys of config files, the last one first."""
        found: dict[str, Any] = {}
        for path in files:
            found |= ConfigParser.load_config_file(path)
        return found

    @property
    def digest(self) -> str:
        """Of what decides which scans have which role, and which labels are used."""
        return digest_of(self.held_back, self.choose.get("scans"), self.drop_labels)


def digest_of(*parts: Any) -> str:
    """A sha256 of plain values; of a path, of the settings in the file, so that order and contents count, and comments do not."""
    read = [Plan.settings(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()


def read_plan(path: str | Path) -> Plan:
    """The plan of a comparison.

    Args:
        path: plan.yaml, or its folder.

    Raises:
        AliceError: naming the file, for a key, unit, figure or kind of value that is unknown or missing, for an override or an
            arm that is not there, and for patients in two roles.
    """
    path = Path(path)
    path = path / "plan.yaml" if path.is_dir() else path
    if not path.is_file():
        raise AliceError(
            f"{path}: no such file; name a plan.yaml (docs/compare_methods.md says what stands in it)."
        )
    content = ConfigParser.load_config_file(path)
    if problem := _problem_of_content(content):
        raise AliceError(f"{path}: {problem}.")
    content |= _numbers(content)
    content |= {
        key: {name: one or [] for name, one in content[key].items()}
        for key in ("arms", "ways")
        if key in content
    }
    if "networks" in content:
        content["networks"] = {name: one or {} for name, one in content["networks"].items()}
    plan = Plan(folder=path.parent, **content)
    if problem := _problem_of_plan(plan):
        raise AliceError(f"{path}: {problem}.")
    return plan


def _numbers(content: dict[str, Any]) -> dict[str, Any]:
    """Budget and rates as numbers: YAML takes 1e9 and 1e-3 for text."""

    def number(value: Any) -> Any:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    read: dict[str, Any] = {}
    if "budget" in content:
        read["budget"] = {unit: number(value) for unit, value in content["budget"].items()}
    if isinstance(rates := content.get("choose", {}).get("learning_rate"), list):
        read["choose"] = content["choose"] | {"learning_rate": [number(rate) for rate in rates]}
    return read


def _problem_of_content(content: Any) -> str:
    if not isinstance(content, dict):
        return "holds no settings"
    known = {f.name: str(f.type) for f in fields(Plan) if f.name != "folder"}
    if strange := sorted(set(content) - set(known)):
        return f"unknown keys {strange}; a plan has {sorted(known)}"
    if missing := [key for key in ("held_back", "arms", "seeds") if not content.get(key)]:
        return f"lacks {missing}"
    kinds = {"str": str, "list": list, "dict": dict}
    for key, value in content.items():
        wanted = known[key].partition("[")[0]
        if not isinstance(value, kinds[wanted]):
            return f"{key} is {value!r}, which is no {wanted}"
    if content.get("choose") and not content["choose"].get("scans"):
        return f"choose is {content['choose']}; it needs scans, a regular expression on names"
    for key in ("held_back", "choose"):
        pattern = content.get(key, "") if key == "held_back" else content.get(key, {}).get("scans", "")
        try:
            re.compile(str(pattern))
        except re.error as error:
            return f"{key}: {pattern!r} is no regular expression ({error})"
    return ""


def _problem_of_plan(plan: Plan) -> str:
    for what, names in (("arm", plan.arms), ("network", plan.networks), ("way", plan.ways)):
        if not names:
            return f"has no {what}"
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                return f"{what} {name!r}: take letters, digits, '_', '-', '.' and '+'; it names folders"
        if len({str(name).lower() for name in names}) < len(names):
            return f"two {what}s have one name but for capitals, and some disks do not tell them apart"
    if not plan.seeds or not all(_whole(seed) and seed >= 0 for seed in plan.seeds):
        return f"seeds are {plan.seeds}; give whole numbers"
    if not all((_whole(n) and n > 0) or (isinstance(n, float) and 0 < n <= 1) for n in plan.labelled):
        return f"labelled is {plan.labelled}; give numbers of patients, or shares as 0.1"
    for key, values in (
        ("seeds", plan.seeds),
        ("labelled", plan.labelled),
        ("choose::learning_rate", plan.choose.get("learning_rate", [])),
    ):
        if len(set(map(str, values))) < len(values):
            return f"{key} names one value twice: {values}"
    if not all(_whole(value) and value > 0 for value in plan.drop_labels):
        return f"drop_labels is {plan.drop_labels}; give label values"
    if any(not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1] for pair in plan.compare):
        return "compare holds pairs of different arms"
    if strange := sorted({str(arm) for pair in plan.compare for arm in pair} - set(plan.arms)):
        return f"compares {strange}; its arms are {sorted(plan.arms)}"
    return _problem_of_spending(plan) or _problem_of_files(plan)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problem_of_spending(plan: Plan) -> str:
    if plan.budget and (len(plan.budget) != 1 or next(iter(plan.budget)) not in UNITS):
        return f"budget is {plan.budget}; give one of {', '.join(UNITS)}"
    if any(not isinstance(n, int | float) or not 0 < n < math.inf for n in plan.budget.values()):
        return f"budget is {plan.budget}; give a number above 0"
    if plan.choose:
        wanted = {"learning_rate", "scans", "by"}
        if set(plan.choose) != wanted:
            return f"choose has {sorted(plan.choose)}; it needs {sorted(wanted)}"
        if plan.choose["by"] not in FIGURES:
            return f"choose::by is {plan.choose['by']!r}; the probe has {', '.join(FIGURES)}"
        rates = plan.choose["learning_rate"]
        if (
            not isinstance(rates, list)
            or not rates
            or not all(isinstance(r, int | float) and r > 0 for r in rates)
        ):
            return f"choose::learning_rate is {rates!r}; give rates that every arm tries"
    return ""


def _problem_of_files(plan: Plan) -> str:
    for what, lists in (("arm", plan.arms), ("way", plan.ways), ("pretrain", {"": plan.pretrain})):
        for name, files in lists.items():
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                return f"{what} {name}: give a list of override files, as [mae.yaml]; got {files!r}"
    for network, of in plan.networks.items():
        if not isinstance(of, dict) or not all(isinstance(files, list) for files in of.values()):
            return f"network {network}: give {{pretrain: [...], finetune: [...]}}; got {of!r}"
        if not of and network != "unetr":
            return f"network {network}: give its override files, {{pretrain: [...], finetune: [...]}}; without any it is UNETR"
    wanted = [(PRETRAIN, name) for files in [plan.pretrain, *plan.arms.values()] for name in files]
    for network, of in plan.networks.items():
        if strange := sorted(set(of) - {"pretrain", "finetune"}):
            return f"network {network}: unknown keys {strange}; it has pretrain and finetune"
        wanted += [(PRETRAIN, name) for name in of.get("pretrain", [])]
        wanted += [(plan.bundle, name) for name in of.get("finetune", [])]
    if plan.labelled:
        wanted += [(plan.bundle, name) for files in plan.ways.values() for name in files]
        if not bundle_config(plan.bundle, "train.yaml").is_file():
            return f"bundle {plan.bundle!r} is not there"
    for bundle, name in wanted:
        if not plan.file(bundle, name).is_file():
            return f"names {name}, which is neither beside it nor a config of {bundle}"
    return ""


def bundle_config(bundle: str, name: str) -> Path:
    """A config file of a bundle."""
    return bundles_folder() / bundle / "configs" / name


@dataclass(frozen=True)
class Run:
    """One pre-training (``labelled`` is None) or one fine-tuning; with ``rate`` a trial of a learning rate."""

    network: str
    arm: str
    seed: int
    labelled: Labelled | None = None
    way: str | None = None
    rate: float | None = None

    @property
    def folder(self) -> Path:
        """In WORK; ``seed`` stands in it as ``alice compare`` reads it."""
        if self.rate is not None:
            return Path("tried") / self.network / self.arm / f"rate{self.rate:g}" / f"seed{self.seed}"
        kind = "pretrain" if self.labelled is None else f"{self.way}_labelled-{labelled_name(self.labelled)}"
        return Path("runs") / self.network / self.arm / kind / f"seed{self.seed}"


def labelled_name(labelled: Labelled) -> str:
    """3, all, 10pc: for the names of files."""
    if isinstance(labelled, int):
        return str(labelled)
    return "all" if labelled == 1.0 else f"{100 * labelled:g}pc"


def trials_of(plan: Plan) -> Iterator[Run]:
    """Pre-trainings that choose a learning rate: equally many for every arm."""
    for network in plan.networks:
        for arm in trained_arms(plan):
            yield from (Run(network, arm, plan.seeds[0], rate=rate) for rate in plan.rates)


def runs_of(plan: Plan) -> Iterator[Run]:
    """All runs in order: one seed after the other, and in each the pre-trainings first."""
    for seed in plan.seeds:
        for network in plan.networks:
            yield from (Run(network, arm, seed) for arm in trained_arms(plan))
            for labelled in plan.labelled:
                for way in plan.ways:
                    yield from (Run(network, arm, seed, labelled, way) for arm in plan.arms)


def trained_arms(plan: Plan) -> list[str]:
    """The arms that are pre-trained."""
    return [arm for arm, files in plan.arms.items() if files]


def bundle_words(bundle: str, files: Sequence[Path], settings: Mapping[str, Any]) -> list[str]:
    """``monai.bundle run ...``."""
    words = ["monai.bundle", "run", "--config_file", str([str(path) for path in files])]
    words += [
        "--bundle_root",
        str(bundles_folder() / bundle),
        "--logging_file",
        str(bundle_config(bundle, "logging.conf")),
    ]
    return words + [word for key, value in settings.items() for word in (f"--{key}", str(value))]
