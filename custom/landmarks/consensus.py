"""One smooth map between two scans that many of their matches agree on, and points found near what it says.

A single best match may be far off: left for right, one vertebra for the next. A few hundred of them, weighed by
whether they come back, agree on an affine map (as SAM-affine of the same authors does: SAME, spec 2.5) and on how it
bends. A point is then looked for near where that map takes it. The bending and the search near it are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.landmarks.blocks import Blocks
from custom.landmarks.lattice import flat_index
from custom.landmarks.matching import Matches
from custom.landmarks.scan_grid import cell_to_world, world_to_cell
from custom.landmarks.search import REFUSED, similarities
from custom.landmarks.searchable import (
    EmbeddingMap,
    Searchable,
    coarse_vectors,
    prepare_pair,
    query_cells,
)

Array = NDArray[Any]

ANCHORS = (
    512  # blocks of Q that are matched (ours; 256 make the map a millimetre worse, 1,024 a quarter better)
)
CYCLE_MM = 24.0  # a match that comes back so far off counts half (one and a half blocks; ours)
AGREE_MM = 20.0  # a match this near to the affine map supports it (ours)
ABOUT, ABOUT_EVEN = 64, 128  # blocks about the one point that a map is for, and of the whole scan (ours)
ABOUT_MM = 90.0  # and the standard deviation of their distance from it (ours)
BEND_MM = 60.0  # over which the bending varies (ours)
BEND_SIZE_MM, BEND_NOISE_MM = 20.0, 30.0  # how large it may be, and how far single matches scatter (ours)
NEAR_MM = 8.0  # how far from the map a point may well lie (standard deviation; ours)
REACH_MM = 24.0  # and how far it is looked for (ours; 36 answers the same)
SHARPNESS = 0.03  # differences of similarity that count as much as one standard deviation of nearness (ours)


class PairMap(NamedTuple):
    """Where the anatomy of scan Q lies in scan K: an affine map and a smooth bending of it.

    Attributes:
        matrix: (3, 3).
        middle_q, middle_k: (3,) mm; ``matrix`` turns about them.
        anchors_mm: (n, 3) of Q, where the bending is known.
        pull: (n, 3), what each anchor adds, times its nearness.
        support: share of matches that agree with the affine map to 20 mm: next to none where two scans have no
            anatomy in common.
    """

    matrix: Array
    middle_q: Array
    middle_k: Array
    anchors_mm: Array
    pull: Array
    support: float

    def __call__(self, points_mm: Array) -> Array:
        """(N, 3) mm of K for (N, 3) mm of Q."""
        points = np.asarray(points_mm, dtype=float)
        return self._affine(points) + _nearness(points, self.anchors_mm) @ self.pull

    def _affine(self, points: Array) -> Array:
        return (points - self.middle_q) @ self.matrix.T + self.middle_k


def fit_pair_map(
    blocks_q: Blocks, blocks_k: Blocks, *, about_mm: ArrayLike | None = None, anchors: int | None = None
) -> PairMap:
    """The map that the matches of two scans agree on.

    Blocks of Q are matched to every second one of K, and back to every second one of Q (another one comes back 16 mm off at
    best, and counts two thirds). The affine map is fitted by re-weighted least squares (Cauchy's weights,
    slightly held to the identity), what is left by Gaussian process regression with robust noise.

    Args:
        blocks_q: of the scan that is asked.
        blocks_k: of the other.
        about_mm: (3,), the one point of Q that the map is for: 64 anchors around it and 128 of the whole scan make it as
            good there as nearly three times as many evenly drawn. None is for all points.
        anchors: evenly drawn blocks of Q to match; by default 512, or 128 about a point.

    Returns:
        The map; ask its ``support`` before trusting it: it counts evenly drawn anchors only.
    """
    rng = np.random.default_rng(0)
    count = anchors or (ANCHORS if about_mm is None else ABOUT_EVEN)
    even = rng.permutation(len(blocks_q.vectors))[:count]
    chosen = even
    if about_mm is not None:
        near = _blocks_near(np.asarray(about_mm, dtype=float), blocks_q.points_mm, rng)
        chosen = np.r_[even, np.setdiff1d(near, even)]
    points_q = blocks_q.points_mm[chosen]
    there = (blocks_q.vectors[chosen] @ blocks_k.vectors[: blocks_k.alternate].T).argmax(axis=1)
    back = (blocks_k.vectors[there] @ blocks_q.vectors[: blocks_q.alternate].T).argmax(axis=1)
    points_k = blocks_k.points_mm[there]
    cycle_mm = np.linalg.norm(blocks_q.points_mm[back] - points_q, axis=1)
    trust = 1 / (1 + (cycle_mm / CYCLE_MM) ** 2)

    # the evenly drawn ones tell what the scans have in common; those about a point only how it bends there
    whole = slice(len(even))
    matrix, middle_q, middle_k = robust_affine(points_q[whole], points_k[whole], trust[whole])
    left = points_k - (points_q - middle_q) @ matrix.T - middle_k
    support = float((np.linalg.norm(left[whole], axis=1) < AGREE_MM).mean())
    pull = bend(points_q, left, trust)
    return PairMap(matrix, middle_q, middle_k, points_q, pull, support)


def _blocks_near(point_mm: Array, places_mm: Array, rng: np.random.Generator) -> Array:
    """Blocks drawn by nearness to a point, without replacement."""
    squared = ((places_mm - point_mm) ** 2).sum(axis=1)
    # of exponential arrival times the first ones: rates fall off as a normal density does
    arrival = np.log(rng.exponential(size=len(places_mm))) + squared / (2 * ABOUT_MM**2)
    near: Array = np.argpartition(arrival, min(ABOUT, len(places_mm)) - 1)[:ABOUT]
    return near


def robust_affine(points_q: Array, points_k: Array, trust: Array) -> tuple[Array, Array, Array]:
    """Affine map between matched points of which many are wrong.

    Args:
        points_q: (n, 3) mm.
        points_k: (n, 3) mm, where they were found.
        trust: (n,) weights.

    Returns:
        (3, 3) matrix and the two points about which it turns.
    """
    shift = points_k - points_q
    typical = np.median(shift[trust >= np.median(trust)], axis=0)
    weight = trust / (1 + (np.linalg.norm(shift - typical, axis=1) / 60.0) ** 2)
    held = 200.0 * np.eye(3)  # mm^2: as if the points spread by 14 mm more, unchanged (ours)
    matrix, middle_q, middle_k = np.eye(3), points_q.mean(axis=0), points_k.mean(axis=0)
    for _ in range(30):
        share = weight / weight.sum()
        middle_q, middle_k = share @ points_q, share @ points_k
        from_q, from_k = points_q - middle_q, points_k - middle_k
        weighed = share[:, None] * from_q
        before, matrix = matrix, np.linalg.solve(from_q.T @ weighed + held, weighed.T @ from_k + held).T
        off = np.linalg.norm(from_k - from_q @ matrix.T, axis=1)
        weight = trust / (1 + (off / max(12.0, float(np.median(off)))) ** 2)
        if np.abs(matrix - before).max() < 1e-4:  # a hundredth of a millimetre at 10 cm
            break
    return matrix, middle_q, middle_k


def bend(anchors_mm: Array, left_mm: Array, trust: Array) -> Array:
    """Gaussian process regression of what an affine map leaves, with noise that grows with the misfit.

    Args:
        anchors_mm: (n, 3).
        left_mm: (n, 3), displacements.
        trust: (n,) weights.

    Returns:
        (n, 3): a point's displacement is its nearness to the anchors times this.
    """
    alike = _nearness(anchors_mm, anchors_mm)
    weight, pull = trust, np.zeros_like(left_mm)
    for _ in range(4):
        noise = np.diag(BEND_NOISE_MM**2 / np.maximum(weight, 1e-3))
        pull = np.linalg.solve(alike + noise, left_mm)
        off = np.linalg.norm(left_mm - alike @ pull, axis=1)
        weight = trust / (1 + (off / 15.0) ** 2)
    return pull


def match_near(
    points_mm: ArrayLike, expected_mm: ArrayLike, embedding_q: Searchable, embedding_k: Searchable
) -> Matches:
    """Find points near where they are expected.

    The answer is the mean of all fine cells within reach, weighed by similarity and nearness, plus what the point
    lies off its own cell's middle.

    Args:
        points_mm: (N, 3) world mm, of scan Q.
        expected_mm: (N, 3) world mm, of scan K.
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search.

    Returns:
        Points and scores. A point off Q's grid or body gets nan and -1. One that is expected off K's, by more than
        8 mm, is given where it is expected, with score -1: not to be used as a match.
    """
    points, expected = (np.atleast_2d(np.asarray(p, dtype=float)) for p in (points_mm, expected_mm))
    map_q, map_k = prepare_pair(embedding_q, embedding_k)
    cells, inside = query_cells(points, map_q)
    found, scores = np.full(points.shape, np.nan), np.full(len(points), REFUSED)
    found[inside] = expected[inside]
    asked = np.flatnonzero(inside & (_outside_mm(expected, map_k) <= NEAR_MM))
    if not len(asked):
        return Matches(found, scores)
    fine, coarse = map_q.fine_vectors(cells[asked]), coarse_vectors(map_q, cells[asked])
    off_middle = points[asked] - cell_to_world(cells[asked], map_q.affine, "fine")
    for row, i in enumerate(asked):
        around = _cells_near(expected[i], map_k)
        if not len(around):
            continue
        total = similarities(
            map_k,
            flat_index(around, map_k.grid),
            fine[row],
            _coarse_similarity_near(around, coarse[row], map_k),
        )
        places = cell_to_world(around, map_k.affine, "fine")
        likely = total / SHARPNESS - ((places - expected[i]) ** 2).sum(axis=1) / (2 * NEAR_MM**2)
        share = np.exp(likely - likely.max())
        found[i] = share @ places / share.sum() + off_middle[row]
        scores[i] = total[likely.argmax()]
    return Matches(found, scores)


def _coarse_similarity_near(cells: Array, vector: Array, scan: EmbeddingMap) -> Array:
    """Similarities (z, y, x) of a coarse vector (C,) to the coarse cells that fine cells (n, 3) lie between; 0 elsewhere."""
    weights = scan.fine_lattice.weights
    spans = [
        np.flatnonzero(w[a : b + 1].any(axis=0))
        for w, a, b in zip(weights, cells.min(0), cells.max(0), strict=True)
    ]
    box = tuple(slice(span[0], span[-1] + 1) for span in spans)
    similarity = np.zeros(scan.coarse_stored.shape[:3], np.float32)
    similarity[box] = scan.coarse_stored[box].astype(np.float32) @ vector
    return similarity


def _outside_mm(points_mm: Array, scan: EmbeddingMap) -> Array:
    """How far points lie outside of a scan's voxels, along the axis where it is most; infinite for nan."""
    inverse = np.linalg.inv(scan.affine)
    voxels = points_mm @ inverse[:3, :3].T + inverse[:3, 3]
    off = np.maximum(-0.5 - voxels, voxels - (np.array(scan.shape) - 0.5)).max(axis=1)
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0).max()
    return np.nan_to_num(off * spacing, nan=np.inf)


def _cells_near(point_mm: Array, scan: EmbeddingMap) -> Array:
    """Fine cells (n, 3) of the body in a box about a point; none if the point lies far off the body."""
    middle = world_to_cell(point_mm, scan.affine, "fine")
    reach = REACH_MM / np.linalg.norm(
        cell_to_world(np.eye(3), scan.affine, "fine") - cell_to_world(np.zeros(3), scan.affine, "fine"),
        axis=1,
    )
    low = np.maximum(np.floor(middle - reach), 0).astype(int)
    high = np.minimum(np.ceil(middle + reach) + 1, scan.grid).astype(int)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return cells if scan.body is None else cells[scan.body[tuple(cells.T)]]


def _nearness(points: Array, anchors: Array) -> Array:
    """(N, n) covariances of the bending, mm^2."""
    squared = (points**2).sum(1)[:, None] + (anchors**2).sum(1) - 2 * points @ anchors.T
    near: Array = BEND_SIZE_MM**2 * np.exp(-np.maximum(squared, 0) / (2 * BEND_MM**2))
    return near
