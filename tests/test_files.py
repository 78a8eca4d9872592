"""Files written completely or not at all."""

import hashlib
import os
import pickle
import stat

import pytest
import safetensors.torch
import torch

from custom.errors import AliceError
from custom.files import (
    Mapped,
    is_plain_name,
    read_json,
    read_text,
    read_torch,
    replacing,
    sha256_of_file,
    stays_inside,
    write_text,
)


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


def as_windows(text: str, encoding: str) -> bytes:
    return text.replace("\n", "\r\n").encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # Notepad, and PowerShell's >
def test_text_of_any_system_is_read(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes(as_windows('{"a":\n ["ä", 1]}\n', encoding))
    assert read_text(tmp_path / "a.json") == '{"a":\n ["ä", 1]}\n'
    assert read_json(tmp_path / "a.json") == {"a": ["ä", 1]}


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "Expecting value"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 text"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
def test_what_is_no_json_is_said_in_one_line(tmp_path, content, why):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(OtherError, match=rf"a\.json: .*{why}.* Make another\.") as caught:
        read_json(tmp_path / "a.json", error=OtherError, advice="Make another.")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(AliceError, match=r"gone\.json: cannot be read \(No such file"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(AliceError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)


def test_what_torch_saved_is_read_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": torch.arange(3)}, path)
    assert read_torch(path)["x"].tolist() == [0, 1, 2]
    torch.save({"x": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    assert read_torch(path)["x"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    weights = safetensors.torch.save({"x": torch.arange(3)})
    for content in (b"", b"x", whole[:40], whole[:-30], weights, pickle.dumps(os.system), b"{" * 100_000):
        path.write_bytes(content)
        with pytest.raises(
            OtherError, match=r"a\.pt: not readable as weights \(.+\)\. Make another\.$"
        ) as caught:
            read_torch(path, error=OtherError, advice="Make another.")
        assert "\n" not in str(caught.value)


def test_a_mapped_file_that_was_cut_short_is_noticed_and_a_replaced_one_is_not(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    mapped = Mapped(path)
    mapped.require_whole()
    os.truncate(path, 200)
    mapped.require_whole()
    os.truncate(path, 99)
    with pytest.raises(OSError, match="cut short from 100 to 99 bytes"):
        mapped.require_whole()
    (tmp_path / "b").write_bytes(b"short")
    os.replace(tmp_path / "b", path)  # the old file is still what is mapped
    mapped.require_whole()
    path.unlink()
    mapped.require_whole()


def test_the_cause_is_told_that_torch_hides(tmp_path):
    def write():
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    with (
        pytest.raises(AliceError, match=r"a: cannot be written \(No space left on device\)"),
        replacing(tmp_path / "a", failures=(OSError, RuntimeError)),
    ):
        write()
