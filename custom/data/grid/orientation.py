"""The axes of a scan turned towards Right, Anterior, Superior."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np

# corners of two grids at one place may lie this share of a voxel apart: headers hold float32 and rounded quaternions (ours)
_APART = 0.05


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and swap axes, so that each points as nearly as possible to R, A, S. Nothing is interpolated.

    An oblique scan keeps its rotation in the affine.
    """
    flips = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(volume, flips)
    return turned, affine @ nib.orientations.inv_ornt_aff(flips, volume.shape)


def turn_like(volume: np.ndarray, affine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and swap axes, so that each points as the same axis of the affine ``other`` does. Nothing is interpolated."""
    flips = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.io_orientation(other)
    )
    turned = nib.orientations.apply_orientation(volume, flips)
    return turned, affine @ nib.orientations.inv_ornt_aff(flips, volume.shape)


def apart_mm(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """How far the corners (X, Y, Z) of one grid lie from those of another of the same shape, at most."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    moved = (np.asarray(affine) - np.asarray(other))[:3] @ np.c_[corners, np.ones(8)].T
    return float(np.linalg.norm(moved, axis=0).max())


def is_same_place(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> bool:
    """Whether two grids of one shape, whose axes point the same way, lie at the same place."""
    return apart_mm(shape, affine, other) <= _APART * float(spacing_of(other).min())


def is_same_grid(
    shape: Sequence[int], affine: np.ndarray, other_shape: Sequence[int], other: np.ndarray
) -> bool:
    """Whether two grids hold the same voxels, whatever the order and direction of their axes."""
    one, two = (
        to_ras(np.broadcast_to(np.uint8(0), tuple(s)), np.asarray(a, float))
        for s, a in ((shape, affine), (other_shape, other))
    )
    return one[0].shape == two[0].shape and is_same_place(one[0].shape, one[1], two[1])


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size in mm along x, y, z."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
