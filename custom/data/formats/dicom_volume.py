"""Read one DICOM series as a volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from custom.data.errors import ScanError
from custom.data.formats.dicom_header import SliceHeader, read_header
from custom.data.formats.dicom_series import Series, sort_series
from custom.data.formats.reasons import REJECTED, Fault, Reason
from custom.data.formats.voxels import MOST_BYTES, check_shape

_BYTES_DECODED = 4  # of a voxel, as float32


def read_series(files: Sequence[str | Path], most_bytes: int = MOST_BYTES) -> tuple[np.ndarray, np.ndarray]:
    """Read one series as a volume. GDCM decodes compressed pixels.

    Args:
        files: the slices of one acquisition, in any order.
        most_bytes: a series with more bytes of voxels is refused before they are read.

    Returns:
        Values (X, Y, Z): HU for CT, int16 if all are whole numbers, else float32. And the affine (4, 4), voxel to RAS mm.

    Raises:
        ScanError: if the files are not evenly spaced slices of one acquisition, or one cannot be decoded.
    """
    if not files:
        raise ScanError("No DICOM file was given.")
    folder = Path(files[0]).parent
    try:
        headers = [read_header(file) for file in files]
        found = sort_series(headers, min_slices=2)
        stop = [reason for reason in found[0].reasons if reason.status == REJECTED]
        if len(found) > 1:
            raise Fault(Reason.SPLIT_SERIES, f"{len(found)} acquisitions among {len(files)} files")
        if stop:
            raise Fault(stop[0], found[0].detail)
        return stack(found[0], most_bytes)
    except Fault as error:
        raise ScanError(f"{folder}: {error}") from error


def stack(series: Series, most_bytes: int = MOST_BYTES) -> tuple[np.ndarray, np.ndarray]:
    """The volume of a series that :func:`sort_series` found nothing wrong with.

    Raises:
        Fault: if a slice cannot be decoded, or there are more bytes of voxels than ``most_bytes``.
    """
    slices = series.slices
    first, last = slices[0], slices[-1]
    check_shape((first.columns, first.rows, len(slices)), _BYTES_DECODED, most_bytes)
    volume = np.empty((first.columns, first.rows, len(slices)), np.int16, order="F")
    for z, one in enumerate(slices):
        plane = _decode(one)
        if plane.shape != volume.shape[:2]:
            raise Fault(Reason.BAD_HEADER, f"slice {z} has another size")
        whole = np.rint(plane)
        fits = np.array_equal(whole, plane) and whole.min() >= -32768 and whole.max() <= 32767
        if volume.dtype == np.int16 and not fits:
            volume = volume.astype(np.float32, order="F")
        volume[:, :, z] = plane
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2] = np.subtract(last.position, first.position) / max(1, len(slices) - 1)
    affine[:3, 3] = first.position
    return volume, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM uses LPS


def _decode(one: SliceHeader) -> np.ndarray:
    import itk  # slow to import, and needed only here

    try:
        reader = itk.ImageFileReader[itk.Image[itk.F, 3]].New()
        reader.SetImageIO(itk.GDCMImageIO.New())
        reader.SetFileName(str(one.path))
        reader.Update()
        plane = itk.array_from_image(reader.GetOutput())
    except (RuntimeError, ValueError) as error:
        raise Fault(Reason.READER_FAILED, "a slice cannot be decoded") from error
    if plane.shape[0] != 1:
        raise Fault(Reason.MULTIFRAME)
    return plane[0].T
