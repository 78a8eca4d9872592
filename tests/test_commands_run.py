"""The commands of the documentation, run on tiny phantoms in a copy of the repository."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPO
from documented import Command, all_commands

PHANTOMS = "{root}/phantoms"
SMALL = "['bundles/alice_pretrain/configs/train.yaml','bundles/alice_pretrain/configs/smoke.yaml']"


@dataclass(frozen=True)
class Trial:
    """How a command is made small.

    Args:
        part: the command is the next one of the page that contains this.
        more: what is added to it.
        instead: words of the page -> words of the trial.
    """

    part: str
    more: str = ""
    instead: dict[str, str] = field(default_factory=dict)


README = [
    Trial("alice scan", instead={"/data/ct": f"{PHANTOMS}/images"}),
    Trial("alice build", "--spacing [3,3,4]", {"--workers 8": "--workers 1"}),
    Trial("train.yaml --dataset_dir", "--iterations 4 --held_back_patients 2",
          {"bundles/alice_pretrain/configs/train.yaml": f'"{SMALL}"'}),
    Trial("alice probe"),
    Trial("alice export runs/ct --to encoder.safetensors"),
]  # fmt: skip


def segmentation(data: str, classes: str) -> list[Trial]:
    """What the page says of phantoms and of a trial's network: smoke.yaml, a datalist, an encoder of [32,32,32]."""
    small = {"configs/swin_unetr.yaml": "configs/smoke.yaml", data: f"{{root}}/{classes}.json"}
    return [
        Trial("alice phantom", instead={"PHANTOMS --n 6": "PHANTOMS --n 3"}),
        Trial("smoke.yaml", "--epochs 1", {"--dataset_dir PHANTOMS": f"--dataset_dir {{root}}/{classes}"}),
        Trial("configs/inference.yaml --dataset_dir", "--checkpoint runs/smoke/model_finetuned.pt",
              {"--config_file configs/inference.yaml": "--config_file \"['configs/inference.yaml','configs/smoke.yaml']\"",
               "SCANS": "{root}/one"}),
        Trial("alice export", "--img_size [32,32,32]", {"RUN": "{root}/work/runs/ct"}),
        Trial("--pretrained", "--epochs 1", small),
        Trial("evaluate.yaml", instead=small),
        Trial("alice score", instead={data: f"{{root}}/{classes}.json", "--split configs/folds.json ": ""}),
    ]  # fmt: skip


TRIALS = {
    "README.md": README,
    "bundles/alice_seg_flare/docs/README.md": segmentation("FLARE22", "flare22"),
    "bundles/alice_seg_btcv/docs/README.md": segmentation("BTCV", "btcv"),
    "bundles/sam_landmarks/docs/README.md": [
        Trial("inference.yaml", instead={"SCANS": "{root}/one"}),
        Trial("evaluate.yaml", "--pairs 2 --points 4 --pictures 1", {"SCANS": f"{PHANTOMS}/images"}),
        Trial("smoke.yaml", "--iterations 2", {"SCANS": f"{PHANTOMS}/images"}),
    ],
    "docs/data.md": [
        Trial("alice build manifest.json", '--spacing "[3,3,4]"',
              {"manifest.json": f"{PHANTOMS}/images", "-o store": "-o store_of_data", "--workers 8": "--workers 1"}),
        Trial("alice build --check store"),
        Trial("--part 1/8", instead={"manifest.json": f"{PHANTOMS}/images", "/shared/store": "parts"}),
        Trial("--dataset_dir manifest.json", "--measure false", {"manifest.json": f"{PHANTOMS}/images"}),
        Trial("--processes 8", "--measure false --dataset_dir {root}/phantoms/images"),
    ],
    "docs/deploy.md": [Trial("--to torchscript")],
    "docs/evaluation.md": [
        Trial("alice score PREDICTIONS", instead={"PREDICTIONS REFERENCES": f"{PHANTOMS}/labels {PHANTOMS}/labels"}),
        Trial("alice compare SCRATCH", instead={"SCRATCH ALICE": "fold0.csv fold0.csv"}),
        Trial("--names bundles", instead={"out labels": f"{PHANTOMS}/labels {PHANTOMS}/labels"}),
    ],
    "docs/experiments/README.md": [Trial("alice compare docs/")],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, datalists, and ``work``: a copy of the bundles beside links to the rest."""
    made = tmp_path_factory.mktemp("documented")
    work = made / "work"
    shutil.copytree(REPO / "bundles", work / "bundles")
    for name in ("docs", "benchmarks", "custom"):
        (work / name).symlink_to(REPO / name)
    small = "--n 6 --size small --canonical false"
    run(f"alice phantom {made}/phantoms {small}", made)
    for classes, folder in (("flare22", "phantoms"), ("btcv", "btcv")):
        if folder == "btcv":
            run(f"alice phantom {made}/btcv {small} --labels btcv", made)
        else:
            (made / "flare22").symlink_to(made / "phantoms")
        run(f"alice datalist {made}/{folder} --classes {classes} -o {made}/{classes}.json", made)
    (made / "one").mkdir()
    shutil.copy(next((made / "phantoms" / "images").iterdir()), made / "one")
    return made


def run(text: str, folder: Path) -> None:
    """Run a command; its last lines are the failure's message."""
    own = {
        "alice": [sys.executable, "-W", "ignore", "-m", "custom.cli"],
        "python": [sys.executable, "-W", "ignore"],
    }
    program, *words = shlex.split(text)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*own[program], *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


def made_small(command: Command, trial: Trial, root: Path) -> str:
    """The command as a trial runs it. A word of ``instead`` that the page lacks is a mistake of the trial."""
    text = " ".join(command.words)
    for word, other in trial.instead.items():
        assert word in text, f"{command}: no {word!r}"
        text = text.replace(word, other)
    quoted = [f'"{w}"' if w[:1] == "[" else w for w in f"{text} {trial.more}".split()]
    return " ".join(quoted).replace('""', '"').replace("{root}", str(root))


@pytest.mark.slow
@pytest.mark.parametrize("page", TRIALS)
def test_the_commands_of_a_page_run(page: str, root: Path) -> None:
    if page.startswith("bundles/alice_seg") and not (root / "work" / "runs" / "ct").exists():
        _run_page("README.md", root)  # their encoder
    _run_page(page, root)


def _run_page(page: str, root: Path) -> None:
    commands = [c for c in all_commands() if c.page == page and c.whole]
    folder = root / "work" / Path(*Path(page).parts[:2]) if page.startswith("bundles/") else root / "work"
    for trial in TRIALS[page]:
        found = [c for c in commands if trial.part in " ".join(c.words)]
        assert found, f"{page}: no command contains {trial.part!r}"
        run(made_small(found[0], trial, root), folder)
