"""DICOM: headers read without a library, series split into acquisitions, slices stacked where they lie."""

import struct

import itk
import numpy as np
import pytest
from damage import SHAPE, at, dicom_bytes, element, good_volume, write_series
from scipy import ndimage

from custom.data.errors import ScanError
from custom.data.formats.dicom_header import read_header
from custom.data.formats.dicom_series import sort_series
from custom.data.formats.dicom_volume import read_series
from custom.data.formats.reasons import Fault, Reason


def headers(folder, change=None, **changes):
    return [read_header(path) for path in write_series(folder, change, **changes)]


def test_a_header_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(
        dicom_bytes(good_volume()[:, :, 3], Position="-55\\-60\\-34", PatientName="Nobody^Special")
    )
    header = read_header(path)
    assert (header.columns, header.rows, header.modality) == (*SHAPE[:2], "CT")
    assert header.position == (-55, -60, -34) and header.spacing == (3.1, 3.0)
    assert (header.slope, header.intercept, header.samples, header.has_pixels) == (1, -1024, 1, True)
    assert "Nobody" not in str(vars(header)) and "MRN" not in repr(header)


def test_sequences_of_both_kinds_are_stepped_over(tmp_path):
    content = dicom_bytes(good_volume()[:, :, 3], Position="-55\\-60\\-34")
    inside = element(0x0028, 0x0010, b"US", struct.pack("<H", 7))  # rows of something else
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inside + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    endless = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item + end
    told = element(0x0008, 0x1150, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(inside)) + inside)
    place = content.index(b"\x10\x00\x20\x00LO")
    path = tmp_path / "a.dcm"
    path.write_bytes(content[:place] + endless + told + content[place:])
    header = read_header(path)
    assert header.rows == SHAPE[1] and header.patient_id == "MRN-4711"


def test_implicit_files_without_a_preamble_are_read(tmp_path):
    def plain(group, number, value):
        return struct.pack("<HHI", group, number, len(value)) + value

    content = plain(8, 0x0008, b"ORIGINAL\\PRIMARY\\AXIAL ") + plain(8, 0x0060, b"CT")
    content += (
        plain(0x20, 0x0032, b"1\\2\\3 ") + plain(0x28, 0x0010, b"\x05\0") + plain(0x28, 0x0011, b"\x07\0")
    )
    content += plain(0x28, 0x0100, b"\x10\0") + plain(0x7FE0, 0x0010, bytes(70))
    path = tmp_path / "old"
    path.write_bytes(content)
    header = read_header(path)
    assert (header.rows, header.columns, header.position) == (5, 7, (1, 2, 3))


def test_a_series_is_stacked_where_its_slices_lie(tmp_path):
    paths = write_series(tmp_path)
    volume, affine = read_series(paths[::-1])
    np.testing.assert_array_equal(volume, good_volume())
    assert volume.dtype == np.int16
    np.testing.assert_allclose(
        affine, [[-3, 0, 0, 55], [0, -3.1, 0, 60], [0, 0, 4, -46], [0, 0, 0, 1]], atol=1e-9
    )


def test_turned_slices_are_placed_as_their_header_says(tmp_path):
    volume, affine = read_series(
        write_series(
            tmp_path, lambda z: {"Position": f"10\\20\\{100 - 4 * z}"}, Orientation="0\\-1\\0\\1\\0\\0"
        )
    )
    here = np.array([2, 3, 0, 1])  # column, row, of the lowest slice
    lps = (
        np.array([10, 20, 100 - 4 * (SHAPE[2] - 1)])
        + 2 * 3.0 * np.array([0, -1, 0])
        + 3 * 3.1 * np.array([1, 0, 0])
    )
    np.testing.assert_allclose((affine @ here)[:3], lps * [-1, -1, 1])
    np.testing.assert_array_equal(volume, good_volume()[:, :, ::-1])


def test_fractions_of_hu_are_kept(tmp_path):
    volume, _ = read_series(write_series(tmp_path, Slope="0.5", Intercept="-10"))
    assert volume.dtype == np.float32
    np.testing.assert_allclose(volume, (good_volume() + 1024.0) * 0.5 - 10)


