"""One walk of a folder for every command: what is passed over, in silence or with a word."""

import json
from pathlib import Path

import pytest
from conftest import write_scan
from damage import good_volume, mha_bytes, write_nifti, write_series

from custom.data.errors import ScanError
from custom.data.folder_walk import holds_dicom, kind_of, scan_files, walk
from custom.data.intake.scan_folder import scan_folder
from custom.data.scans import list_scans
from custom.data.store.build import build_store
from custom.evaluation.scores.case_files import find_references

APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)


def mac_folder(folder: Path) -> Path:
    """Two scans, and what macOS, editors and file systems leave beside them."""
    for i in range(2):
        write_nifti(folder / "images" / f"case{i}.nii.gz", good_volume(i))
    for name in ("images/._case0.nii.gz", "__MACOSX/images/._case1.nii.gz", "__MACOSX/case1.nii.gz", ".DS_Store",
                 ".Trash/old.nii.gz", "images/.nfs0001.nii.gz", "images/.case1.nii.gz.part", "._scan.dcm"):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(APPLE)
    return folder


def test_what_a_mac_leaves_is_passed_over_everywhere(tmp_path, caplog):
    folder = mac_folder(tmp_path / "d")
    names = ["case0.nii.gz", "case1.nii.gz"]
    assert [p.name for p in scan_files(folder)] == names
    assert [s.image.name for s in list_scans(folder)] == names and not caplog.text
    assert [Path(r.path).name for r in scan_folder(folder, progress=False).records] == names
    assert [r.path.name for r in find_references(folder)] == names
    assert build_store(folder, tmp_path / "s", (3.0, 3.1, 4.0), progress=False).names == ["case0", "case1"]


@pytest.mark.parametrize("change", [{}, {"suffix": ""}, {"suffix": ".1234"}, {"suffix": ".IMA"}])
def test_dicom_is_not_dropped_without_a_word(tmp_path, caplog, change):
    slices = write_series(tmp_path / "d" / "series")
    for path in slices if change else []:
        path.rename(path.with_suffix(change["suffix"]))
    with pytest.raises(
        ScanError, match=r"no scan found.* 23 DICOM file\(s\) in 1 folder.*alice scan .*manifest"
    ):
        list_scans(tmp_path / "d")
    write_nifti(tmp_path / "d" / "case.nii.gz")
    assert len(list_scans(tmp_path / "d")) == 1
    assert "passed over 23 DICOM file(s) in 1 folder(s), series/slice000" in caplog.text
    assert f"alice scan {tmp_path / 'd'} -o manifest.json, then give manifest.json" in caplog.text


def test_other_formats_and_what_cannot_be_opened_are_told(tmp_path, caplog):
    write_nifti(tmp_path / "case.nii.gz")
    (tmp_path / "more.zip").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("no scan")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    assert len(list_scans(tmp_path)) == 1
    assert "passed over 1 file(s) of formats that are not read, more.zip" in caplog.text
    assert "passed over 1 file(s) that cannot be opened, gone.nii.gz" in caplog.text
    assert "notes.txt" not in caplog.text


def test_links_are_followed_once_and_may_lead_out_only_where_that_is_allowed(tmp_path):
    write_nifti(tmp_path / "far" / "b.nii.gz")
    write_nifti(tmp_path / "d" / "a.nii.gz")
    (tmp_path / "d" / "out").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d", target_is_directory=True)
    assert [p.name for p in scan_files(tmp_path / "d")] == ["a.nii.gz", "b.nii.gz"]
    folders = list(walk(tmp_path / "d", leave=False))
    assert [e.name for f in folders for e in f.files] == ["a.nii.gz"]
    problems = {p.name: r.value for f in folders for p, r in f.problems}
    assert problems == {"out": "leaves_folder", "loop": "symlink_loop"}


def test_names_tell_what_files_may_hold(tmp_path):
    kinds = {"a.nii.gz": "scan", "A.MHD": "scan", "a.dcm": "dicom", "IM0001": "maybe dicom", "1.2.840.5": "maybe dicom",
             "a.npz": "unsupported", "a.gz": "unsupported", "a.csv": "other"}  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds
    (tmp_path / "README").write_text("no scan " * 40)
    assert not holds_dicom(tmp_path / "README") and not holds_dicom(tmp_path / "missing")


def test_a_build_leaves_out_what_a_folder_holds_twice(tmp_path, caplog):
    folder = tmp_path / "d"
    for i in range(2):
        write_scan(folder / f"case{i}.nii.gz", seed=i)
    (folder / "copy_of_1.nii.gz").write_bytes((folder / "case1.nii.gz").read_bytes())  # without a label
    (folder / "another.nii.gz").write_bytes((folder / "case1.nii.gz").read_bytes())
    write_nifti(folder / "first.nii.gz", good_volume())
    (folder / "second.mha").write_bytes(mha_bytes())  # the same scan in another format
    for _ in range(2):  # a second build says the same
        caplog.clear()
        store = build_store(folder, tmp_path / "s", (3.0, 3.1, 4.0), progress=False)
        assert store.names == ["case0", "case1", "first"]
        assert caplog.text.count("the same voxels as") == 3
    assert "second.mha: the same voxels as " in caplog.text and "first.nii.gz. It is left out" in caplog.text
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert sorted(report["duplicates"]) == ["another", "copy_of_1", "second"] and report["refused"] == {}
    refused = [r.path for r in scan_folder(folder, progress=False).records if "duplicate" in r.reasons]
    assert refused == ["another.nii.gz", "copy_of_1.nii.gz", "second.mha"]
    (folder / "case1.nii.gz").unlink()
    (folder / "case1_label.nii.gz").unlink()
    assert build_store(folder, tmp_path / "s", (3.0, 3.1, 4.0), progress=False).names == [
        "another",
        "case0",
        "first",
    ]
