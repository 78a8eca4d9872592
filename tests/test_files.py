"""Files written completely or not at all."""

import hashlib
import os
import stat

import pytest

from custom.errors import AliceError
from custom.files import is_plain_name, replacing, sha256_of_file, stays_inside, write_text


class OtherError(AliceError):
    pass


def test_an_error_on_the_way_leaves_what_was_there_and_no_draft(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "before\n")
    with pytest.raises(ZeroDivisionError), replacing(path) as draft:
        draft.write_text(f"half {1 / 0}" if draft.write_text("half") else "")
    assert path.read_bytes() == b"before\n" and list(path.parent.iterdir()) == [path]


def test_the_place_changes_only_at_the_end(tmp_path):
    path = tmp_path / "a"
    with replacing(path, sync=True) as draft:
        draft.write_bytes(b"\x00whole")
        assert not path.exists() and draft.parent == tmp_path and draft.suffix == ".tmp"
    assert path.read_bytes() == b"\x00whole" and list(tmp_path.iterdir()) == [path]


def test_a_failure_names_the_file_the_cause_and_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OtherError, match=r"file/a: cannot be written \(.*\)\. Give another folder\."):
        write_text(tmp_path / "file" / "a", "", error=OtherError, advice="Give another folder.")
    with (
        pytest.raises(AliceError, match=r"b: cannot be written \(full\)"),
        replacing(tmp_path / "b", failures=(OSError, RuntimeError)),
    ):
        raise RuntimeError("full")
    with pytest.raises(RuntimeError, match="a bug"), replacing(tmp_path / "b"):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "b", error=None):
        raise FileNotFoundError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_data_are_on_the_disk_before_the_file_is_moved(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append("sync"))
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("move"), move(*names)))
    write_text(tmp_path / "a", "x", sync=True)
    write_text(tmp_path / "b", "x")
    assert done == ["sync", "move", "move"]


def test_a_file_may_be_read_by_whom_the_system_lets(tmp_path):
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "a") as draft:
        draft.touch()
        draft.chmod(0o600)  # as safetensors does
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_the_checksum_is_that_of_all_bytes(tmp_path):
    content = os.urandom((1 << 20) + 7)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["case_1.2", "Fall-7 (ä)", "..a", "s-0f", "名"])
def test_plain_names_are_taken(name):
    assert is_plain_name(name) and stays_inside(name) and stays_inside(f"a/b c/{name}.nii.gz")


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "../a", "/a", "a\\b", "..\\a", "a\0", None, 7, ["a"]]
)
def test_names_that_lead_elsewhere_are_not_plain(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("path", ["../a", "a/../../b", "a/..", "/a", "\\a", "a\\..\\..\\b", "\0", None, 7])
def test_paths_that_leave_their_folder_are_told(path):
    assert not stays_inside(path)
