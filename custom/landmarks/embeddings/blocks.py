"""A scan in blocks of 16 mm: few enough to match all blocks of two scans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from custom.landmarks.embeddings.lattice import flat_index, interpolate_at, lattice_weights
from custom.landmarks.sam.scan_grid import Triple, cell_to_world

Array = NDArray[Any]


class Blocks(NamedTuple):
    """The blocks of 16 mm (4 x 4 x 4 fine cells) of a scan that hold body.

    Attributes:
        vectors: (n, 2C) float32; the product of two is the mean of their fine and coarse similarity.
        points_mm: (n, 3), the middle of the body in each block.
        alternate: the first so many blocks are every second one of the lattice, like the black squares of a
            chessboard. To search among these is good enough, at half the cost.
    """

    vectors: Array
    points_mm: Array
    alternate: int


def make_blocks(pooled_rows: Array, used: Array, coarse: Array, grid: Triple, affine: Array) -> Blocks:
    """Make blocks: means of up to eight pooled vectors beside coarse vectors, each half of length sqrt(1/2).

    Args:
        pooled_rows: (cells, C) of the 8 mm cells that hold body, in the order of ``used``.
        used: bool (z, y, x), which 8 mm cells these are; at least one.
        coarse: (z, y, x, C).
        grid: fine cells along z, y, x.
        affine: of the 2 mm grid, voxel (x, y, z) to world mm.
    """
    cells = np.argwhere(used)
    first, members, alternate = _blocks_of(cells, used.shape)
    order = np.argsort(members, kind="stable")
    starts = np.searchsorted(members[order], np.arange(len(first)))
    fine = np.add.reduceat(pooled_rows[order], starts, axis=0)
    weights = lattice_weights(grid, (coarse.shape[0], coarse.shape[1], coarse.shape[2]), 4)
    context = interpolate_at(coarse, weights, tuple((cells[first] // 2).T))
    halves = [
        half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12) for half in (fine, context)
    ]
    vectors = (np.concatenate(halves, axis=1) * np.sqrt(0.5)).astype(np.float32)

    middles = np.minimum(2 * cells + 0.5, np.array(grid) - 1)  # in fine cells
    sums = np.stack([np.bincount(members, axis) for axis in middles.T], axis=-1)
    points = cell_to_world(sums / np.bincount(members)[:, None], affine, "fine")
    return Blocks(vectors, points, alternate)


def _blocks_of(cells: Array, shape: tuple[int, ...]) -> tuple[Array, Array, int]:
    """For 8 mm cells (m, 3): first cell of each block, block of each cell (m,), and number of alternate blocks."""
    blocks = cells // 2
    size = (np.array(shape) + 1) // 2
    flat = flat_index(blocks, (int(size[0]), int(size[1]), int(size[2])))
    other = (blocks.sum(axis=1) - blocks[0].sum()) % 2  # at least one block has the first cell's colour
    values, first, members = np.unique(other * size.prod() + flat, return_index=True, return_inverse=True)
    return first, members, int((values < size.prod()).sum())
