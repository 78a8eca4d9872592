"""Convert points between voxel coordinates and world millimetres."""

from __future__ import annotations

import numpy as np


def to_world(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Voxel coordinates (..., 3) -> RAS mm (..., 3)."""
    return np.asarray(voxels, dtype=float) @ affine[:3, :3].T + affine[:3, 3]


def to_voxels(affine: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """RAS mm (..., 3) -> voxel coordinates (..., 3), not rounded."""
    return np.linalg.solve(affine[:3, :3], (np.asarray(points_mm, dtype=float) - affine[:3, 3]).T).T
