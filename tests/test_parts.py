import json

import pytest
from conftest import write_scan

from custom.data.errors import ScanError
from custom.data.scans import list_scans
from custom.data.store.build import build_part, build_store
from custom.data.store.build_parts import parse, share
from custom.data.store.volume_store import StoreError, VolumeStore

SPACING = (6.0, 6.0, 8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for i in range(5):
        write_scan(folder / f"p{i}.nii.gz", i)
    return folder


def test_parts_are_disjoint_and_make_the_whole_whatever_the_order(folder):
    scans = list_scans(folder)
    parts = [share(scans, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(s.name for part in parts for s in part) == [s.name for s in scans]
    assert [share(scans[::-1], f"{i}/3") for i in (1, 2, 3)] == parts
    assert share(scans, None) == scans and parse("2/3") == (2, 3)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(folder, tmp_path, part):
    with pytest.raises(ValueError, match="part must be i/n"):
        build_part(folder, tmp_path / "s", part, SPACING, progress=False)


def test_the_last_part_completes_the_store_as_one_build_would(folder, tmp_path):
    assert build_part(folder, tmp_path / "s", "2/3", SPACING, progress=False) is None
    with pytest.raises(StoreError, match="index.json is missing"):
        VolumeStore(tmp_path / "s")
    assert build_part(folder, tmp_path / "s", "3/3", SPACING, progress=False) is None
    made = build_part(folder, tmp_path / "s", "1/3", SPACING, progress=False)
    plain = build_store(folder, tmp_path / "plain", SPACING, progress=False)
    assert made is not None and made.check() == {} and made.names == plain.names
    for key in ("settings", "volumes", "refused", "patient_pattern"):
        assert (
            json.loads((made.path / "index.json").read_text())[key]
            == json.loads((plain.path / "index.json").read_text())[key]
        ), key


def test_a_part_leaves_the_others_unfinished_files_alone(folder, tmp_path):
    theirs = tmp_path / "s" / "volumes" / "p1.hu.b2nd.77.tmp"  # p1 is of part 2/2
    ours = tmp_path / "s" / "volumes" / "p0.hu.b2nd.77.tmp"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half")
    ours.write_bytes(b"half")
    build_part(folder, tmp_path / "s", "1/2", SPACING, progress=False)
    assert theirs.is_file() and not ours.is_file()


def test_parts_with_other_settings_are_refused(folder, tmp_path):
    build_part(folder, tmp_path / "s", "1/2", SPACING, progress=False)
    with pytest.raises(StoreError, match=r"built with {'spacing': \[6.0, 6.0, 8.0\]}"):
        build_part(folder, tmp_path / "s", "2/2", (5.0, 5.0, 5.0), progress=False)
    with pytest.raises(StoreError, match="crop_margin_mm"):
        build_part(folder, tmp_path / "s", "2/2", SPACING, progress=False, crop_body=False)


def test_what_one_part_refused_counts_for_all(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "a_bad.nii.gz").write_bytes(b"")  # of part 1/2
    (tmp_path / "z_bad.nii.gz").write_bytes(b"")  # seventh: of part 1/2 too
    with pytest.raises(ScanError, match=r"2 of 7 scans cannot be used, 1 allowed"):
        build_part(tmp_path, tmp_path / "s", "1/2", SPACING, bad_scans_allowed=1, progress=False)
    assert build_part(tmp_path, tmp_path / "s", "1/2", SPACING, bad_scans_allowed=2, progress=False) is None
    made = build_part(tmp_path, tmp_path / "s", "2/2", SPACING, bad_scans_allowed=2, progress=False)
    assert made is not None and made.names == [f"p{i}" for i in range(5)]
    assert set(json.loads((made.path / "report.json").read_text())["refused"]) == {"a_bad", "z_bad"}


def test_a_plain_build_afterwards_has_nothing_to_do_but_the_index(folder, tmp_path):
    build_part(folder, tmp_path / "s", "1/2", SPACING, progress=False)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*.b2nd")}
    store = build_store(folder, tmp_path / "s", SPACING, progress=False)
    assert len(store) == 5 and all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
