"""The cells of an embedding at one resolution: coarse map interpolated, fine map pooled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from custom.landmarks.sam.scan_grid import Triple

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Lattice:
    """The cells of an embedding at one resolution, as a search sees them.

    Attributes:
        grid: cells along z, y, x.
        weights: for each axis (cells, coarse cells), the share of each coarse cell in a cell: trilinear
            interpolation with ``align_corners=False``.
        norm: (rows,) lengths of the interpolated coarse vectors, float16 or float32.
        outside: bool (cells,), True off the body; None if all cells count.
        dot: fine similarities of some cells (flat indices, or None for all) to a vector (C,).
        rows: (cells,), the row of ``norm`` for each cell (any row for cells that do not count); None if each
            cell has its own row.
    """

    grid: Triple
    weights: tuple[Array, Array, Array]
    norm: Array
    outside: Array | None
    dot: Callable[[Array | None, Array], Array]
    rows: Array | None = None

    @functools.cached_property
    def inverse_norm(self) -> Array:
        """(cells,) float32, one over ``norm``; for few cells use :meth:`inverse_norm_at`."""
        return self.inverse_norm_at(slice(None))

    def inverse_norm_at(self, cells: Array | slice) -> Array:
        """``inverse_norm`` at some cells (flat indices)."""
        rows = cells if self.rows is None else self.rows[cells]
        inverse: Array = 1 / np.maximum(self.norm[rows].astype(np.float32), np.float32(1e-6))
        return inverse

    def coarse_similarity(self, similarity: Array) -> Array:
        """Similarities on the coarse grid (z, y, x), interpolated and normalised again: (cells,), -3 outside the body.

        Interpolation commutes with the dot product, so one number per cell is interpolated, not C.
        """
        along_z, along_y, along_x = self.weights
        wide = along_y @ (similarity @ along_x.T)  # (cz, y, x)
        total = (along_z @ wide.reshape(len(wide), -1)).reshape(-1)
        total *= self.inverse_norm
        if self.outside is not None:
            total[self.outside] = -3.0
        return total


def make_lattice(
    coarse: Array,
    fine_grid: Triple,
    pooling: int,
    outside: Array | None,
    dot: Callable,
    norm: Array | None = None,
    rows: Array | None = None,
) -> Lattice:
    """Make the lattice of the fine grid (``pooling`` 1), or of cubes with sides of ``pooling`` fine cells.

    Args:
        coarse: (z, y, x, C).
        fine_grid: fine cells along z, y, x.
        pooling: fine cells along each side of a cube.
        outside: see :class:`Lattice`.
        dot: see :class:`Lattice`.
        norm: see :class:`Lattice`; computed if None.
        rows: see :class:`Lattice`.
    """
    weights = lattice_weights(fine_grid, coarse.shape[:3], pooling)
    grid: Triple = (len(weights[0]), len(weights[1]), len(weights[2]))
    norm = coarse_norm(coarse, weights) if norm is None else norm
    return Lattice(grid, weights, norm, outside, dot, rows)


def lattice_weights(
    fine_grid: Triple, coarse_grid: tuple[int, ...], pooling: int
) -> tuple[Array, Array, Array]:
    """Interpolation weights per axis, at the middle of each cube of fine cells."""
    axes = []
    for n, m in zip(fine_grid, coarse_grid, strict=True):
        first = np.arange(0, n, pooling)
        middle = 0.5 * (first + np.minimum(first + pooling, n) - 1)
        axes.append(axis_weights(middle, n, m))
    return axes[0], axes[1], axes[2]


def axis_weights(positions: Array, size: int, coarse_size: int) -> Array:
    """(positions, coarse cells) float32: linear interpolation as torch does it with ``align_corners=False``."""
    source = np.clip((np.asarray(positions) + 0.5) * (coarse_size / size) - 0.5, 0, coarse_size - 1)
    low = np.minimum(source.astype(int), max(coarse_size - 2, 0))
    weights = np.zeros((len(source), coarse_size), np.float32)
    rows = np.arange(len(source))
    weights[rows, low] = 1 - (source - low)
    weights[rows, np.minimum(low + 1, coarse_size - 1)] += source - low
    return weights


def corners_at(
    weights: tuple[Array, Array, Array], cells: tuple[Array, ...]
) -> Iterator[tuple[tuple[Array, Array, Array], Array]]:
    """Yield the eight coarse cells around each cell (three index arrays (N,)): indices z, y, x and weights (N,)."""
    axes = []
    for weight, index in zip(weights, cells, strict=True):
        low = np.minimum((weight > 0).argmax(axis=1), max(weight.shape[1] - 2, 0))[index]
        high = np.minimum(low + 1, weight.shape[1] - 1)
        part = weight[index, low]
        axes.append(((low, part), (high, 1 - part)))
    for z, weight_z in axes[0]:
        for y, weight_y in axes[1]:
            for x, weight_x in axes[2]:
                yield (z, y, x), weight_z * weight_y * weight_x


def interpolate_at(values: Array, weights: tuple[Array, Array, Array], cells: tuple[Array, ...]) -> Array:
    """Interpolate (z, y, x, ...) at cells given as three index arrays (N,): (N, ...), from eight corners."""
    shape = (-1,) + (1,) * (values.ndim - 3)
    total: Any = 0.0
    for corner, part in corners_at(weights, cells):
        total = total + values[corner] * part.reshape(shape)
    return total


def coarse_norm(coarse: Array, weights: tuple[Array, Array, Array]) -> Array:
    """Lengths (cells,) of the coarse vectors interpolated to a lattice, slice by slice."""
    along_z, along_y, along_x = weights
    wide = np.einsum("zyxc,Yy,Xx->zYXc", coarse, along_y, along_x, optimize=True).astype(np.float32)
    flat = wide.reshape(len(wide), -1)
    slices = [(row @ flat).reshape(-1, coarse.shape[-1]) for row in along_z]
    return np.concatenate([np.sqrt(np.einsum("nc,nc->n", s, s)) for s in slices])


def pool(fine: Array, body: Array | None) -> tuple[Array, Array]:
    """Means of 2 x 2 x 2 fine vectors, normalised to length 1, and which of these cells hold any body.

    Args:
        fine: (z, y, x, C).
        body: bool (z, y, x), cells to use; None for all.

    Returns:
        (ceil z/2, ceil y/2, ceil x/2, C) float32, and bool of the same grid.
    """
    grid = fine.shape[:3]
    size = tuple((n + 1) // 2 for n in grid)
    inside = np.ones(grid, bool) if body is None else body
    total, used = np.zeros((*size, fine.shape[-1]), np.float32), np.zeros(size, bool)
    for corner in np.ndindex(2, 2, 2):
        part = tuple(slice(first, None, 2) for first in corner)
        place = tuple(slice(0, n) for n in inside[part].shape)
        total[place] += np.where(inside[part][..., None], fine[part], 0)
        used[place] |= inside[part]
    total /= np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
    return total, used


def dot_of(rows: Array) -> Callable[[Array | None, Array], Array]:
    """Make ``Lattice.dot`` from vectors in memory (cells, C)."""
    return lambda index, vector: rows @ vector if index is None else rows[index] @ vector


def flat_index(cells_zyx: Array, grid: Triple) -> Array:
    """Flat indices of cells (N, 3)."""
    return (cells_zyx[:, 0] * grid[1] + cells_zyx[:, 1]) * grid[2] + cells_zyx[:, 2]
