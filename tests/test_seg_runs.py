"""Segmentation runs: one at a time in a folder, and how long they still take."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ignite.engine import Engine
from seg_bundles import FLARE, TRIAL, configs, parser_of


@pytest.fixture
def scripts():
    return parser_of("train").get_parsed_content("scripts")


def write_lock(folder, **holder):
    """A lock as another process of this machine leaves it; its parent lives."""
    locks = parser_of("train").get_parsed_content("scripts").locks
    (folder / "training.lock").write_text(json.dumps(locks._process(os.getppid()) | holder))


def test_a_folder_is_taken_once_and_given_back_at_the_end(tmp_path, scripts):
    code = "import sys; sys.path.insert(0, sys.argv[2]); from scripts_alice_seg_flare import locks; print(locks.take(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(tmp_path / "new"), str(FLARE)]
    assert subprocess.check_output(words, text=True).strip() == "[]"
    assert not list((tmp_path / "new").iterdir())
    write_lock(tmp_path)  # this process's parent lives
    (told,) = scripts.locks.take(str(tmp_path))
    assert (
        f"process {os.getppid()} on {socket.gethostname()} trains in {tmp_path}" in told
        and "another output_dir" in told
    )
    assert json.loads((tmp_path / "training.lock").read_text())["pid"] == os.getppid()


@pytest.mark.parametrize(
    "case", ["ended", "number given anew", "own", "elsewhere and quiet", "another container, quiet"]
)
def test_a_lock_whose_holder_is_gone_is_taken_over(tmp_path, scripts, case):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = {
        "ended": {"pid": ended.pid},
        "number given anew": {"start": "1"},
        "own": {"pid": os.getpid()},
        "elsewhere and quiet": {"host": "another"},
        "another container, quiet": {"container": "pid:[1]", "pid": os.getpid()},
    }[case]
    write_lock(tmp_path, **holder)
    if "quiet" in case:
        assert scripts.locks.take(str(tmp_path)), "it was touched a moment ago"
        os.utime(tmp_path / "training.lock", (1e9, 1e9))
    assert scripts.locks.take(str(tmp_path)) == []
    assert json.loads((tmp_path / "training.lock").read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["training.lock"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path, scripts):
    (tmp_path / "file").touch()
    (told,) = scripts.locks.take(str(tmp_path / "file" / "run"))
    assert "cannot be written" in told and "another output_dir" in told


def test_other_processes_of_a_run_do_not_ask(tmp_path, scripts, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_lock(tmp_path)
    assert scripts.locks.take(str(tmp_path)) == []


@pytest.mark.slow
def test_a_second_training_in_a_folder_is_refused_before_it_writes(cohort, tmp_path):
    write_lock(tmp_path)
    settings = TRIAL | {"dataset_dir": cohort, "output_dir": tmp_path, "ckpt_dir": tmp_path}
    words = ["-m", "monai.bundle", "run", "--config_file", str(configs("train")), "--bundle_root", str(FLARE)]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "trains in" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "checkpoints").exists()


def test_progress_tells_epochs_cases_and_the_time_left(scripts, capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(scripts.progress.time, "monotonic", lambda: clock.now)

    def step(engine, batch):
        clock.now += 60.0

    evaluator = Engine(step)
    scripts.progress.Progress("case").attach(evaluator)
    evaluator.run(range(3))
    assert capsys.readouterr().out.splitlines() == [
        "alice_seg: case 1 of 3, 60 s each, 2 min left",
        "alice_seg: case 2 of 3, 60 s each, 60 s left",
        "alice_seg: case 3 of 3, 60 s each",
    ]
    trainer = Engine(step)
    scripts.progress.Progress("epoch").attach(trainer)
    trainer.run(range(100), max_epochs=2)
    assert capsys.readouterr().out.splitlines()[0].endswith("epoch 1 of 2, 6e+03 s each, 1.7 h left")


@pytest.mark.parametrize("name", ["train", "inference", "evaluate", "ensemble"])
def test_every_run_tells_its_progress(name):
    assert "scripts.progress.Progress" in (FLARE / "configs" / f"{name}.yaml").read_text()
