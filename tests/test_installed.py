"""The package as others get it: a wheel in an empty environment, with the bundles; and a clash of names."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPO

import alice_monai
from custom.bundles.release import list_bundles
from custom.bundles.shipped import bundles_folder, get_bundle, shipped_sam
from custom.cli.main import COMMANDS, main
from custom.errors import AliceError

NAMES = ["alice_pretrain", "alice_seg_btcv", "alice_seg_flare", "sam_landmarks"]


def test_bundles_are_found_and_listed(capsys):
    assert bundles_folder() == REPO / "bundles" and Path(shipped_sam()).is_file()
    main(["bundle", "list"])
    told = capsys.readouterr().out
    assert all(name in told for name in NAMES) and "0.1.0" in told and "MiB of weights" in told


def test_a_bundle_is_copied_whole_or_not_at_all(tmp_path, capsys):
    main(["bundle", "get", "sam_landmarks", str(tmp_path / "mine")])
    made = tmp_path / "mine" / "sam_landmarks"
    assert f"{made}: " in capsys.readouterr().out
    assert {p.name for p in made.iterdir()} >= {"configs", "models", "docs", "LICENSE"}
    assert not (made / "custom").exists() and (made / "models" / "model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["sam_landmarks"]
    with pytest.raises(AliceError, match=r"sam_landmarks: is there already"):
        get_bundle("sam_landmarks", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AliceError, match="cannot be written"):
        get_bundle("sam_landmarks", tmp_path / "file")


@pytest.mark.parametrize("words, told", [
    (["get", "alice_seg"], "alice_seg: there is no such bundle; known: alice_pretrain, "),
    (["get"], "name a bundle"),
    (["fetch", "sam_landmarks"], "bundle fetch: is not known"),
    (["list", "sam_landmarks"], "alice bundle get sam_landmarks DIR"),
])  # fmt: skip
def test_what_bundle_does_not_take_is_said(capsys, words, told):
    with pytest.raises(SystemExit):
        main(["bundle", *words])
    assert told in capsys.readouterr().err


def test_another_package_called_custom_is_told_at_once(tmp_path):
    assert alice_monai.clash() == ""
    for name, text in {"custom/__init__.py": "", "custom/models.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = "import alice_monai; alice_monai.main()"
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        f"alice: another package called 'custom' ({tmp_path / 'custom' / '__init__.py'})"
    )


def test_two_packages_in_one_folder_and_none_at_all_are_told(tmp_path, monkeypatch):
    theirs = tmp_path / "custom"
    shutil.copytree(REPO / "custom" / "transfer", theirs / "transfer")
    (theirs / "__init__.py").write_text("# of somebody")
    for name in [name for name in sys.modules if name.split(".")[0] == "custom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(
        sys, "meta_path", [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", str(f))]
    )
    assert "another package called 'custom'" in alice_monai.clash()
    shutil.rmtree(theirs)
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert "is missing; install alice-monai again" in alice_monai.clash()


# -- the wheel ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of what git would hold, built without the network."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("alice_monai", "custom", "bundles"):
        shutil.copytree(
            REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "runs", "*.tmp")
        )
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
    ):
        shutil.copy(REPO / name, source)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment that holds the wheel, and sees the other packages of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
    ]
    subprocess.run([*map(str, command)], check=True)
    # a line of a .pth is put on the path; .pth files in there, such as of an editable install, are not read
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return folder


def run(installed, *words, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")} | env
    return subprocess.run(
        [str(installed / "bin" / words[0]), *map(str, words[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=clean,
    )


@pytest.mark.slow
def test_the_wheel_holds_every_bundle_and_nothing_else_of_the_tree(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"alice_monai", "custom", "alice_monai-0.1.0.dist-info"}
    for bundle in list_bundles(REPO / "bundles"):
        inside = {n for n in names if n.startswith(f"alice_monai/bundles/{bundle.name}/")}
        for part in ("configs", "docs", f"scripts_{bundle.name}"):
            held = {
                p.name
                for p in (bundle / part).glob("*")
                if p.is_file() and p.name not in ("train.json", "inference.json")
            }
            assert held <= {Path(n).name for n in inside if f"/{part}/" in n}
        assert any(n.endswith(("model.safetensors", "model.pt")) for n in inside)


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree(installed, tmp_path):
    where = run(installed, "python", "-c", "import custom; print(custom.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(installed))
    listed = run(installed, "alice", "bundle", "list", cwd=tmp_path)
    assert all(name in listed.stdout for name in NAMES), listed.stderr
    code = "from custom.cli.main import COMMANDS, command; print([command(n).__name__ for n in COMMANDS])"
    assert run(installed, "python", "-c", code, cwd=tmp_path).returncode == 0 and COMMANDS
    assert run(installed, "alice", "bundle", "get", "alice_pretrain", "mine", cwd=tmp_path).returncode == 0
    assert (
        run(
            installed,
            "alice",
            "phantom",
            "phantoms",
            "--n",
            "4",
            "--size",
            "small",
            "--canonical",
            "False",
            cwd=tmp_path,
        ).returncode
        == 0
    )
    files = str([f"mine/alice_pretrain/configs/{name}" for name in ("train.yaml", "smoke.yaml")])
    done = run(installed, "python", "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files, "--bundle_root", "mine/alice_pretrain",
               "--dataset_dir", "phantoms", "--iterations", "2", "--output_dir", "run", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(installed, "alice", "export", "run", "--to", "hf", "--format", "hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["network_type"]
    code = "from custom.transfer import from_pretrained; print(type(from_pretrained('hf')).__name__)"
    assert "Masked" in run(installed, "python", "-c", code, cwd=tmp_path).stdout
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "__init__.py").write_text("")
    clash = run(installed, "alice", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert clash.returncode == 1 and clash.stderr.startswith("alice: another package called 'custom'")
