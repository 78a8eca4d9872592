"""Distances between two surfaces: normalised surface Dice and the 95th percentile Hausdorff distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from monai.metrics.utils import ENCODING_KERNEL, _get_neighbour_code_to_normals_table
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from custom.errors import AliceError
from custom.evaluation.scores.masks import checked_spacing, cropped_pair, mask_pair


def nsd(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Normalised surface Dice as DeepMind's surface-distance defines it, with nothing of FLARE22's rules.

    Surface elements sit between voxels and weigh their area (marching cubes on 2x2x2 neighbourhoods); the
    outside of the volume is background, so an organ cut by the volume's border has a surface there.

    Args:
        prediction: bool (X, Y, Z), or integers 0 and 1.
        reference: the same, on the same grid.
        spacing: millimetres per voxel along x, y, z.
        tolerance_mm: a surface element counts as found within this distance, bounds included.

    Returns:
        Share of both surfaces' area within the tolerance of the other, in [0, 1]. 0 if one mask is
        empty, nan if both are.

    Raises:
        ValueError: for masks of different shape, other values than 0 and 1, a bad spacing or tolerance.
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
    """Area in mm² of the surface in each of the 256 neighbourhoods, in float64 as DeepMind's (MONAI's own is float32)."""
    normals = _get_neighbour_code_to_normals_table().double().numpy()  # (256, 4, 3), multiples of 1/8
    x, y, z = spacing
    return np.linalg.norm(normals * (y * z, x * z, x * y), axis=-1).sum(axis=-1)


def _surface_elements(
    mask: NDArray[np.bool_], table: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Where the surface runs, at the corners between voxels, and the area of each of its elements in mm²."""
    code = np.zeros([size - 1 for size in mask.shape], np.uint8)
    for (i, j, k), bit in np.ndenumerate(np.asarray(ENCODING_KERNEL[3])):
        code += bit.astype(np.uint8) * mask[i:, j:, k:][tuple(slice(size) for size in code.shape)]
    border = (code != 0) & (code != 255)
    return border, table[code[border]]
