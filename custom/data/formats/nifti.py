"""Read NIfTI files that may be damaged (https://nifti.nimh.nih.gov)."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.formats.file_bytes import LONGEST_HEADER, enough_bytes, read_exactly, read_or_fault
from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import Voxels, check_grid, check_shape

_NIFTI_SIZES = {
    (348).to_bytes(4, "little"): nib.Nifti1Header,
    (348).to_bytes(4, "big"): nib.Nifti1Header,
    (540).to_bytes(4, "little"): nib.Nifti2Header,
    (540).to_bytes(4, "big"): nib.Nifti2Header,
}


def open_nifti(path: Path, most_bytes: int, any_grid: bool) -> Voxels:
    """Voxels of a .nii or .nii.gz; errors as in :func:`custom.data.formats.open_scan.open_scan`."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed and path.name.lower().endswith(".gz"):
        raise Fault(Reason.NOT_AN_IMAGE, "not gzip")
    with open(path, "rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        start = read_or_fault(stream, 540)
        header = _nifti_header(start)
        shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
        dtype = header.get_data_dtype()
        promised = check_shape(shape, dtype.itemsize, most_bytes)
        if dtype.fields is not None or dtype.kind == "c":
            raise Fault(Reason.COLOUR)
        if dtype.kind not in "iuf":
            raise Fault(Reason.BAD_HEADER, "voxel type")
        offset = float(header["vox_offset"])
        if not (math.isfinite(offset) and len(start) - 540 + 348 <= offset <= LONGEST_HEADER * 64):
            raise Fault(Reason.BAD_HEADER, "data offset")
        slope, intercept = _nifti_scale(header)
        affine, warnings = _nifti_affine(header, shape)
        enough_bytes(path.stat().st_size, promised + int(offset), packed)
        warnings += [] if any_grid else check_grid(affine, shape[:3])
        content = read_exactly(stream, start, int(offset), promised)
    raw = np.frombuffer(content, dtype, math.prod(shape)).reshape(shape[:3], order="F")
    return Voxels(raw, affine, slope, intercept, warnings)


def _nifti_header(start: bytes) -> Any:
    if len(start) < 348:
        raise Fault(
            Reason.TRUNCATED if start[:4] in _NIFTI_SIZES else Reason.NOT_AN_IMAGE, f"{len(start)} bytes"
        )
    kind = _NIFTI_SIZES.get(start[:4])
    if kind is None:
        raise Fault(Reason.NOT_AN_IMAGE, "no NIfTI header")
    size = kind.template_dtype.itemsize
    if len(start) < size:
        raise Fault(Reason.TRUNCATED, f"{len(start)} bytes")
    header = kind(start[:size], check=False)
    if bytes(header["magic"].tobytes()[:3]) not in (b"n+1", b"n+2"):
        raise Fault(Reason.BAD_HEADER, "magic")
    if not 1 <= int(header["dim"][0]) <= 7:
        raise Fault(Reason.BAD_HEADER, "number of dimensions")
    try:
        header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        raise Fault(Reason.BAD_HEADER, "voxel type") from error
    return header


def _nifti_scale(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) and math.isnan(intercept):
        return 1.0, 0.0  # nibabel writes this for "not scaled"
    if slope == 0 and intercept == 0:
        return 1.0, 0.0  # the standard says: not scaled
    if slope == 0 or not (math.isfinite(slope) and math.isfinite(intercept)):
        raise Fault(Reason.ZERO_SLOPE, f"slope {slope:g}, intercept {intercept:g}")
    return slope, intercept


def _nifti_affine(header: Any, shape: Sequence[int]) -> tuple[np.ndarray, list[Reason]]:
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if (pixdim < 0).any():
        raise Fault(Reason.NEGATIVE_SPACING, f"{pixdim.tolist()} mm")
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise Fault(Reason.BAD_SPACING, f"{pixdim.tolist()} mm")
    sform = header.get_sform() if int(header["sform_code"]) > 0 else None
    qform = None
    if int(header["qform_code"]) > 0:
        try:
            qform = header.get_qform()
        except (ValueError, nib.spatialimages.HeaderDataError) as error:
            if sform is None:
                raise Fault(Reason.SINGULAR_AFFINE, "qform") from error
    warnings = []
    if sform is None and qform is None:
        return np.asarray(header.get_base_affine(), dtype=float), [Reason.NO_ORIENTATION]
    affine = np.asarray(sform if sform is not None else qform, dtype=float)
    if sform is not None and qform is not None and np.isfinite(affine).all():
        corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) * np.array(shape[:3])
        apart = np.abs(nib.affines.apply_affine(affine - qform, corners) + 0.0)
        if not apart.max() <= 1.0:  # mm (ours)
            warnings.append(Reason.FORMS_DISAGREE)
    if np.isfinite(affine).all() and not np.allclose(
        np.linalg.norm(affine[:3, :3], axis=0), pixdim, rtol=0.01, atol=1e-3
    ):
        warnings.append(Reason.SPACING_DISAGREES)
    return affine, warnings
