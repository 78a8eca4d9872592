"""Search a scan for the most similar cell: exactly by branch and bound, fast, or as SAM's authors do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from custom.landmarks.embeddings.embedding_map import EmbeddingMap
from custom.landmarks.embeddings.lattice import Lattice, flat_index, interpolate_at

Method: TypeAlias = Literal["exact", "fast", "exhaustive"]
METHODS = ("exact", "fast", "exhaustive")
Array: TypeAlias = NDArray[Any]
REFUSED = -1.0  # the score of a point that cannot be matched; a cosine so low does not occur otherwise
_WINDOW = 8  # fine cells along each side of the box around the pooled winner (ours)
_BATCH = 4096  # cells whose fine similarity is computed at a time (ours)
_SLACK = 1e-5  # for rounding: the product of a unit vector with itself may exceed 1 a little


class Search:
    """Searches one scan for one query vector after another; remembers what refining needs."""

    def __init__(self, target: EmbeddingMap, method: Method) -> None:
        self.target, self.method = target, method
        self.official: Callable[[Array, Array], Array] | None = None
        if method == "exhaustive":
            self.official = OfficialSimilarity(target)

    def __call__(self, fine: Array, coarse: Array, coarse_similarity: Array) -> tuple[int, float]:
        """Flat index of the best fine cell, and its similarity."""
        self.vector, self.coarse_similarity = fine, coarse_similarity
        if self.official is not None:
            total = self.official(fine, coarse)
            index = int(total.argmax())
            return index, float(total[index])
        index, best = self._fast()
        return (index, best) if self.method == "fast" else self._exact(index, best)

    def position(self, index: int, refine: bool) -> Array:
        """The place (z, y, x) of a cell, with fractions if ``refine``."""
        grid = self.target.grid
        cell = np.array(np.unravel_index(index, grid))
        if not refine:
            return cell.astype(float)
        steps = np.concatenate([np.zeros((1, 3), int), np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        cells = cell + steps
        valid = ((cells >= 0) & (cells < grid)).all(axis=1)
        if self.target.body is not None:
            valid[valid] = self.target.body[tuple(cells[valid].T)]
        totals = np.full(7, np.nan)
        totals[valid] = self._totals(flat_index(cells[valid], grid))
        here, above, below = totals[0], totals[1:4], totals[4:]
        bend = above - 2 * here + below
        with np.errstate(invalid="ignore", divide="ignore"):
            vertex = np.where(bend < -1e-9, 0.5 * (below - above) / bend, 0.0)
        return cell + np.nan_to_num(vertex).clip(-0.5, 0.5)

    def _fast(self) -> tuple[int, float]:
        lattice = self.target.pooled_lattice
        index, _ = branch_and_bound(
            lattice, self.vector, lattice.coarse_similarity(self.coarse_similarity), -1.0
        )
        centre = 2 * np.array(np.unravel_index(index, lattice.grid))
        start = np.clip(centre - _WINDOW // 2 + 1, 0, np.maximum(np.array(self.target.grid) - _WINDOW, 0))
        stop = np.minimum(start + _WINDOW, self.target.grid)
        axes = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        if self.target.body is not None:
            cells = cells[self.target.body[tuple(cells.T)]]
        flat = flat_index(cells, self.target.grid)
        totals = self._totals(flat)
        top = int(totals.argmax())
        return int(flat[top]), float(totals[top])

    def _exact(self, index: int, best: float) -> tuple[int, float]:
        lattice = self.target.fine_lattice
        return branch_and_bound(
            lattice, self.vector, lattice.coarse_similarity(self.coarse_similarity), best, index
        )

    def _totals(self, flat: Array) -> Array:
        fine, coarse = similarity_parts(self.target, flat, self.vector, self.coarse_similarity)
        total: Array = 0.5 * (fine + coarse)
        return total


def similarity_parts(
    target: EmbeddingMap, flat: Array, vector: Array, coarse_similarity: Array
) -> tuple[Array, Array]:
    """Fine and coarse similarities of some fine cells; coarse ones are interpolated only there.

    Args:
        target: the scan searched.
        flat: (n,) flat indices of fine cells in the body.
        vector: (C,) fine vector of the query.
        coarse_similarity: (z, y, x), of the query's coarse vector to all coarse cells.
    """
    cells = np.unravel_index(flat, target.grid)
    lattice = target.fine_lattice
    coarse = interpolate_at(coarse_similarity, lattice.weights, cells) * lattice.inverse_norm_at(flat)
    return lattice.dot(flat, vector), coarse


def branch_and_bound(
    lattice: Lattice, vector: Array, coarse: Array, best: float, index: int = -1
) -> tuple[int, float]:
    """Find the cell of largest total similarity; cells that cannot win are skipped.

    A fine cosine is at most 1, so the total of a cell is at most (1 + coarse) / 2.

    Args:
        lattice: where to search.
        vector: (C,) of the query.
        coarse: (cells,) coarse similarity.
        best: a total that some cell, ``index``, is known to reach; -1 if none is known.
        index: that cell.

    Returns:
        Flat index and total. Among equal totals the first cell wins, as in ``argmax``.
    """
    if index < 0:  # start where the coarse map is best, so that the bound is tight at once
        likely = np.flatnonzero(coarse >= coarse.max() - 0.02)
        likely = likely[: _BATCH // 8]
        totals = 0.5 * (lattice.dot(likely, vector) + coarse[likely])
        top = int(totals.argmax())
        index, best = int(likely[top]), float(totals[top])
    open_cells = np.flatnonzero(coarse >= 2 * best - 1 - _SLACK)
    if 3 * len(open_cells) > len(coarse):  # the bound is loose: one pass over all cells is quicker
        totals = 0.5 * (lattice.dot(None, vector) + coarse)
        top = int(totals.argmax())
        return top, float(totals[top])
    if len(open_cells) > _BATCH:
        open_cells = open_cells[np.argsort(-coarse[open_cells], kind="stable")]
    for start in range(0, len(open_cells), _BATCH):
        some = open_cells[start : start + _BATCH]
        if 0.5 * (1 + coarse[some[0]]) < best - _SLACK and start:
            break  # sorted in falling order: no later cell can win
        totals = 0.5 * (lattice.dot(some, vector) + coarse[some])
        highest = float(totals.max())
        first = int(some[totals == highest].min())
        if highest > best or (highest == best and first < index):
            index, best = first, highest
    return index, best


class OfficialSimilarity:
    """The authors' arithmetic: both coarse volumes at the fine size, two 1 x 1 x 1 convolutions, their mean."""

    def __init__(self, target: EmbeddingMap) -> None:
        embedding = target.decode()
        self.fine, self.coarse = embedding.fine.float().cpu()[None], embedding.coarse.float().cpu()[None]
        self.body = target.body

    def __call__(self, fine: Array, coarse: Array) -> Array:
        """(cells,) similarities to a query's vectors (C,), -1 off the body."""
        upsampled = upsample(self.coarse, self.fine.shape[2:])
        similarity = F.conv3d(self.fine, torch.from_numpy(np.array(fine)).view(1, -1, 1, 1, 1))
        similarity += F.conv3d(upsampled, torch.from_numpy(np.array(coarse)).view(1, -1, 1, 1, 1))
        total = (similarity / 2).view(-1).numpy()
        if self.body is not None:
            total[~self.body.reshape(-1)] = REFUSED
        return total


def upsample(coarse: Tensor, size: Any) -> Tensor:
    """The coarse map (B, C, z, y, x) on the fine grid, of length 1 again."""
    return F.normalize(F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=False), dim=1)
