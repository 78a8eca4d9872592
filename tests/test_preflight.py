import subprocess
import sys

import pytest
from conftest import REPO

from custom.bundles.preflight import ConfigKeyError, check_files, check_keys, preflight, speak_plainly
from custom.data.errors import ScanError
from custom.data.scans import list_scans
from custom.data.store.volume_store import StoreError
from custom.errors import plain_message

COMPLETE = {
    "lr": 1.0,
    "net": {"_target_": "x.Net", "width": 3},
    "train": {"handlers": [{"_target_": "H", "every": 2}]},
}


@pytest.mark.parametrize(
    "key",
    [
        "lr",
        "net::width",
        "net#depth",
        "train::handlers::0::every",
        "+train::handlers",
        "train::handlers::0::new",
    ],
)
def test_keys_that_exist_and_new_arguments_of_objects_pass(key):
    check_keys(COMPLETE, {key: 1}, "here")


@pytest.mark.parametrize(
    "key, message",
    [
        ("lrr", "'lrr' is no setting.*mean 'lr'"),
        ("net::width::deep", "no setting"),
        ("train::handler", "mean 'handlers'"),
        ("train::handlers::3", "no setting"),
        ("nett::width", "mean 'net'"),
    ],
)
def test_misspelt_keys_are_named_with_what_was_meant(key, message):
    with pytest.raises(ConfigKeyError, match=f"here: .*{message}"):
        check_keys(COMPLETE, {key: 1}, "here")


def test_a_new_argument_must_be_one_that_the_object_takes():
    config = {"head": {"_target_": "custom.methods.heads.ProjectionHead", "width": 3}}
    check_keys(config, {"head::bottleneck": 8}, "here")
    with pytest.raises(ConfigKeyError, match="'head::botleneck' is no setting.*mean 'bottleneck'"):
        check_keys(config, {"head::botleneck": 8}, "here")


def test_outside_of_a_run_nothing_is_judged():
    preflight()


def test_only_our_own_errors_are_said_in_one_line(tmp_path):
    try:
        try:
            list_scans(tmp_path / "nowhere")
        except ScanError as error:
            raise RuntimeError("wrapped by MONAI") from error
    except RuntimeError as wrapped:
        assert plain_message(wrapped).endswith("Set dataset_dir to a folder of scans or a JSON.")
    try:
        int("x")
    except ValueError as foreign:
        assert plain_message(foreign) is None


def test_an_error_that_a_loaders_worker_passed_on_is_said_in_one_line():
    text = "Caught StoreError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    passed_on = StoreError(
        text + "custom.data.store.volume_store.StoreError: a.b2nd: damaged. Build it again.\n"
    )
    assert plain_message(passed_on) == "a.b2nd: damaged. Build it again."


def test_an_uncaught_error_of_ours_is_said_in_one_line_and_a_bug_as_python_says_it(monkeypatch, capsys):
    bugs = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: bugs.append(error[0]))
    speak_plainly()
    for error in (ScanError("no.nii: empty. Remove it."), KeyError("x")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "alice: no.nii: empty. Remove it.\n" and bugs == [KeyError]


@pytest.mark.slow
def test_an_uncaught_error_of_ours_ends_a_program_with_one_line():
    code = "from custom.bundles.preflight import speak_plainly; speak_plainly(); from custom.data.scans import list_scans; list_scans('/nowhere')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines() == [
        "alice: /nowhere: no such folder or datalist. Set dataset_dir to a folder of scans or a JSON."
    ]


def test_an_override_of_what_an_earlier_file_replaced_is_named(tmp_path):
    """smoke.yaml sizes the ViT; after swin.yaml, which puts another network there, it would fail deep inside MONAI."""
    files = {
        "train.yaml": "net: {_target_: monai.networks.nets.ViT, in_channels: 1}\nsteps: 3\n",
        "swin.yaml": "net: {_target_: monai.networks.nets.SwinUNETR, in_channels: 1}\n",
        "smoke.yaml": "net::hidden_size: 48\nsteps: 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ordered = [str(tmp_path / name) for name in ("train.yaml", "smoke.yaml", "swin.yaml")]
    check_files(ordered, {})
    ordered[1:] = ordered[:0:-1]
    with pytest.raises(ConfigKeyError, match=r"smoke\.yaml: 'net::hidden_size' is no setting"):
        check_files(ordered, {})


def test_a_bug_keeps_its_traceback_and_an_error_for_users_is_one_line():
    program = "from custom.bundles.preflight import speak_plainly; speak_plainly(); {}"
    bug = "from custom.encoders.patches import unpatchify; import torch; unpatchify(torch.zeros(1, 8, 8), (2, 2), (2, 2, 2))"
    meant = "from custom.methods.views import Masking; Masking(2.0)"
    ends = [
        subprocess.run([sys.executable, "-c", program.format(code)], capture_output=True, text=True, cwd=REPO)
        for code in (bug, meant)
    ]
    assert all(end.returncode == 1 for end in ends)
    assert "Traceback" in ends[0].stderr and "not enough values to unpack" in ends[0].stderr
    assert ends[1].stderr.strip() == "alice: hidden_ratio must be in [0, 1), got 2.0."
