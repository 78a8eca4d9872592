"""Listing and reading scans: what is found, and what every kind of bad input is answered with."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from conftest import write_scan
from damage import good_volume, mha_bytes

from custom.data.errors import ScanError
from custom.data.scans import check_hu, list_scans, read_volume
from custom.data.store.build import build_store, require_patients
from custom.data.store.volume_store import StoreError, VolumeStore


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def ct(shape=(12, 13, 14)):
    volume = np.full(shape, -1000, np.int16)
    volume[3:9, 3:9] = 40
    return volume


def test_labels_are_paired_and_never_taken_for_scans(tmp_path):
    for name in ("a/images/FLARE22_Tr_0001_0000.nii.gz", "a/labels/FLARE22_Tr_0001.nii.gz", "b/imagesTr/img0007.nii.gz",
                 "b/labelsTr/label0007.nii.gz", "c/pt_1_ct.nii.gz", "c/pt_1_label.nii.gz", "c/pt_2_ct.nii.gz"):  # fmt: skip
        save(tmp_path / name, ct())
    scans = list_scans(tmp_path)
    assert [s.name for s in scans] == ["FLARE22_Tr_0001_0000", "img0007", "pt_1_ct", "pt_2_ct"]
    assert [s.label.name if s.label else None for s in scans] == [
        "FLARE22_Tr_0001.nii.gz",
        "label0007.nii.gz",
        "pt_1_label.nii.gz",
        None,
    ]


def test_a_patient_is_read_from_the_path(tmp_path):
    for name in (
        "p1/s1.nii.gz",
        "p1/s2.nii.gz",
        "p2/s1.nii.gz",
        "TCGA-BC-A3KF_chest.nii.gz",
        "TCGA-BC-A3KF_abdomen.nii.gz",
    ):
        save(tmp_path / name, ct())
    by_folder = {s.name: s.patient for s in list_scans(tmp_path, r"(p\d)/")}
    assert by_folder["s1"] == by_folder["s2"] == "p1" and by_folder["p2_s1"] == "p2"
    assert {s.patient for s in list_scans(tmp_path) if "TCGA" in s.name} == {"TCGA-BC-A3KF"}
    with pytest.raises(ScanError, match="not a regular expression"):
        list_scans(tmp_path, "(")


def test_datalists_of_monai_and_msd_are_read(tmp_path):
    for i in range(3):
        save(tmp_path / f"s{i}.nii.gz", ct())
    (tmp_path / "msd.json").write_text(
        json.dumps(
            {"training": [{"image": "s0.nii.gz", "label": "l0.nii.gz"}], "test": ["s1.nii.gz"], "name": "x"}
        )
    )
    scans = list_scans(tmp_path / "msd.json")
    assert [s.name for s in scans] == ["s0", "s1"] and scans[0].label == tmp_path / "l0.nii.gz"
    (tmp_path / "flat.json").write_text(json.dumps([{"image": "s2.nii.gz", "patient": "anna"}]))
    assert list_scans(tmp_path / "flat.json")[0].patient == "anna"


@pytest.mark.parametrize(
    "content, message", [("{", "not readable as JSON"), ("[]", "names no image"), ('[{"label": "x"}]', "names no image"),
                         ('["a.nii.gz", "a.nii.gz"]', "a.nii.gz: listed twice"), ("7", "A datalist is a JSON list"),
                         ("[" * 100_000, "nested too deeply.*A datalist is"), ("\udcff", "not UTF-8 text")],
)  # fmt: skip
def test_bad_datalists_are_refused(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ScanError, match=message):
        list_scans(tmp_path / "list.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_datalists_from_windows_are_read(tmp_path, encoding):
    for i in range(2):
        save(tmp_path / "images" / f"s{i}.nii.gz", ct())
    entries = [{"image": f"images\\s{i}.nii.gz", "label": f"labels\\s{i}.nii.gz"} for i in range(2)]
    text = json.dumps({"training": entries}, indent=1).replace("\n", "\r\n")
    (tmp_path / "list.json").write_bytes(text.encode(encoding))
    scans = list_scans(tmp_path / "list.json")
    assert [s.name for s in scans] == ["s0", "s1"] and all(s.image.is_file() for s in scans)
    assert scans[1].label == tmp_path / "labels" / "s1.nii.gz"


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(ScanError, match="nowhere: no such folder"):
        list_scans(tmp_path / "nowhere")
    with pytest.raises(ScanError, match="no scan found"):
        list_scans(tmp_path)


def bad_files(folder):
    """Kind -> (path, what the message must say)."""
    good = save(folder / "good.nii.gz", ct((40, 41, 42)))
    content = good.read_bytes()
    cases = {}

    def add(name, message, data=None, array=None, affine=None):
        path = folder / f"{name}.nii.gz"
        if data is not None:
            path.write_bytes(data)
        else:
            save(path, array, affine)
        cases[name] = (path, message)

    nan = ct().astype(np.float32)
    nan[0, 0, 0] = np.nan
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    add("empty", "0 bytes", b"")
    add("text", "not a readable image|truncated or damaged", b"this is no image")
    add("packed_text", "not a readable image|truncated or damaged", gzip.compress(b"hello" * 200))
    add("truncated", "truncated or damaged|not a readable image", content[: len(content) // 2])
    add("bit_flip", "truncated or damaged|not a readable image", bytes(flipped))
    add("flat_2d", r"has shape \(12, 13\)", array=ct()[..., 0])
    add("movie_4d", r"has shape \(12, 13, 14, 2\)", array=np.stack([ct()] * 2, -1))
    add("one_slice", "at least 2 slices", array=ct((12, 13, 1)))
    add("air", "all air", array=np.where(ct() > 0, -990, -1000).astype(np.int16))
    add("constant", "every voxel is 0", array=np.zeros((5, 6, 7), np.int16))
    add("nan", "1 voxels are NaN", array=nan)
    add("mr", "not Hounsfield units", array=(ct() + 1000).astype(np.int16))
    return good, cases


def test_every_bad_file_is_named_with_what_is_wrong(tmp_path):
    good, cases = bad_files(tmp_path)
    check_hu(good, read_volume(good)[0])
    for path, message in cases.values():
        with pytest.raises(ScanError, match=message) as caught:
            check_hu(path, read_volume(path)[0])
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_build_and_an_embedding_read_what_a_scan_reads(tmp_path):
    content = bytearray(save(tmp_path / "a.nii.gz", ct()).read_bytes())
    content[-6] ^= 1  # of the checksum, which nibabel does not look at
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert np.array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata(), ct())
    with pytest.raises(ScanError, match="a.nii.gz: truncated or damaged"):
        read_volume(tmp_path / "a.nii.gz")
    (tmp_path / "a.mha").write_bytes(mha_bytes(CompressedDataSize="0"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha")[0], good_volume())
    whole = mha_bytes(CompressedDataSize="0")
    (tmp_path / "a.mha").write_bytes(whole[:-200])
    with pytest.raises(ScanError, match="a.mha: truncated or damaged"):
        read_volume(tmp_path / "a.mha")


def test_bytes_of_another_order_become_the_machines_own(tmp_path):
    image = nib.Nifti1Image(ct(), np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\0\0\1\x5c"
    volume, _ = read_volume(tmp_path / "big.nii")
    assert volume.dtype.isnative
    np.testing.assert_array_equal(volume, ct())


def test_a_singular_affine_is_refused(tmp_path):
    path = save(tmp_path / "singular.nii.gz", ct())
    image = nib.load(path)
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    image.header["qform_code"] = 0
    broken = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    broken.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    nib.save(broken, path)
    with pytest.raises(ScanError, match="affine cannot be inverted"):
        read_volume(path)


def test_a_build_stops_with_a_list_or_skips_what_the_user_allows(tmp_path):
    _, cases = bad_files(tmp_path / "scans")
    for i in range(2):
        write_scan(tmp_path / "scans" / f"fine{i}.nii.gz", i)
    with pytest.raises(ScanError, match=rf"{len(cases)} of \d+ scans cannot be used, 0 allowed") as caught:
        build_store(tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), progress=False)
    assert all(str(path) in str(caught.value) for path, _ in cases.values())
    store = build_store(
        tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), bad_scans_allowed=len(cases), progress=False
    )
    assert set(store.names) == {"fine0", "fine1", "good"}
    report = json.loads((tmp_path / "store" / "report.json").read_text())
    assert set(report["refused"]) == set(cases)
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_fewer_than_two_patients_are_refused(tmp_path):
    write_scan(tmp_path / "scans" / "only.nii.gz", 0)
    store = build_store(tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), progress=False)
    with pytest.raises(ScanError, match=r"1 patient\(s\) \(only\), at least 2"):
        require_patients(store, 2)


def test_mismatched_labels_are_refused(tmp_path):
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    save(tmp_path / "a_ct.nii.gz", ct(), affine)
    save(tmp_path / "a_label.nii.gz", np.zeros((12, 13, 15), np.uint8), affine)
    with pytest.raises(ScanError, match="differs from its image"):
        build_store(tmp_path, tmp_path / "store", progress=False)
    save(tmp_path / "a_label.nii.gz", np.full((12, 13, 14), 0.5, np.float32), affine)
    with pytest.raises(ScanError, match="whole numbers"):
        build_store(tmp_path, tmp_path / "store", progress=False)


def test_other_settings_need_another_store(store, scans):
    with pytest.raises(
        StoreError, match=r"Ask for the same settings .--spacing .*, or choose another store .store_dir."
    ):
        build_store(scans, store.path, spacing=(2.0, 2.0, 2.0), progress=False)
    with pytest.raises(ValueError, match="between 0.1 and 20"):
        build_store(scans, store.path, spacing=(0.0, 2.0, 2.0), progress=False)
    with pytest.raises(StoreError, match="index.json is missing"):
        VolumeStore(scans)


def test_folders_are_patients_where_names_repeat(tmp_path):
    for name in ("s1/ct.nii.gz", "s1/ct2.nii.gz", "s2/ct.nii.gz", "s2/ct2.nii.gz"):
        save(tmp_path / name, ct())
    assert sorted(s.patient for s in list_scans(tmp_path)) == ["s1", "s1", "s2", "s2"]


def test_case_numbers_of_four_digits_pair_too(tmp_path, caplog):
    for name in ("imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz", "labelsTr/amos_0009.nii.gz"):
        save(tmp_path / name, ct())
    (scan,) = list_scans(tmp_path)
    assert scan.label is not None and scan.label.name == "amos_0001.nii.gz"
    assert "1 label file(s) pair with no image, labelsTr/amos_0009.nii.gz" in caplog.text


def test_a_header_that_nibabel_will_not_parse_is_a_bad_scan_like_others(tmp_path):
    path = save(tmp_path / "odd.nii", ct())
    content = bytearray(path.read_bytes())
    content[70:72] = (999).to_bytes(2, "little")  # datatype
    path.write_bytes(content)
    with pytest.raises(ScanError, match=r"odd.nii: not a readable image"):
        read_volume(path)


def test_a_store_remembers_patients_and_what_was_skipped(tmp_path):
    for i in range(4):
        write_scan(tmp_path / "scans" / f"p{i // 2}_s{i}.nii.gz", i)
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"")
    built = build_store(
        tmp_path / "scans",
        tmp_path / "store",
        (3.0, 3.0, 4.0),
        bad_scans_allowed=1,
        patient_pattern=r"(p\d)_",
        progress=False,
    )
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "volumes").iterdir()}
    again = build_store(
        tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), progress=False
    )  # neither is repeated
    assert (
        [again.patient(n) for n in again.names]
        == [built.patient(n) for n in built.names]
        == ["p0", "p0", "p1", "p1"]
    )
    other = build_store(
        tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), patient_pattern=r"(s\d)", progress=False
    )
    assert {other.patient(n) for n in other.names} == {"s0", "s1", "s2", "s3"}
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "volumes").iterdir()}
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"still")
    with pytest.raises(ScanError, match="1 of 5 scans cannot be used"):
        build_store(tmp_path / "scans", tmp_path / "store", (3.0, 3.0, 4.0), progress=False)
