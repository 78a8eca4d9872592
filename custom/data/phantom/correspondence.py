"""Find places of the canonical body in the scan of a phantom."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from custom.data.phantom.shapes import Array
from custom.errors import AliceError


class FoundPoints(NamedTuple):
    """Places in a scan.

    Attributes:
        points_mm: (N, 3) world coordinates, RAS.
        residual_mm: (N,) distance between the canonical coordinate there and the one asked for: about 0 inside
            the scan, large if the place lies outside of its field of view.
    """

    points_mm: NDArray[np.float64]
    residual_mm: NDArray[np.float64]


def find_places(canonical: Array, affine: NDArray[np.float64], wanted_mm: ArrayLike) -> FoundPoints:
    """Invert a canonical-coordinate map at given coordinates, to a fraction of a voxel.

    A search among every fourth voxel gives the start, which Newton steps on the trilinear map refine.

    Args:
        canonical: float32 (X, Y, Z, 3).
        affine: (4, 4), voxel to world mm.
        wanted_mm: (N, 3) canonical mm.

    Returns:
        Points of the scan and their residuals.

    Raises:
        AliceError: if ``wanted_mm`` is not (N, 3).
    """
    wanted = np.asarray(wanted_mm, dtype=np.float64)
    if wanted.ndim != 2 or wanted.shape[1] != 3:
        raise AliceError(f"Canonical coordinates must have shape (N, 3), got {wanted.shape}.")
    coarse = canonical[::4, ::4, ::4]
    _, nearest = cKDTree(coarse.reshape(-1, 3)).query(wanted)
    voxel = 4.0 * np.stack(np.unravel_index(nearest, coarse.shape[:3]), axis=-1)
    last = np.array(canonical.shape[:3]) - 1.0

    best, best_residual = voxel.copy(), np.full(len(wanted), np.inf)
    for _ in range(12):
        value, slope = _map_at(canonical, voxel)
        error = wanted - value
        residual = np.linalg.norm(error, axis=-1)
        better = residual < best_residual
        best[better], best_residual[better] = voxel[better], residual[better]
        if best_residual.max(initial=0.0) < 1e-4:
            break
        step = np.linalg.solve(slope, error[..., None])[..., 0]
        voxel = np.clip(voxel + np.clip(step, -8, 8), 0, last)
    return FoundPoints(best @ affine[:3, :3].T + affine[:3, 3], best_residual)


def _map_at(canonical: Array, voxel: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Trilinear value (N, 3) and Jacobian (N, 3, 3) of the map, columns along x, y, z of the voxels."""
    cell = np.minimum(voxel.astype(int), np.array(canonical.shape[:3]) - 2)
    part = voxel - cell
    corners = np.stack(
        [
            canonical[cell[:, 0] + i, cell[:, 1] + j, cell[:, 2] + k]
            for i in (0, 1)
            for j in (0, 1)
            for k in (0, 1)
        ],
        axis=1,
    ).reshape(-1, 2, 2, 2, 3)
    weight = np.stack([1 - part, part], axis=1)  # (N, 2, 3)
    wx, wy, wz = weight[..., 0], weight[..., 1], weight[..., 2]
    difference = np.array([-1.0, 1.0])
    value = np.einsum("nijkc,ni,nj,nk->nc", corners, wx, wy, wz)
    slope = np.stack(
        [
            np.einsum("nijkc,i,nj,nk->nc", corners, difference, wy, wz),
            np.einsum("nijkc,ni,j,nk->nc", corners, wx, difference, wz),
            np.einsum("nijkc,ni,nj,k->nc", corners, wx, wy, difference),
        ],
        axis=-1,
    )
    return value, slope
