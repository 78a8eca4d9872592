"""Distances between two surfaces: normalised surface Dice and the 95th percentile Hausdorff distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from custom.errors import AliceError
from custom.evaluation.scores.masks import checked_spacing, cropped_pair, mask_pair

# The surface inside a cube of 2 x 2 x 2 voxel centres, from the table of DeepMind's surface-distance
# (marching cubes; MONAI has the same): up to four triangles, named by their place in _NORMALS, for each of
# the codes 0 to 127. A cube and its complement, code 255 - c, have the same surface. The length of a normal
# is its triangle's area; signs do not matter.
_NORMALS = [
    (0, 0, 0), (1, 1, 1), (2, 2, 0), (2, 0, 2), (0, 2, 2), (4, 0, 0), (0, 4, 0), (0, 0, 4), (2, 2, 2), (3, 3, 3),
]  # of |x|, |y|, |z| in eighths of a voxel's face  # fmt: skip
_TRIANGLES = (
    "0 1 1 22 1 33 11 581 1 11 33 581 22 581 581 55 1 44 11 681 11 781 111 1881 11 441 331 1943 122 9412 "
    "5181 518 1 11 44 618 11 133 441 9413 11 111 781 8811 122 5811 4912 581 22 681 618 66 221 9312 1681 "
    "681 122 6811 9213 681 2222 221 122 22 1 11 11 122 44 781 441 9412 11 111 133 5811 681 8811 3941 581 "
    "33 781 133 3921 781 77 1187 187 331 7811 3333 133 3921 781 133 33 11 111 144 6181 441 7811 4444 441 "
    "111 1111 7811 111 6811 111 441 11 581 8181 9413 681 9241 187 144 44 5811 111 331 11 221 11 11 1"
)


def nsd(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Normalised surface Dice as DeepMind's surface-distance defines it, without FLARE22's rules.

    Surface elements lie between voxels and are weighted by their area (marching cubes on 2x2x2
    neighbourhoods). The outside of the volume is background, so an organ that touches the volume's border has
    a surface there.

    Args:
        prediction: bool (X, Y, Z), or integers 0 and 1.
        reference: the same, on the same grid.
        spacing: millimetres per voxel along x, y, z.
        tolerance_mm: a surface element counts as found within this distance, bounds included.

    Returns:
        Share of both surfaces' area within the tolerance of the other, in [0, 1]. 0 if one mask is
        empty, nan if both are.

    Raises:
        AliceError: for masks of different shape, other values than 0 and 1, a bad spacing or tolerance.
    """
    prediction, reference = mask_pair(prediction, reference)
    spacing = checked_spacing(spacing)
    if not 0 <= tolerance_mm < math.inf:
        raise AliceError(f"The tolerance must be a distance in mm, 0 or more, got {tolerance_mm}.")
    if not prediction.any() and not reference.any():
        return math.nan
    if not prediction.any() or not reference.any():
        return 0.0

    table = _surface_areas(spacing)
    prediction, reference = cropped_pair(prediction, reference)
    border_p, area_p = _surface_elements(prediction, table)
    border_r, area_r = _surface_elements(reference, table)
    # scipy's own float64 distances: a surface at exactly the tolerance is within it
    found_p = ndimage.distance_transform_edt(~border_r, sampling=spacing)[border_p] <= tolerance_mm
    found_r = ndimage.distance_transform_edt(~border_p, sampling=spacing)[border_r] <= tolerance_mm
    return float((area_p[found_p].sum() + area_r[found_r].sum()) / (area_p.sum() + area_r.sum()))


def hd95(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm, as MONAI defines it: the larger of the two directed ones.

    Distances run between the centres of border voxels (those with a face neighbour outside). inf if one
    mask is empty, so that a missed organ cannot improve a mean; nan if both are. See :func:`nsd`.
    Computed in float64: MONAI's own function rounds to float32, which moved results by up to 2e-5 mm in trials.
    """
    prediction, reference = mask_pair(prediction, reference)
    spacing = checked_spacing(spacing)
    if not prediction.any() and not reference.any():
        return math.nan
    if not prediction.any() or not reference.any():
        return math.inf

    prediction, reference = cropped_pair(prediction, reference)
    border_p = prediction ^ ndimage.binary_erosion(prediction)
    border_r = reference ^ ndimage.binary_erosion(reference)
    distance_p = ndimage.distance_transform_edt(~border_r, sampling=spacing)[border_p]
    distance_r = ndimage.distance_transform_edt(~border_p, sampling=spacing)[border_r]
    return float(max(np.percentile(distance_p, 95), np.percentile(distance_r, 95)))


def _surface_areas(spacing: Sequence[float]) -> NDArray[np.float64]:
    """Area in mm² of the surface in a cube of each of the 256 codes (MONAI's public table is float32)."""
    triangles = [[int(digit) for digit in word.ljust(4, "0")] for word in _TRIANGLES.split()]
    normals = np.array(_NORMALS)[triangles + triangles[::-1]] / 8  # (256, 4, 3)
    x, y, z = spacing
    return np.linalg.norm(normals * (y * z, x * z, x * y), axis=-1).sum(axis=-1)


def _surface_elements(
    mask: NDArray[np.bool_], table: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Where the surface runs, at the corners between voxels, and the area of each of its elements in mm².

    The code of a corner has one bit for each of its eight voxels, the highest for the first along x, y and z.
    """
    code = np.zeros([size - 1 for size in mask.shape], np.uint8)
    for number, (i, j, k) in enumerate(np.ndindex(2, 2, 2)):
        code += np.uint8(128 >> number) * mask[i:, j:, k:][tuple(slice(size) for size in code.shape)]
    border = (code != 0) & (code != 255)
    return border, table[code[border]]
