"""Zips: the same every time, nothing private in them, and they run where nothing of ours is installed."""

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPO, write_scan
from monai.bundle import ConfigParser
from safetensors.torch import load_file, save_file

from custom.bundles.copies import copies, needs_own_code, write_copies
from custom.bundles.release import MODEL_INFO, has_weights, list_bundles, model_info, package, show, unpack
from custom.errors import AliceError

# `python -m monai.bundle ...` of somebody who does not have this package: the installed copy is hidden,
# one that lies beside the configs (on sys.path) is found.
STRANGER = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", str(f))]
sys.path = [p for p in sys.path if p != {repo!r}]
try:
    import custom
    sys.exit("this package is still there: " + custom.__file__)
except ModuleNotFoundError:
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def bundle_run(*arguments, cwd):
    """``python -m monai.bundle`` where nothing of ours is installed, from another folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-W", "ignore", "-c", STRANGER.format(repo=str(REPO)), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def toy(tmp_path):
    """A folder of one bundle, as small as a bundle can be."""
    bundle = tmp_path / "bundles" / "toy"
    for name, text in {
        "configs/metadata.json": '{"version": "0.1.0"}',
        "configs/train.yaml": "# custom.methods.alice is not used here\nx: 1\n",
        "configs/extra.yaml": "network_def: {_target_: custom.encoders.nnformer.NNFormer}\n",
        "models/model.pt": "weights",
        "scripts_toy/__init__.py": "",
        "scripts_toy/__pycache__/x.pyc": "",
        "LICENSE": "free",
    }.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(text)
    return bundle


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Every bundle that has weights, zipped."""
    bundles = tmp_path_factory.mktemp("bundles")
    for bundle in list_bundles(REPO / "bundles"):
        if has_weights(bundle):
            (bundles / bundle.name).symlink_to(bundle)
    return package(tmp_path_factory.mktemp("dist"), bundles)


