"""From a folder to a manifest: what is found, what every kind of damage is answered with, and what is never told."""

import gzip
import json
import os
import re
import time
import zlib
from pathlib import Path

import fsspec
import itk
import nibabel as nib
import numpy as np
import pytest
from damage import (
    DAMAGES,
    SHAPE,
    dicom_bytes,
    good_affine,
    good_nifti,
    good_volume,
    mha_bytes,
    nrrd_bytes,
    write_nifti,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.cli.scan_summary import summary
from custom.data.errors import ScanError
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import ACCEPTED, REJECTED, WARNED, Reason
from custom.data.intake import examine_all
from custom.data.intake.examine import run_job
from custom.data.intake.fingerprint import near_pairs
from custom.data.intake.ids_and_labels import name_all
from custom.data.intake.scan_folder import Manifest, ManifestError, exit_code, scan_folder
from custom.data.intake.scan_record import PROFILES, Job, Rules, ScanRecord
from custom.data.scan_page import intake_page
from custom.data.scans import hint_at_phases, list_scans

SEEDS = Path(__file__).parent / "seeds"
KEEPS_ONE = {"the_same_in_two_formats", "the_same_with_noise", "series_twice"}  # of two good scans, one stays


def scan(folder, **options) -> Manifest:
    return scan_folder(folder, progress=False, **options)


def by_path(manifest) -> dict:
    return {record.path: record for record in manifest.records}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Three good scans in three formats, a label, a DICOM series, a note and a damaged file."""
    folder = tmp_path_factory.mktemp("mixed") / "scans"
    write_nifti(folder / "p1" / "ct.nii.gz", good_volume(1))
    write_nifti(folder / "p1" / "ct_label.nii.gz", (good_volume(1) > 200).astype(np.uint8))
    (folder / "Bär & Söhne").mkdir()
    (folder / "Bär & Söhne" / "case 2.nrrd").write_bytes(nrrd_bytes(good_volume(2)))
    (folder / "case3.mha").write_bytes(mha_bytes(good_volume(3)))
    write_series(folder / "dicom", volume=good_volume(4))
    (folder / "README").write_text("notes")
    (folder / "notes.txt").write_text("notes")
    (folder / "broken.nii.gz").write_bytes(b"")
    return folder


# -- what is found --------------------------------------------------------------------------------------


def test_a_folder_of_everything_is_told_apart(mixed):
    manifest = scan(mixed)
    found = by_path(manifest)
    assert {path: (r.kind, r.format, r.status) for path, r in found.items()} == {
        "Bär & Söhne/case 2.nrrd": ("image", "nrrd", ACCEPTED),
        "broken.nii.gz": ("image", "nifti", REJECTED),
        "case3.mha": ("image", "metaimage", ACCEPTED),
        "dicom": ("image", "dicom", ACCEPTED),
        "p1/ct.nii.gz": ("image", "nifti", ACCEPTED),
        "p1/ct_label.nii.gz": ("label", "nifti", ACCEPTED),
    }
    assert found["p1/ct.nii.gz"].label == "p1/ct_label.nii.gz"
    assert found["p1/ct.nii.gz"].patient == found["p1/ct_label.nii.gz"].patient
    assert len({record.patient for record in manifest.usable}) == 4
    assert manifest.others == {".txt": 1}
    assert "4 patients can be used" in summary(manifest)
    assert re.search(
        r"alice build at 1.5 x 1.5 x 2 mm: up to [\d.]+ [MG]B of disk, about \d+ min", summary(manifest)
    )


def test_scans_taken_for_one_patients_are_told_with_the_way_out(tmp_path):
    (tmp_path / "cohort").mkdir()
    for phase in ("arterial", "venous"):
        nib.save(
            nib.Nifti1Image(good_volume(len(phase)), good_affine()), tmp_path / "cohort" / f"{phase}.nii.gz"
        )
    told = summary(scan(tmp_path, patient_pattern="(cohort)"))
    assert "1 patient can be used" in told and "All 2 scans are taken for one patient's" in told
    assert "--patient_pattern" in told
    assert "--patient_pattern" not in summary(scan(tmp_path, patient_pattern="(arterial|venous)"))


def test_phases_that_count_as_patients_are_told_with_the_way_out(tmp_path, caplog):
    for i, place in enumerate(("p1/arterial", "p1/venous", "p2/arterial", "p2/venous", "p3/venous")):
        write_nifti(tmp_path / place / "ct.nii.gz", good_volume(i))
    told = summary(scan(tmp_path))
    assert "5 patients can be used" in told
    assert "p1/arterial and p1/venous, are taken for a patient each. If p1 is one patient, say so: " in told
    option = re.search(r"--patient_pattern '(.*)'", told)[1]
    right = summary(scan(tmp_path, patient_pattern=option))
    assert "3 patients can be used" in right and "--patient_pattern" not in right
    assert {s.patient for s in list_scans(tmp_path, option)} == {"p1", "p2", "p3"} and not caplog.text
    assert len({s.patient for s in list_scans(tmp_path)}) == 5 and "--patient_pattern" in caplog.text


@pytest.mark.parametrize(
    "places",
    [
        ["a/p1.nii.gz", "a/p2.nii.gz", "b/p3.nii.gz"],
        ["siteA/train/c1.nii.gz", "siteA/train/c2.nii.gz", "siteA/test/c3.nii.gz", "siteB/train/c4.nii.gz",
         "siteB/train/c5.nii.gz", "siteB/test/c6.nii.gz"],
        ["p1/day1/ct.nii.gz", "p2/day2/ct.nii.gz"],
        ["x/p1/ct.nii.gz", "x/p2/ct.nii.gz", "x/p3/ct.nii.gz"],
    ],
)  # fmt: skip
def test_folders_that_are_no_phases_are_left_alone(places):
    assert hint_at_phases((place, f"patient {place}") for place in places) == ""


def test_a_label_without_an_image_is_named(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "gone_label.nii.gz", (good_volume() > 0).astype(np.uint8))
    assert re.search(r"1  orphan_label .*\n +gone_label.nii.gz$", summary(scan(tmp_path)))


def test_a_record_says_what_the_scan_holds(mixed):
    record = by_path(scan(mixed))["p1/ct.nii.gz"]
    assert (
        record.shape == list(SHAPE) and record.spacing_mm == [3.0, 3.1, 4.0] and record.orientation == "LPS"
    )
    np.testing.assert_allclose(record.affine, good_affine())
    volume = good_volume(1)
    assert (record.values["min"], record.values["max"]) == (volume.min(), volume.max())
    assert record.values["mean"] == pytest.approx(volume.mean(), abs=0.01)
    assert sum(record.histogram) == pytest.approx(1, abs=1e-3)
    assert (record.modality, record.profile) == ("CT", "ct")
    np.testing.assert_allclose(record.body_mm, [0.8 * 111, 0.7 * 127.1, 92], atol=12)


@pytest.mark.parametrize("name, content", [("a.nrrd", nrrd_bytes), ("a.mha", mha_bytes)])
def test_our_readers_agree_with_itk(tmp_path, name, content):
    (tmp_path / name).write_bytes(content())
    ours = open_scan(tmp_path / name)
    volume, affine = by_itk(tmp_path / name)
    np.testing.assert_array_equal(ours.raw, volume)
    np.testing.assert_allclose(ours.affine, affine)
    np.testing.assert_array_equal(volume, good_volume())


@pytest.mark.parametrize(
    "space, signs",
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("LPS", (-1, -1, 1)),
        ("RAS", (1, 1, 1)),
        ("LAS", (-1, 1, 1)),
    ],
)
def test_the_space_of_a_nrrd_says_which_way_its_axes_point(tmp_path, space, signs):
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(space=space))
    affine = open_scan(tmp_path / "a.nrrd").affine
    stored = np.array([[3, 0, 0, -55], [0, 3.1, 0, -60], [0, 0, 4, -46]])  # as in the file's header
    np.testing.assert_allclose(affine[:3], np.array(signs)[:, None] * stored)
    np.testing.assert_allclose(affine, by_itk(tmp_path / "a.nrrd")[1])


def by_itk(path):
    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return itk.array_from_image(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK speaks LPS


def test_a_turned_metaimage_is_placed_as_itk_places_it(tmp_path):
    content = mha_bytes(TransformMatrix="0 1 0 -1 0 0 0 0 1")
    (tmp_path / "a.mha").write_bytes(content)
    np.testing.assert_allclose(open_scan(tmp_path / "a.mha").affine, by_itk(tmp_path / "a.mha")[1])


def test_scaled_nifti_reads_as_nibabel_reads_it(tmp_path):
    path = write_nifti(
        tmp_path / "a.nii.gz",
        header=lambda h: (h.__setitem__("scl_slope", 2), h.__setitem__("scl_inter", -5)),
    )
    ours = open_scan(path)
    np.testing.assert_array_equal(ours.scaled(ours.raw), nib.load(path).get_fdata())


@pytest.mark.parametrize(("paths", "patients"), [
    (["images/FLARE22_Tr_0001_0000.nii.gz", "images/FLARE22_Tr_0002_0000.nii.gz"], ["FLARE22_Tr_0001", "FLARE22_Tr_0002"]),
    (["amos_0001.nii.gz", "amos_0002.nii.gz"], ["amos_0001", "amos_0002"]),
    (["LIDC-IDRI-0001.nii.gz", "LIDC-IDRI-0002.nii.gz"], ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]),
    (["images/volume-1.nii.gz", "images/volume-12.nii.gz"], ["volume-1", "volume-12"]),
    (["imagesTr/liver_12_0000.nii.gz", "imagesTr/liver_12_0001.nii.gz"], ["liver_12", "liver_12"]),
    (["p1/ct_1.nii.gz", "p2/ct_1.nii.gz"], ["p1", "p2"]),
    (["p1/ct.nii.gz", "p2/mr.nii.gz"], ["p1", "p2"]),
])  # fmt: skip
def test_cases_that_a_number_tells_apart_are_different_patients(paths, patients):
    records = [ScanRecord(path=path, kind="image", format="nifti") for path in paths]
    name_all(records, Rules(hash_ids=False, salt=""), None)
    assert [record.patient for record in records] == patients


def test_patients_come_from_tags_barcodes_folders_and_patterns(tmp_path):
    for i, name in enumerate(("s1/ct.nii.gz", "s2/ct.nii.gz", "TCGA-AA-0001_chest.nii.gz", "TCGA-AA-0001_abdomen.nii.gz",
                              "sub-07/ses-1/scan.nii.gz", "sub-07/ses-2/scan.nii.gz", "case_9_ct.nii.gz")):  # fmt: skip
        write_nifti(tmp_path / name, good_volume(i))
    write_series(tmp_path / "series", volume=good_volume(9), PatientID="TCGA-AA-0001")
    plain = {path: r.patient for path, r in by_path(scan(tmp_path, hash_ids=False)).items()}
    assert (plain["s1/ct.nii.gz"], plain["s2/ct.nii.gz"], plain["case_9_ct.nii.gz"]) == ("s1", "s2", "case_9")
    assert (
        plain["TCGA-AA-0001_chest.nii.gz"]
        == plain["TCGA-AA-0001_abdomen.nii.gz"]
        == plain["series"]
        == "TCGA-AA-0001"
    )
    assert plain["sub-07/ses-1/scan.nii.gz"] == plain["sub-07/ses-2/scan.nii.gz"] == "sub-07"
    hidden = {path: r.patient for path, r in by_path(scan(tmp_path, salt="a")).items()}
    assert hidden["series"] == hidden["TCGA-AA-0001_chest.nii.gz"] and hidden["series"].startswith("p-")
    other = {path: r.patient for path, r in by_path(scan(tmp_path, salt="b")).items()}
    assert not set(hidden.values()) & set(other.values())
    asked = by_path(scan(tmp_path, hash_ids=False, patient_pattern=r"(s\d)/"))
    assert asked["s1/ct.nii.gz"].patient == "s1" and asked["series"].patient == "TCGA-AA-0001"


def test_profiles_take_their_own_modality(tmp_path):
    write_nifti(tmp_path / "brain_mr.nii.gz", np.maximum(good_volume(5) // 2 + 500, 0).astype(np.int16))
    write_nifti(tmp_path / "ct.nii.gz")
    assert [r.path for r in scan(tmp_path).usable] == ["ct.nii.gz"]
    assert [r.path for r in scan(tmp_path, profile="mr").usable] == ["brain_mr.nii.gz"]
    assert {r.path: r.profile for r in scan(tmp_path, profile="zscore").usable} == {
        "brain_mr.nii.gz": "mr",
        "ct.nii.gz": "ct",
    }
    assert set(PROFILES) == {"ct", "mr", "zscore"}


# -- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_given_its_reason_and_nothing_damaged_is_accepted(tmp_path, name):
    folder = tmp_path / "scans"
    folder.mkdir()
    DAMAGES[name].make(folder)
    manifest = scan(folder)
    assert any(DAMAGES[name].reason.value in record.reasons for record in manifest.records), manifest.records
    accepted = [record.path for record in manifest.records if record.status == ACCEPTED]
    assert len(accepted) == (name in KEEPS_ONE), accepted
    assert not list(tmp_path.rglob("*.tmp"))


def test_there_are_many_kinds_of_damage_and_every_reason_is_met():
    assert len(DAMAGES) >= 140
    elsewhere = {Reason.LEAK, Reason.NEAR_LEAK, Reason.PATIENT_LEAK, Reason.NO_BODY}
    assert {kind.reason for kind in DAMAGES.values()} == set(Reason) - elsewhere


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    for name in (
        "promises_gigabytes",
        "promises_terabytes",
        "nrrd_promises_gigabytes",
        "mha_promises_gigabytes",
    ):
        (tmp_path / name).mkdir()
        DAMAGES[name].make(tmp_path / name)
    tracemalloc.start()
    assert {code for r in scan(tmp_path).records for code in r.reasons} == {"too_large"}
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_limit_on_size_is_kept(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    write_series(tmp_path / "series", volume=good_volume(3))
    manifest = scan(tmp_path, most_bytes=10_000)
    assert [record.reasons for record in manifest.records] == [["too_large"]] * 2


def test_an_unreadable_folder_is_told_and_the_rest_is_read(tmp_path, monkeypatch):
    write_nifti(tmp_path / "open" / "a.nii.gz")
    write_nifti(tmp_path / "shut" / "b.nii.gz")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = by_path(scan(tmp_path))
    assert found["shut"].reasons == ["unreadable"] and found["open/a.nii.gz"].status == ACCEPTED


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.nii.gz")
    assert scan(tmp_path).records[0].reasons == ["unreadable"]


def test_names_that_are_no_utf8_survive(tmp_path):
    odd = os.fsdecode(b"caf\xe9.nii.gz")
    write_nifti(tmp_path / "scans" / odd)
    manifest = scan(tmp_path / "scans", output=tmp_path / "m.json")
    loaded = Manifest.load(tmp_path / "m.json")
    assert [r.path for r in loaded.usable] == [odd]
    intake_page(manifest).write(tmp_path / "page.html")


def test_links_inside_the_folder_are_walked_once(tmp_path):
    write_nifti(tmp_path / "real" / "a.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    manifest = scan(tmp_path)
    assert len(manifest.records) == 1 and manifest.others == {"linked folder": 1}


def test_a_body_is_wanted(tmp_path):
    volume = good_volume()
    volume[volume > -600] = -900
    volume[3, 4, 5] = 100
    write_nifti(tmp_path / "a.nii.gz", volume)
    record = scan(tmp_path).records[0]
    assert record.status == REJECTED or record.body_mm, record


GOOD = {
    "case.nii": (lambda folder: good_nifti(folder), 352),
    "case.nrrd": (lambda folder: nrrd_bytes(), 260),
    "case.mha": (lambda folder: mha_bytes(), 330),
    "slice.dcm": (lambda folder: dicom_bytes(good_volume()[:, :, 9], Position="1\\2\\3"), 800),
}
EDITS = st.lists(
    st.tuples(st.integers(0, 799), st.binary(min_size=1, max_size=4), st.booleans()), min_size=1, max_size=4
)


def examine(folder: Path, name: str) -> list:
    """Records of one file, by way of what a worker runs."""
    kind = "folder" if name.endswith(".dcm") else "file"
    records, jobs = run_job(Job(folder, name if kind == "file" else ".", kind, "", (name,)), Rules())
    return records + [record for job in jobs for record in run_job(job, Rules())[0]]


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(edits=EDITS)
def test_no_header_raises_whatever_its_bytes(tmp_path_factory, name, edits):
    folder = tmp_path_factory.mktemp("fuzz")
    make, header_size = GOOD[name]
    content = bytearray(make(folder))
    for place, patch, insert in edits:
        place %= header_size
        content[place : place if insert else place + len(patch)] = patch
    (folder / name).write_bytes(content)
    for record in examine(folder, name):
        assert record.status in (ACCEPTED, WARNED, REJECTED)
        assert record.reasons != ["reader_failed"] or name == "slice.dcm", record.detail


@pytest.mark.parametrize("seed", sorted(SEEDS.iterdir()), ids=lambda path: path.name)
def test_headers_that_once_stopped_the_examination_no_longer_do(tmp_path, seed):
    voxels = good_volume().tobytes(order="F")
    body = {".nii": voxels, ".nrrd": gzip.compress(voxels), ".mha": zlib.compress(voxels)}
    name = f"case{seed.suffix}"
    (tmp_path / name).write_bytes(seed.read_bytes() + body.get(seed.suffix, b""))
    (record,) = examine(tmp_path, name)
    assert "reader_failed" not in record.reasons, record


# -- the same scan twice --------------------------------------------------------------------------------


def test_equal_scans_are_found_across_formats_and_orientations(tmp_path):
    write_nifti(tmp_path / "b.nii.gz")
    (tmp_path / "c.nrrd").write_bytes(nrrd_bytes())
    flipped = good_affine() @ np.diag([-1.0, 1, 1, 1])
    write_nifti(tmp_path / "d.nii.gz", good_volume()[::-1], flipped)
    write_series(tmp_path / "series")
    write_nifti(tmp_path / "e_label.nii.gz", (good_volume() > 200).astype(np.uint8))
    write_nifti(tmp_path / "e.nii.gz")
    manifest = scan(tmp_path)
    found = by_path(manifest)
    kept = found["e.nii.gz"]
    assert kept.status == ACCEPTED  # the one with a label
    for name in ("b.nii.gz", "c.nrrd", "d.nii.gz", "series"):
        assert found[name].reasons == ["duplicate"] and found[name].duplicate_of == kept.id


def test_a_series_in_several_folders_is_refused_and_a_copy_of_one_is_not(tmp_path):
    write_series(tmp_path / "spread" / "a", lambda z: {} if z < 12 else None)
    write_series(tmp_path / "spread" / "b", lambda z: {} if z >= 12 else None)
    write_series(tmp_path / "copied" / "a", volume=good_volume(1), SeriesInstanceUID="1.2.77")
    write_series(tmp_path / "copied" / "b", volume=good_volume(1), SeriesInstanceUID="1.2.77")
    write_series(tmp_path / "another", volume=good_volume(2), PatientID="MRN-9")  # a UID used again
    found = {path: r.reasons for path, r in by_path(scan(tmp_path, min_slices=5)).items()}
    assert found == {
        "spread/a": ["spread_series"],
        "spread/b": ["spread_series"],
        "copied/a": [],
        "copied/b": ["duplicate"],
        "another": [],
    }


def test_near_duplicates_share_a_patient_in_what_is_built(tmp_path):
    DAMAGES["the_same_with_noise"].make(tmp_path)
    write_nifti(tmp_path / "other.nii.gz", good_volume(8))
    manifest = scan(tmp_path)
    patients = [one.patient for one in manifest.scans()]
    assert len(patients) == 3 and len(set(patients)) == 2


def test_looks_are_compared_in_blocks():
    rng = np.random.default_rng(0)
    import base64

    hashes = [
        base64.b64encode(rng.integers(0, 256, 512, dtype=np.uint8).tobytes()).decode() for _ in range(7)
    ]
    pairs = near_pairs(hashes, [hashes[5], hashes[2]], 0.01, block=2)
    assert [(i, j) for i, j, _ in pairs] == [(2, 1), (5, 0)] or sorted((i, j) for i, j, _ in pairs) == [
        (2, 1),
        (5, 0),
    ]
    assert near_pairs([], hashes, 0.5) == []


def test_leaks_are_found_in_manifests_and_datalists(tmp_path):
    write_nifti(tmp_path / "train" / "x1.nii.gz", good_volume(1))
    write_nifti(tmp_path / "train" / "x2.nii.gz", good_volume(2))
    write_nifti(tmp_path / "train" / "TCGA-AA-0001_a.nii.gz", good_volume(3))
    write_nifti(tmp_path / "train" / "x4.nii.gz", good_volume(4))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "copy.nrrd").write_bytes(nrrd_bytes(good_volume(1)))
    noisy = good_volume(2) + np.random.default_rng(0).normal(0, 9, SHAPE)
    write_nifti(tmp_path / "test" / "noisy.nii.gz", noisy.astype(np.int16))
    write_nifti(tmp_path / "test" / "TCGA-AA-0001_b.nii.gz", good_volume(6))
    listed = [{"image": str(path.relative_to(tmp_path))} for path in sorted((tmp_path / "test").iterdir())]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    scan(tmp_path / "test", output=tmp_path / "test.json", salt="s")

    found = by_path(scan(tmp_path / "train", against=[tmp_path / "test.json"], salt="s"))
    assert {path: record.reasons for path, record in found.items()} == {
        "TCGA-AA-0001_a.nii.gz": ["patient_leak"],
        "x1.nii.gz": ["leak"],
        "x2.nii.gz": ["near_leak"],
        "x4.nii.gz": [],
    }
    assert found["x1.nii.gz"].leaks[0].startswith("test.json: s-")
    for source in (tmp_path / "list.json", tmp_path / "test"):
        found = by_path(scan(tmp_path / "train", against=[source]))
        assert [found[f"x{i}.nii.gz"].reasons for i in (1, 2, 4)] == [["leak"], ["near_leak"], []]
    with pytest.raises(ManifestError, match=r"gone\.json"):
        scan(tmp_path / "train", against=[tmp_path / "gone.json"])


# -- the file -------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_saved(mixed, tmp_path):
    manifest = scan(mixed, output=tmp_path / "deep" / "m.json")
    loaded = Manifest.load(tmp_path / "deep" / "m.json")
    assert loaded == manifest
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["m.json", "m.json.salt"]
    assert str(mixed) not in (tmp_path / "deep" / "m.json").read_text()
    for record in loaded.usable:
        volume, affine = loaded.read(record)
        assert list(volume.shape) == record.shape
        np.testing.assert_allclose(affine, record.affine, atol=1e-5)


def test_an_unchanged_folder_is_not_read_again(mixed, tmp_path, monkeypatch):
    first = scan(mixed, output=tmp_path / "m.json")
    read = []
    monkeypatch.setattr(
        examine_all, "run_job", lambda job, rules: (read.append(job.path), run_job(job, rules))[1]
    )
    assert scan(mixed, output=tmp_path / "m.json") == first
    assert set(read) <= {"."}  # the file without a suffix, looked at for DICOM's mark
    read.clear()
    extra = mixed / "extra.nii.gz"
    write_nifti(extra, good_volume(11))
    try:
        assert len(scan(mixed, output=tmp_path / "m.json").records) == len(first.records) + 1
        assert set(read) <= {".", "extra.nii.gz"}
        read.clear()
        scan(mixed, output=tmp_path / "m.json", min_slices=3)  # other rules: all anew
        assert len(read) > 5
    finally:
        extra.unlink()


def test_a_killed_run_goes_on_where_it_stopped(mixed, tmp_path, monkeypatch):
    read = []

    def dying(job, rules):
        read.append(job.path)
        if len(read) == 4:
            raise KeyboardInterrupt
        return run_job(job, rules)

    monkeypatch.setattr(examine_all, "run_job", dying)
    with pytest.raises(KeyboardInterrupt):
        scan(mixed, output=tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()
    with open(tmp_path / "m.json.partial", "a") as file:
        file.write('["cut off in the mid')
    before = list(read)
    scan(mixed, output=tmp_path / "m.json")
    assert set(before[:3]) - {"."} and not (set(before[:3]) - {"."}) & set(read[4:])
    assert (
        Manifest.load(tmp_path / "m.json").records
        == scan(mixed, salt=(tmp_path / "m.json.salt").read_text().strip()).records
    )
    assert not (tmp_path / "m.json.partial").exists()


def test_many_processes_find_what_one_finds(tmp_path):
    for i in range(3):
        write_nifti(tmp_path / f"case{i}.nii.gz", good_volume(i))
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "slice.dcm").write_bytes(dicom_bytes(good_volume()[:, :, 9], Position="1\\2\\3"))
    assert scan(tmp_path, salt="s", workers=2) == scan(tmp_path, salt="s")


def crash(job, rules):
    if "broken" in job.path:
        os._exit(11)
    time.sleep(0.05)
    return run_job(job, rules)


@pytest.mark.slow
def test_a_reader_that_kills_its_process_costs_one_scan(tmp_path, monkeypatch):
    for i in range(5):
        write_nifti(tmp_path / f"{'broken' if i == 2 else 'case'}{i}.nii.gz", good_volume(i))
    monkeypatch.setattr(examine_all, "run_job", crash)
    manifest = scan(tmp_path, workers=2)
    assert by_path(manifest)["broken2.nii.gz"].reasons == ["reader_failed"]
    assert len(manifest.usable) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="alice-manifest-0"), "this version reads"),
        (lambda c: c.update(records={}), "'records' must be a list"),
        (lambda c: c["records"][0].update(path="../../etc/passwd"), "leaves the folder"),
        (lambda c: c["records"][0].update(path="/etc/passwd"), "leaves the folder"),
        (lambda c: c["records"][0].update(path="..\\..\\etc\\passwd"), "leaves the folder"),
        (lambda c: c["records"][0].update(files=["a", "../b"]), "leaves the folder"),
        (lambda c: c["records"][0].update(label="sub/../../b"), "leaves the folder"),
        (lambda c: c["records"][0].update(id="../../x"), r"id that cannot name a file: '../../x'"),
        (lambda c: c["records"][0].update(id="/tmp/x"), "id that cannot name a file"),
        (lambda c: c["records"][0].update(id=".."), "id that cannot name a file"),
        (lambda c: c["records"][0].update(id="a\0b"), "id that cannot name a file"),
        (lambda c: c["records"][0].update(surprise=1), "unknown field 'surprise'"),
        (lambda c: c["records"][0].update(shape="tall"), "'shape' of another type"),
        (lambda c: c["records"][0].update(reasons=["whim"], status="rejected"), "unknown reason"),
        (lambda c: c["records"][0].update(status="rejected"), "which its reasons contradict"),
        (lambda c: c["records"][0].pop("status"), "lacks 'status'"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(tmp_path, change, message):
    write_nifti(tmp_path / "scans" / "a.nii.gz")
    path = scan(tmp_path / "scans").save(tmp_path / "m.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.load(path)
    assert "m.json" in str(caught.value)


def test_what_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ManifestError, match="not readable as JSON"):
        Manifest.load(tmp_path / "a.json")
    with pytest.raises(ManifestError, match="cannot be read"):
        Manifest.load(tmp_path / "gone.json")
    with pytest.raises(ManifestError, match="no such folder"):
        scan(tmp_path / "gone")
    with pytest.raises(ManifestError, match="must be one of ct, mr, zscore"):
        scan(tmp_path, profile="pet")
    with pytest.raises(ManifestError, match="not a regular expression"):
        scan(tmp_path, patient_pattern="(")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_nifti(tmp_path / "scans" / "a.nii.gz")
    path = scan(tmp_path / "scans", output=tmp_path / "m.json").save(tmp_path / "m.json")
    before = path.read_text()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ManifestError, match="No space left on device"):
        scan(tmp_path / "scans", output=tmp_path / "m.json", min_slices=3)
    assert path.read_text() == before


def test_a_manifest_at_a_url_finds_its_scans_there(mixed, tmp_path):
    path = scan(mixed, output=mixed.parent / "lists" / "m.json", salt="s").folder.parent / "lists" / "m.json"
    here = Manifest.load(path)
    assert Manifest.load(f"file://{path}") == here
    memory = fsspec.filesystem("memory")
    for file in [*mixed.rglob("*"), path]:
        if file.is_file():
            memory.pipe(f"/bucket/{file.relative_to(mixed.parent).as_posix()}", file.read_bytes())
    there = Manifest.load("memory://bucket/lists/m.json")
    assert there.records == here.records and there.remote.url == "memory://bucket/scans"
    there.remote.folder = there.folder = tmp_path / "copies"
    for mine, theirs in zip(here.scans(), there.scans(), strict=True):
        assert theirs.image.read_bytes() == mine.image.read_bytes() and theirs.image.is_relative_to(tmp_path)
    record = next(record for record in here.usable if record.format == "dicom")
    np.testing.assert_array_equal(there.read(record)[0], here.read(record)[0])
    other = scan(mixed, against=["memory://bucket/lists/m.json"], salt="s")
    assert all(
        "leak" in record.reasons for record in other.records if record.content_hash and record.kind == "image"
    )


def test_urls_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="memory://nowhere/m.json: cannot be read"):
        Manifest.load("memory://nowhere/m.json")
    with pytest.raises(ManifestError, match="no-such-protocol://a/m.json: cannot be read"):
        Manifest.load("no-such-protocol://a/m.json")
    content = {"format": "alice-manifest-1", "folder": "../../x", "rules": {}, "others": {}, "records": []}
    fsspec.filesystem("memory").pipe("/top/m.json", json.dumps(content).encode())
    with pytest.raises(ManifestError, match=r"its scans lie in '\.\./\.\./x', outside of memory://"):
        Manifest.load("memory://top/m.json")
    with pytest.raises(ManifestError, match="a folder at a URL cannot be scanned"):
        scan("memory://top")


def test_exit_codes_tell_scripts_what_to_do(tmp_path):
    write_nifti(tmp_path / "good" / "a.nii.gz")
    np.savez(tmp_path / "good" / "table.npz", a=1)
    assert exit_code(scan(tmp_path / "good")) == 0
    (tmp_path / "good" / "bad.nii.gz").touch()
    assert exit_code(scan(tmp_path / "good")) == 3
    (tmp_path / "empty").mkdir()
    assert exit_code(scan(tmp_path / "empty")) == 4


def test_nothing_that_names_a_patient_is_written(tmp_path):
    secrets = {
        "PatientName": "Mustermann^Erika",
        "PatientID": "MRN-0815-4711",
        "PatientBirthDate": "19500203",
        "StudyDate": "20240506",
        "AccessionNumber": "ACC99887766",
        "InstitutionName": "Klinikum Musterstadt",
        "StudyInstanceUID": "1.2.826.0.1.42.1",
        "SeriesInstanceUID": "1.2.826.0.1.42.2",
    }
    write_series(tmp_path / "scans" / "good", volume=good_volume(1), **secrets)
    other = secrets | {"SeriesInstanceUID": "1.2.826.0.1.42.3"}
    write_series(tmp_path / "scans" / "bad", lambda z: None if z == 5 else {}, good_volume(2), **other)
    path = write_series(tmp_path / "scans" / "cut", volume=good_volume(3), **other)[4]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ScanError):
        Manifest(tmp_path, [], {}).read(scan(tmp_path / "scans").records[0])
    manifest = scan(tmp_path / "scans", output=tmp_path / "out" / "m.json")
    intake_page(manifest).write(tmp_path / "out" / "page.html")
    (tmp_path / "out" / "summary.txt").write_text(summary(manifest))
    assert len(manifest.usable) == 1
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes().upper()
        for secret in [*secrets.values(), "MUSTERMANN", "ERIKA"]:
            assert secret.upper().encode() not in content, (file.name, secret)
    assert (tmp_path / "out" / "m.json.salt").stat().st_mode & 0o077 == 0


def test_the_page_shows_counts_refusals_and_pictures(mixed, tmp_path):
    DAMAGES["the_same_with_noise"].make(tmp_path)
    (tmp_path / "<script>.nii.gz").touch()
    html = intake_page(scan(tmp_path)).html()
    for word in (
        "empty_file",
        "near_duplicate",
        "Duplicates",
        "Middle slices",
        "HU of 2 usable CTs",
        "repeats ",
        "of disk, about",
    ):
        assert word in html
    assert "<script>.nii" not in html and html.count("<img") >= 6
    (tmp_path / "empty").mkdir()
    assert "Nothing was refused" in intake_page(scan(tmp_path / "empty")).html()


# -- the real scans -------------------------------------------------------------------------------------


def test_real_scans_are_taken_for_what_they_are(real_data, tmp_path):
    """A few of the real ones; all of them in the slow test below."""
    for name in ("tcga_lihc/dicom_two_acquisitions_one_series", "totalsegmentator/example_ct_dicom"):
        (tmp_path / name).mkdir(parents=True)
        for path in (real_data / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    for name in (
        "ts_petct_upperabd_portal_ct.nii.gz",
        "ts_petct_upperabd_portal_label.nii.gz",
        "ts_example_upperabd_mr.nii.gz",
    ):
        (tmp_path / "totalsegmentator" / name).write_bytes(
            (real_data / "totalsegmentator" / name).read_bytes()
        )
    manifest = scan(tmp_path)
    found = {}
    for record in manifest.records:
        found.setdefault(Path(record.path).name, []).append(record)
    assert [r.reasons for r in found["dicom_two_acquisitions_one_series"]] == [
        ["split_series", "few_slices"]
    ] * 3
    assert sorted(len(r.files) for r in found["dicom_two_acquisitions_one_series"]) == [1, 6, 6]
    (kept,), (repeat,) = found["ts_petct_upperabd_portal_ct.nii.gz"], found["example_ct_dicom"]
    assert kept.label and kept.status == ACCEPTED, kept.reasons
    assert repeat.duplicate_of == kept.id
    assert near_pairs([kept.body_hash], [repeat.body_hash], 0.001)
    (mr,) = found["ts_example_upperabd_mr.nii.gz"]
    assert (mr.modality, mr.reasons) == ("MR", ["other_modality"])


@pytest.mark.slow
def test_the_whole_folder_of_real_scans_is_judged_as_its_own_manifest_judges_it(
    real_data, tmp_path, monkeypatch
):
    manifest = scan(real_data, output=tmp_path / "m.json", workers=2)
    found = by_path(manifest)
    listed = json.loads((real_data / "manifest.json").read_text())["files"]
    patients = {}
    for entry in listed:
        if entry["kind"] == "dicom-series":
            continue
        record = found[entry["path"]]
        if entry["kind"] == "label":
            assert (record.kind, record.status) == ("label", ACCEPTED), entry["path"]
        elif entry["modality"] == "CT":
            assert (record.kind, record.status, record.modality) == ("image", ACCEPTED, "CT"), entry["path"]
            assert record.shape == entry["shape"] and record.orientation == entry["orientation"]
            assert (record.values["min"], record.values["max"]) == (entry["min"], entry["max"])
            patients.setdefault(entry["patient"], set()).add(record.patient)
        else:
            assert record.status == REJECTED and record.reasons in (["other_modality"], ["unsupported"])
    assert all(len(hidden) == 1 for hidden in patients.values())
    assert len(set.union(*patients.values())) == len(patients)
    assert {record.path for record in manifest.records if record.duplicate_of} == {
        "totalsegmentator/example_ct_dicom"
    }
    monkeypatch.setattr(examine_all, "run_job", lambda job, rules: pytest.fail(f"{job.path} is read again"))
    assert scan(real_data, output=tmp_path / "m.json") == manifest
