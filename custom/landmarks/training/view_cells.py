"""The cells of SAM's maps of a view, and which cells of two views show the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from custom.landmarks.sam.scan_grid import Level

Array = NDArray[Any]


class Cells(NamedTuple):
    """Cells of a feature map: where they are, which lie in the scan, and which in the body."""

    places_mm: Array  # (N, 3)
    inside: Array  # bool (N,)
    body: Array  # bool (N,)


def cell_indices(size_xyz: Sequence[int] | Array, level: Level) -> Array:
    """Indices (N, 3), z, y, x, of all cells that SAM gives a volume of this size, in the maps' order."""
    x, y, z = (int(n) for n in size_xyz)
    z //= 2  # the pool rounds down, the convolutions up
    y, x = -(-y // 2), -(-x // 2)
    if level == "coarse":
        z, y, x = -(-z // 2), -(-y // 8), -(-x // 8)
    return np.stack(np.meshgrid(np.arange(z), np.arange(y), np.arange(x), indexing="ij"), -1).reshape(-1, 3)


def matched_cells(
    here: Cells,
    there: Cells,
    within_mm: float,
    within_z_mm: float = np.inf,
    rng: np.random.Generator | None = None,
    tried: int | None = None,
) -> Array:
    """Cells of the body with a counterpart: (n, 2) rows of (cell here, the nearest cell there).

    Args:
        here, there: cells of both views, in one space.
        within_mm, within_z_mm: how far the nearest cell may be, in all and along z.
        rng: to take the cells in random order; None keeps the maps' order.
        tried: how many cells to look at; None for all.
    """
    candidates, targets = np.flatnonzero(here.body), np.flatnonzero(there.inside)
    if rng is not None:
        candidates = rng.permutation(candidates)[:tried]
    if not len(candidates) or not len(targets):
        return np.empty((0, 2), dtype=np.int64)
    distance, nearest = cKDTree(there.places_mm[targets]).query(here.places_mm[candidates])
    apart_z = np.abs(there.places_mm[targets[nearest], 2] - here.places_mm[candidates, 2])
    good = (distance < within_mm) & (apart_z < within_z_mm)
    return np.stack([candidates[good], targets[nearest[good]]], axis=1)