@pytest.fixture
def download(released, tmp_path):
    """Downloads a bundle by name over HTTP with MONAI's own command; returns its folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(released[0].parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def fetch(name):
        url = f"http://127.0.0.1:{server.server_port}/{name}_v{version_of(name)}.zip"
        bundle_run("download", "--name", name, "--url", url, "--bundle_dir", tmp_path / "hub", cwd=tmp_path)
        return tmp_path / "hub" / name

    yield fetch
    server.shutdown()
    server.server_close()


def version_of(name):
    return json.loads((REPO / "bundles" / name / "configs" / "metadata.json").read_text())["version"]


def test_zips_are_the_same_every_time_and_hold_what_runs_and_nothing_else(toy, tmp_path):
    for name in (
        "runs/log.jsonl",
        "models/model_finetuned.pt",
        "models/model.ts",
        "configs/.ipynb_checkpoints/t.yaml",
        "configs/x.tmp",
    ):
        (toy / name).parent.mkdir(exist_ok=True)
        (toy / name).write_text("private")
    first = package(tmp_path / "a", toy.parent)[0]
    os.utime(toy / "LICENSE", (0, 0))
    (toy / "LICENSE").chmod(0o600)
    second = package(tmp_path / "b", toy.parent)[0]
    assert first.name == "toy_v0.1.0.zip" and first.read_bytes() == second.read_bytes()
    kept = {"LICENSE", "models/model.pt", "scripts_toy/__init__.py"}
    kept |= {f"configs/{name}" for name in ("metadata.json", "train.yaml", "train.json", "extra.yaml")}
    assert set(zipfile.ZipFile(first).namelist()) == {f"toy/{name}" for name in kept}
    # a changed byte shows in the zip and so in its checksum
    (toy / "models" / "model.pt").write_text("Weights")
    assert package(tmp_path / "c", toy.parent)[0].read_bytes() != first.read_bytes()


def test_checksums_are_those_of_the_zips(released):
    lines = (released[0].parent / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in released]


def test_own_code_goes_only_with_bundles_that_name_it(released):
    for path in released:
        names = set(zipfile.ZipFile(path).namelist())
        folder = path.name.split("_v")[0]
        assert all(name.startswith(f"{folder}/") for name in names)
        assert {f"{folder}/LICENSE", f"{folder}/configs/metadata.json"} <= names
        assert (f"{folder}/custom/errors.py" in names) == (folder in {"alice_pretrain", "sam_landmarks"})
        assert not any("__pycache__" in name for name in names)


def test_a_comment_and_an_override_do_not_need_own_code_but_training_does(toy):
    assert not needs_own_code(toy)
    (toy / "configs" / "train.yaml").write_text("loss: {_target_: custom.methods.alice.losses.AliceLoss}\n")
    assert needs_own_code(toy)


@pytest.mark.parametrize(
    ("version", "rename", "message"),
    [
        ("../../0.1.0", None, "version like 0.1.0"),
        (None, None, "got None"),
        ("0.1.0", "toy_very", "must not hold '_v'"),
    ],
)
def test_names_that_would_escape_or_mislead_are_refused(toy, tmp_path, version, rename, message):
    (toy / "configs" / "metadata.json").write_text(json.dumps({"version": version}))
    if rename:
        toy.rename(toy.with_name(rename))
    with pytest.raises(ValueError, match=message):
        package(tmp_path / "dist", toy.parent)
    assert not (tmp_path / "dist").exists()


def test_a_link_out_of_the_bundle_is_refused(toy, tmp_path):
    (tmp_path / "secret").write_text("key")
    (toy / "docs").mkdir()
    (toy / "docs" / "data_license.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of"):
        package(tmp_path / "dist", toy.parent)


def test_a_bundle_without_weights_is_no_release(toy, tmp_path):
    (toy / "models" / "model.pt").unlink()
    with pytest.raises(ValueError, match="no weights"):
        package(tmp_path / "dist", toy.parent)
    assert model_info(toy.parent) == {}


def test_model_info_names_todays_bundles_and_versions():
    # checksums change with every edit; `make package` brings them up to date when a release is made
    told = json.loads(MODEL_INFO.read_text(encoding="utf-8"))
    assert told.keys() == model_info().keys(), f"{MODEL_INFO}: run `make package` and commit the file."
    assert all(entry["source"].endswith(f"/{name}.zip") for name, entry in told.items())
    assert all(re.fullmatch("[0-9a-f]{40}", entry["checksum"]) for entry in told.values())


def test_monai_finds_the_versions_in_model_info(monkeypatch):
    from monai.bundle import scripts

    answer = SimpleNamespace(text=MODEL_INFO.read_text(encoding="utf-8"), raise_for_status=lambda: None)
    monkeypatch.setattr(scripts, "requests", SimpleNamespace(get=lambda *_, **__: answer))
    monkeypatch.setattr(scripts, "has_requests", True)
    for name in ("alice_pretrain", "sam_landmarks"):
        found = scripts.get_bundle_versions(name, repo="owner/repo", tag="v0.1.0")
        assert found == {"latest_version": version_of(name), "all_versions": [version_of(name)]}


@pytest.mark.slow
def test_the_pretraining_zip_pretrains_from_its_own_copy_of_our_code(download, tmp_path, scans):
    bundle = download("alice_pretrain")
    configs = str([str(bundle / "configs" / name) for name in ("train.yaml", "smoke.yaml")])
    bundle_run(
        "run", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", scans,
        "--output_dir", tmp_path / "run", "--store_dir", tmp_path / "store",
        "--iterations", 2, "--batch_size", 2, "--warmup", 1, "--workers", 0, cwd=tmp_path,
    )  # fmt: skip
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 2


@pytest.mark.slow
def test_the_landmark_zip_embeds_from_its_own_copy_of_our_code(download, tmp_path):
    write_scan(tmp_path / "scans" / "case.nii.gz", seed=0)
    (tmp_path / "scans" / "case_label.nii.gz").unlink()
    bundle = download("sam_landmarks")
    bundle_run(
        "run", "--config_file", bundle / "configs" / "inference.yaml", "--bundle_root", bundle,
        "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert any((tmp_path / "out").iterdir())


def test_a_release_holds_both_forms_and_git_one(toy, tmp_path):
    state = {"b": torch.rand(3), "a": torch.rand(2, 2).half()}
    save_file(state, toy / "models" / "model.safetensors")
    torch.save({"b": state["b"], "a": state["a"] + 1}, toy / "models" / "model.pt")
    with pytest.raises(AliceError, match=r"model.pt: holds other weights than model.safetensors beside it"):
        package(tmp_path / "dist", toy.parent)
    (toy / "models" / "model.pt").unlink()
    (folder,) = unpack(tmp_path / "unpacked", toy.parent)
    assert json.loads((folder / "configs" / "train.json").read_text()) == {"x": 1}
    found = torch.load(folder / "models" / "model.pt", weights_only=True)
    other = load_file(folder / "models" / "model.safetensors")
    assert found.keys() == other.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)
    assert not (toy / "models" / "model.pt").exists() and not (toy / "configs" / "train.json").exists()
    with pytest.raises(AliceError, match=r"toy: is there already"):
        unpack(tmp_path / "unpacked", toy.parent)


def test_a_checkout_gets_the_second_form_by_one_command_as_often_as_you_like(toy):
    save_file({"a": torch.rand(2)}, toy / "models" / "model.safetensors")
    (toy / "models" / "model.pt").unlink()
    made = write_copies(toy)
    assert [path.relative_to(toy).as_posix() for path in made] == ["configs/train.json", "models/model.pt"]
    before = [path.read_bytes() for path in made]
    (toy / "configs" / "train.yaml").write_text("x: 2\n")
    write_copies(toy)
    assert json.loads(made[0].read_text()) == {"x": 2} and made[1].read_bytes() == before[1]
    (toy / "configs" / "train.yaml").write_text("loss: {_target_: custom.methods.alice.losses.AliceLoss}\n")
    made[0].unlink()
    assert copies(toy).keys() == {"models/model.pt"}  # programs that read JSON could not run this one


SEGMENTATION = [p.name for p in list_bundles(REPO / "bundles") if p.name.startswith("alice_seg")]


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_bundles_get_what_monai_label_and_load_ask_for(name):
    bundle = REPO / "bundles" / name
    made = copies(bundle)
    assert made.keys() == {"configs/train.json", "configs/inference.json", "models/model.pt"}
    for config in ("train", "inference"):
        yaml = ConfigParser.load_config_file(bundle / "configs" / f"{config}.yaml")
        assert json.loads(made[f"configs/{config}.json"]) == yaml


def test_the_landmark_bundle_opens_in_monais_tools_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(monai.bundle.scripts, "download", None)
    bundle = tmp_path / "sam_landmarks"
    shutil.copytree(REPO / "bundles" / "sam_landmarks", bundle)
    write_copies(bundle)
    state = monai.bundle.load("sam_landmarks", bundle_dir=str(tmp_path))
    shipped = load_file(bundle / "models" / "model.safetensors")
    assert state.keys() == shipped.keys() and all(torch.equal(state[k], v) for k, v in shipped.items())
    files = {
        "meta_file": str(bundle / "configs/metadata.json"),
        "config_file": str(bundle / "configs/inference.yaml"),
    }
    monai.bundle.verify_net_in_out(net_id="fine_map", **files, device="cpu", bundle_root=str(bundle))


def test_the_documented_installation_brings_what_a_segmentation_bundle_needs():
    page = (REPO / "docs" / "releases.md").read_text(encoding="utf-8")
    extras, more = re.search(r"`pip install \"monai\[(.+)\]\"`\n.+; to train, add `(.+)`", page).groups()
    known = {
        m[2]: m[1].lower()
        for line in requires("monai")
        if (m := re.match(r"([\w-]+).*extra == \"(\w+)\"", line))
    }
    brought = {known[extra] for extra in extras.split(",")} | set(more.split())
    for name in SEGMENTATION:
        metadata = json.loads((REPO / "bundles" / name / "configs" / "metadata.json").read_text())
        needed = {package.lower() for package in metadata["required_packages_version"]}
        assert needed <= brought, name
        assert "einops" in needed


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_segmentation_zip_segments_with_nothing_of_ours(name, download, tmp_path):
    if not has_weights(REPO / "bundles" / name):
        pytest.skip(f"{name} ships no weights yet")
    write_scan(tmp_path / "scans" / "case.nii.gz", seed=0)
    (tmp_path / "scans" / "case_label.nii.gz").unlink()
    bundle = download(name)
    assert not (bundle / "custom").exists()
    bundle_run(
        "run", "--config_file", next((bundle / "configs").glob("inference.*")), "--bundle_root", bundle,
        "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    (mask,) = Path(tmp_path / "out").rglob("*.nii.gz")
    scan, mask = nib.load(tmp_path / "scans" / "case.nii.gz"), nib.load(mask)
    assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-3)
    assert mask.get_data_dtype() == np.uint8


def test_a_config_is_shown_one_line_a_value():
    lines = show(REPO / "bundles" / "alice_pretrain" / "configs" / "train.yaml").splitlines()
    assert "crop_size: [192, 192, 64]" in lines and "network_def::hidden_size: 768" in lines