def test_interleaved_acquisitions_are_split(tmp_path):
    def change(z):
        return {"Position": at(4 * (z // 2) + 0.75 * (z % 2)), "AcquisitionNumber": str(z % 2 + 1)}

    found = sort_series(headers(tmp_path, change), min_slices=5)
    assert [len(series.slices) for series in found] == [12, 11]
    assert all(series.reasons == [Reason.SPLIT_SERIES] for series in found)
    for series in found:
        assert len({one.acquisition for one in series.slices}) == 1
        heights = [one.position[2] for one in series.slices]
        assert heights == sorted(heights)
    with pytest.raises(ScanError, match="2 acquisitions among 23 files"):
        read_series([path for series in found for path in series.files])
    assert read_series(found[0].files)[0].shape == (*SHAPE[:2], 12)


def test_an_acquisition_a_slice_is_no_reason_to_split(tmp_path):
    (series,) = sort_series(headers(tmp_path / "even", lambda z: {"AcquisitionNumber": str(z)}))
    assert series.reasons == []
    (series,) = sort_series(
        headers(tmp_path / "gap", lambda z: {"AcquisitionNumber": str(z)} if z != 9 else None)
    )
    assert series.reasons == [Reason.MISSING_SLICES]


def test_two_series_and_a_scout_in_one_folder_are_told_apart(tmp_path):
    found = headers(tmp_path / "a") + headers(tmp_path / "b", SeriesInstanceUID="1.2.3.9")
    found += headers(
        tmp_path / "c", lambda z: {} if z == 4 else None, ImageType="ORIGINAL\\PRIMARY\\LOCALIZER"
    )
    series = sort_series(found)
    assert sorted(len(one.slices) for one in series) == [1, 23, 23]
    assert [one.reasons for one in series if len(one.slices) == 1] == [
        [Reason.SPLIT_SERIES, Reason.LOCALIZER]
    ]


def test_positions_may_be_rounded(tmp_path):
    rng = np.random.default_rng(0)
    (series,) = sort_series(
        headers(tmp_path, lambda z: {"Position": at(round(1.25 * z + rng.uniform(-0.005, 0.005), 2))})
    )
    assert series.reasons == []


@pytest.mark.parametrize("tilt, refused", [(0.1, False), (3.0, True)])
def test_tilt_is_read_from_the_positions(tmp_path, tilt, refused):
    slope = np.tan(np.radians(tilt))
    (series,) = sort_series(
        headers(tmp_path, lambda z: {"Position": f"-55\\{-60 + 4 * z * slope:.4f}\\{4 * z}"})
    )
    assert (Reason.GANTRY_TILT in series.reasons) == refused


def test_bad_files_are_named_with_their_fault(tmp_path):
    path = tmp_path / "a.dcm"
    good = dicom_bytes(good_volume()[:, :, 3], Position="-55\\-60\\-34")
    for content, reason in (
        (b"", Reason.EMPTY_FILE),
        (b"hello" * 99, Reason.NOT_AN_IMAGE),
        (good[:-1], Reason.TRUNCATED),
        (good[:300], Reason.TRUNCATED),
        (good[:132], Reason.TRUNCATED),
    ):
        path.write_bytes(content)
        with pytest.raises(Fault) as caught:
            read_header(path)
        assert caught.value.reason is reason, content[:10]
    with pytest.raises(Fault) as caught:
        read_header(tmp_path / "gone.dcm")
    assert caught.value.reason is Reason.UNREADABLE


def test_reading_refuses_what_is_no_stack(tmp_path):
    with pytest.raises(ScanError, match="No DICOM file"):
        read_series([])
    with pytest.raises(ScanError, match=r"gap: Slices are missing from the series\. \(1 slices\)"):
        read_series(write_series(tmp_path / "gap", lambda z: None if z == 9 else {}))
    broken = write_series(tmp_path / "broken")
    broken[4].write_bytes(broken[4].read_bytes()[:-9])
    with pytest.raises(ScanError, match="broken: The file ends before its data do"):
        read_series(broken)


def test_a_multi_frame_file_is_refused(tmp_path):
    frames = np.ascontiguousarray(good_volume().T + 1024, dtype=np.uint16)  # GDCM writes no signed ones
    image = itk.image_from_array(frames)
    image.SetSpacing([3.0, 3.1, 4.0])
    itk.imwrite(image, str(tmp_path / "enhanced.dcm"))
    header = read_header(tmp_path / "enhanced.dcm")
    assert int(header.frames) == SHAPE[2]
    (series,) = sort_series([header])
    assert series.reasons == [Reason.MULTIFRAME]
    with pytest.raises(ScanError, match="multi-frame object. Convert it to NIfTI or to single slices"):
        read_series([tmp_path / "enhanced.dcm"])


def test_the_real_series_is_its_nifti(real_data):
    nib = pytest.importorskip("nibabel")
    folder = real_data / "totalsegmentator"
    volume, affine = read_series(sorted((folder / "example_ct_dicom").iterdir()))  # JPEG 2000
    image = nib.as_closest_canonical(nib.load(folder / "ts_petct_upperabd_portal_ct.nii.gz"))
    ours = nib.as_closest_canonical(nib.Nifti1Image(volume, affine))
    np.testing.assert_array_equal(ours.get_fdata(), image.get_fdata())
    np.testing.assert_allclose(ours.affine, image.affine, atol=0.01)


def test_the_real_mixed_series_falls_into_its_acquisitions(real_data):
    folder = real_data / "tcga_lihc" / "dicom_two_acquisitions_one_series"
    found = sort_series(map(read_header, folder.iterdir()), min_slices=3)
    assert [len(series.slices) for series in found] in ([6, 6, 1], [6, 1, 6], [1, 6, 6])
    assert [series.reasons for series in found if len(series.slices) == 6] == [[Reason.SPLIT_SERIES]] * 2
    one, other = (read_series(series.files)[0] for series in found if len(series.slices) == 6)
    smooth = [ndimage.gaussian_filter(volume.astype(float), 3) for volume in (one, other)]
    alike = [
        np.corrcoef(smooth[0].ravel(), second.ravel())[0, 1] for second in (smooth[1], smooth[1][:, :, ::-1])
    ]
    assert alike[0] > max(0.7, alike[1])  # the same place in two breaths, from feet to head
