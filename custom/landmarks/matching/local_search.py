"""Search for points near their expected places: among fine cells, or faster among their 8 mm means."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.landmarks.embeddings.embedding_map import (
    EmbeddingMap,
    Searchable,
    coarse_vectors,
    prepare_pair,
    query_cells,
)
from custom.landmarks.embeddings.lattice import Lattice, corners_at, flat_index
from custom.landmarks.matching.points import Matches
from custom.landmarks.matching.search import REFUSED, similarity_parts
from custom.landmarks.sam.scan_grid import cell_to_world, world_to_cell

Array = NDArray[Any]

FINE_SHARE = 0.75  # weight of fine similarity among near cells (ours; one half in a search of the whole scan)
SHARPNESS = 0.026  # this difference of similarity counts as much as one standard deviation of distance (ours)
NEAR_MM = 6.0  # standard deviation of a point's distance from its expected place (ours)
REACH_MM = 20.0  # how far from its expected place a point is searched (ours)
ROUGH_NEAR_MM = 8.0  # as NEAR_MM, among 8 mm means, which are less exact (ours)
ROUGH_REACH = 3  # as REACH_MM, in cells of 8 mm
OUTSIDE_MM = 8.0  # a point that is expected farther outside a scan than this is not searched (ours)
_TOGETHER = 128  # points whose surroundings are in memory at a time


def match_near(
    points_mm: ArrayLike, expected_mm: ArrayLike, embedding_q: Searchable, embedding_k: Searchable
) -> Matches:
    """Find points near their expected places.

    The answer is the mean of all fine cells within reach, weighted by similarity and nearness, plus the
    point's offset from the middle of its own cell. The score is the mean of fine and coarse similarity at the
    likeliest cell.

    Args:
        points_mm: (N, 3) world mm, of scan Q.
        expected_mm: (N, 3) world mm, of scan K.
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search.

    Returns:
        Points and scores. A point outside Q's grid or body gets nan and score -1. A point that is expected
        more than 8 mm outside K's grid is returned at its expected place with score -1; it is not a match.

    Raises:
        AliceError: if the embeddings do not compare.
    """
    points, expected = (np.atleast_2d(np.asarray(p, dtype=float)) for p in (points_mm, expected_mm))
    map_q, map_k = prepare_pair(embedding_q, embedding_k)
    cells, inside = query_cells(points, map_q)
    found, scores = np.full(points.shape, np.nan), np.full(len(points), REFUSED)
    found[inside] = expected[inside]
    asked = np.flatnonzero(inside & (outside_mm(expected, map_k) <= OUTSIDE_MM))
    if not len(asked):
        return Matches(found, scores)
    fine, coarse = map_q.fine_vectors(cells[asked]), coarse_vectors(map_q, cells[asked])
    off_middle = points[asked] - cell_to_world(cells[asked], map_q.affine, "fine")
    for row, i in enumerate(asked):
        around = _cells_near(expected[i], map_k)
        if not len(around):
            continue
        fine_part, coarse_part = similarity_parts(
            map_k,
            flat_index(around, map_k.grid),
            fine[row],
            _coarse_similarity_near(around, coarse[row], map_k),
        )
        places = cell_to_world(around, map_k.affine, "fine")
        likely = _likelihood(fine_part, coarse_part, places, expected[i], NEAR_MM)
        share = np.exp(likely - likely.max())
        found[i] = share @ places / share.sum() + off_middle[row]
        top = likely.argmax()
        scores[i] = 0.5 * (fine_part[top] + coarse_part[top])
    return Matches(found, scores)


def match_roughly_near(
    points_mm: ArrayLike, expected_mm: ArrayLike, embedding_q: Searchable, embedding_k: Searchable
) -> Array:
    """As :func:`match_near`, but among means of 2 x 2 x 2 fine cells, which takes a tenth of the time.

    A point that is expected outside K's grid is also searched, and may be found at its edge; see
    :func:`outside_mm`.

    Returns:
        (N, 3) world mm of K; nan for a point outside Q's grid or body, or without any body of K within 24 mm.

    Raises:
        AliceError: if the embeddings do not compare.
    """
    points, expected = (np.atleast_2d(np.asarray(p, dtype=float)) for p in (points_mm, expected_mm))
    map_q, map_k = prepare_pair(embedding_q, embedding_k)
    cells, inside = query_cells(points, map_q)
    found = np.full(points.shape, np.nan)
    asked = np.flatnonzero(inside & np.isfinite(expected).all(axis=1))
    for some in np.array_split(asked, -(-len(asked) // _TOGETHER)) if len(asked) else ():
        off_middle = points[some] - cell_to_world(cells[some], map_q.affine, "fine")
        found[some] = _rough_means(cells[some], expected[some], map_q, map_k) + off_middle
    return found


def _rough_means(cells_zyx: Array, expected: Array, map_q: EmbeddingMap, map_k: EmbeddingMap) -> Array:
    """Weighted means (n, 3) of the 8 mm cells around the expected places, for fine cells (n, 3) of Q."""
    lattice = map_k.pooled_lattice
    size = np.array(lattice.grid)
    middle = np.rint((world_to_cell(expected, map_k.affine, "fine") - 0.5) / 2).astype(int)
    around = middle[:, None] + _BALL  # (n, m, 3)
    within = np.all((around >= 0) & (around < size), axis=2)
    shape, around = within.shape, np.clip(around, 0, size - 1).reshape(-1, 3)
    flat = flat_index(around, lattice.grid)
    if lattice.outside is not None:
        within = within & ~lattice.outside[flat].reshape(shape)

    # cells outside are read as well, but get no weight
    vectors = map_k.pooled_vectors(flat).reshape(*shape, -1)
    fine_part = np.einsum("nmc,nc->nm", vectors, map_q.fine_vectors(cells_zyx), optimize=True)
    box = _coarse_box(around, lattice)
    context = map_k.coarse_stored[box].astype(np.float32)
    similar = np.einsum("zyxc,nc->nzyx", context, coarse_vectors(map_q, cells_zyx), optimize=True)
    row, coarse_part = np.repeat(np.arange(shape[0]), shape[1]), np.zeros(len(flat), np.float32)
    for corner, part in corners_at(lattice.weights, tuple(around.T)):
        # a corner outside the box has weight 0
        z, y, x = (
            np.clip(c - span.start, 0, span.stop - span.start - 1)
            for c, span in zip(corner, box, strict=True)
        )
        coarse_part += similar[row, z, y, x] * part
    coarse_part *= lattice.inverse_norm_at(flat)

    places = np.minimum(2 * around + 0.5, np.array(map_k.grid) - 1)  # in fine cells
    places = cell_to_world(places, map_k.affine, "fine").reshape(*shape, 3)
    likely = _likelihood(fine_part, coarse_part.reshape(shape), places, expected[:, None], ROUGH_NEAR_MM)
    likely = np.where(within, likely, -np.inf)
    some = np.any(within, axis=1)
    share = np.exp(likely[some] - likely[some].max(axis=1, keepdims=True))
    means = np.full((shape[0], 3), np.nan)
    means[some] = np.einsum("nm,nmk->nk", share, places[some]) / share.sum(axis=1, keepdims=True)
    return means


def _likelihood(fine: Array, coarse: Array, places: Array, expected: Array, near_mm: float) -> Array:
    """Log-likelihood, up to a constant, that a point lies at each of some places (..., 3)."""
    similar = FINE_SHARE * fine + (1 - FINE_SHARE) * coarse
    likely: Array = similar / SHARPNESS - ((places - expected) ** 2).sum(axis=-1) / (2 * near_mm**2)
    return likely


def _ball(reach: int) -> Array:
    """Offsets (m, 3) of all cells within ``reach``."""
    steps = np.arange(-reach, reach + 1)
    offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    return offsets[(offsets**2).sum(axis=1) <= reach**2]


_BALL = _ball(ROUGH_REACH)


def _coarse_similarity_near(cells: Array, vector: Array, scan: EmbeddingMap) -> Array:
    """Similarities (z, y, x) of a coarse vector (C,) to the coarse cells around fine cells (n, 3); 0 elsewhere."""
    box = _coarse_box(cells, scan.fine_lattice)
    similarity = np.zeros(scan.coarse_stored.shape[:3], np.float32)
    similarity[box] = scan.coarse_stored[box].astype(np.float32) @ vector
    return similarity


def _coarse_box(cells: Array, lattice: Lattice) -> tuple[slice, ...]:
    """The box of coarse cells, along z, y, x, around cells (n, 3) of a lattice."""
    spans = [
        np.flatnonzero(weights[low : high + 1].any(axis=0))
        for weights, low, high in zip(lattice.weights, cells.min(0), cells.max(0), strict=True)
    ]
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


def outside_mm(points_mm: Array, scan: EmbeddingMap) -> Array:
    """How far points lie outside a scan's voxels, along the worst axis; negative inside, infinite for nan."""
    inverse = np.linalg.inv(scan.affine)
    voxels = points_mm @ inverse[:3, :3].T + inverse[:3, 3]
    off = np.maximum(-0.5 - voxels, voxels - (np.array(scan.shape) - 0.5)).max(axis=1)
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0).max()
    return np.nan_to_num(off * spacing, nan=np.inf)


def _cells_near(point_mm: Array, scan: EmbeddingMap) -> Array:
    """Fine cells (n, 3) of the body in a box around a point; none if the body is not near."""
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
