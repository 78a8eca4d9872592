"""A scan in cells of 16 mm: few enough to match all of two scans, and to read off on which map they agree."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from custom.landmarks.lattice import flat_index, interpolate_at, lattice_weights
from custom.landmarks.scan_grid import Triple, cell_to_world

Array = NDArray[Any]


class Blocks(NamedTuple):
    """A scan's cells of 16 mm (4 x 4 x 4 fine cells) that hold body.

    Attributes:
        vectors: (n, 2C) float32; the product of two is the mean of their fine and coarse similarity.
        points_mm: (n, 3), the middle of what body they hold.
    """

    vectors: Array
    points_mm: Array


def block_vectors(pooled_rows: Array, used: Array, coarse: Array, grid: Triple) -> Array:
    """(n, 2C): the means of up to eight pooled vectors beside the interpolated coarse one, each half of length sqrt(1/2).

    Args:
        pooled_rows: (cells, C) of the 8 mm cells that hold body, in the order of ``used``.
        used: bool (z, y, x), which 8 mm cells those are.
        coarse: (z, y, x, C).
        grid: fine cells along z, y, x.
    """
    cells, first, members = _members(used)
    order = np.argsort(members, kind="stable")
    starts = np.searchsorted(members[order], np.arange(len(first)))
    fine = np.add.reduceat(pooled_rows[order], starts, axis=0)
    weights = lattice_weights(grid, (coarse.shape[0], coarse.shape[1], coarse.shape[2]), 4)
    context = interpolate_at(coarse, weights, tuple((cells[first] // 2).T))
    halves = [
        half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12) for half in (fine, context)
    ]
    return (np.concatenate(halves, axis=1) * np.sqrt(0.5)).astype(np.float32)


def block_points(used: Array, grid: Triple, affine: Array) -> Array:
    """(n, 3) world mm: the middle of each block's 8 mm cells that hold body.

    Args:
        used: as for :func:`block_vectors`.
        grid: fine cells along z, y, x.
        affine: of the 2 mm grid, voxel (x, y, z) to world mm.
    """
    cells, _, members = _members(used)
    middles = np.minimum(2 * cells + 0.5, np.array(grid) - 1)  # in fine cells
    sums = np.stack([np.bincount(members, axis) for axis in middles.T], axis=-1)
    return cell_to_world(sums / np.bincount(members)[:, None], affine, "fine")


def _members(used: Array) -> tuple[Array, Array, Array]:
    """8 mm cells in the body (m, 3), the first cell of each block (n,), and each cell's block (m,)."""
    cells = np.argwhere(used)
    size = (np.array(used.shape) + 1) // 2
    flat = flat_index(cells // 2, (int(size[0]), int(size[1]), int(size[2])))
    _, first, members = np.unique(flat, return_index=True, return_inverse=True)
    return cells, first, members
