import zipfile

from conftest import REPO

from custom.release import package, show


def test_zips_are_the_same_every_time_and_hold_what_runs_and_nothing_else(tmp_path):
    bundles = tmp_path / "bundles"
    source = REPO / "bundles" / "alice_pretrain"
    for file in source.rglob("*"):
        if file.is_file() and "models" not in file.parts:
            target = bundles / "alice_pretrain" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (bundles / "alice_pretrain" / "runs").mkdir()
    (bundles / "alice_pretrain" / "runs" / "log.jsonl").write_text("private")
    first, second = (package(tmp_path / name, bundles)[0] for name in ("a", "b"))
    assert first.name == "alice_pretrain_v0.1.0.zip" and first.read_bytes() == second.read_bytes()
    names = set(zipfile.ZipFile(first).namelist())
    assert {
        "alice_pretrain/configs/train.yaml",
        "alice_pretrain/custom/alice/losses.py",
        "alice_pretrain/LICENSE",
    } <= names
    assert not any("runs" in name or "__pycache__" in name for name in names)
    assert first.name in (tmp_path / "a" / "SHA256SUMS").read_text()


def test_a_config_is_shown_one_line_a_value():
    lines = show(REPO / "bundles" / "alice_pretrain" / "configs" / "train.yaml").splitlines()
    assert "crop_size: [192, 192, 64]" in lines and "network_def::hidden_size: 768" in lines
