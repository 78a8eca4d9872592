"""Points found by the neighbours that find each other: structural inference of SAM++ (spec 2.5)."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.errors import AliceError
from custom.landmarks.embeddings.embedding_map import Searchable, inside_grid, prepare, query_cells
from custom.landmarks.matching.points import match_points
from custom.landmarks.matching.search import REFUSED, Method
from custom.landmarks.sam.scan_grid import cell_to_world

Array: TypeAlias = NDArray[Any]


class StructuralMatches(NamedTuple):
    """:class:`Matches`, and on how many fixed points each rests (0: the nearest neighbour stands in)."""

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]
    support: NDArray[np.int64]


def structural_match(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    reach: int = 2,
    min_score: float = 0.8,
    max_distance_mm: float = 200.0,
    half_steps: int = 4,
    method: Method = "fast",
) -> StructuralMatches:
    """Find points by the neighbours that find each other (SAM++, fixed-point inference; spec 2.5).

    The (2 reach + 1)^3 cells around the query wander from Q to K and back; the pairs they settle on, if near
    enough and similar enough, carry a robust linear map that takes the query across. All in world mm.

    Edge cases are ours: in directions that the pairs do not span (all in one slice, say) lengths are kept; fewer
    than 4 pairs give their (robust) mean displacement; none at all gives the plain match of :func:`match_points`. An
    answer outside K's grid is refused.

    Args:
        points_mm: (N, 3) world mm.
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search.
        reach: cells to each side of the query; 2 is the demo's, 1 the evaluation's.
        min_score: pairs that score less are dropped (the authors' demo: 0.8).
        max_distance_mm: pairs that wandered farther from the query are dropped (the authors: 200).
        half_steps: matches from one scan to the other, even.
        method: of the single matches.

    Returns:
        Points (nan where refused), the mean score of the pairs, and how many pairs there were.

    Raises:
        ValueError: if ``half_steps`` is odd or below 2, or ``reach`` is negative.
    """
    if half_steps < 2 or half_steps % 2 or reach < 0:
        raise AliceError(
            f"half_steps must be even and positive, reach 0 or more; got {half_steps} and {reach}."
        )
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    map_q, map_k = prepare(embedding_q), prepare(embedding_k)
    plain = match_points(points, map_q, map_k, method=method)
    found, scores, support = plain.points_mm.copy(), plain.scores.copy(), np.zeros(len(points), np.int64)
    cells, inside = query_cells(points, map_q)
    for i in np.flatnonzero(inside):
        around = np.indices((2 * reach + 1,) * 3).reshape(3, -1).T - reach + cells[i]
        around = around[((around >= 0) & (around < map_q.grid)).all(axis=1)]
        queries = cell_to_world(around, map_q.affine, "fine")
        for _ in range(half_steps // 2):
            keys, score = match_points(queries, map_q, map_k, method=method)
            queries, _ = match_points(keys, map_k, map_q, method=method)
        keys, score = match_points(queries, map_q, map_k, method=method)
        near = np.linalg.norm(queries - points[i], axis=1) <= max_distance_mm  # False for nan
        keep = np.flatnonzero(near & (score > min_score))
        keep = keep[np.unique(keys[keep].round(3), axis=0, return_index=True)[1]]
        if not len(keep):
            continue
        answer = carry_across(points[i], queries[keep], keys[keep])
        good = bool(inside_grid(answer[None], map_k)[0])
        found[i] = answer if good else np.nan
        scores[i] = score[keep].mean() if good else REFUSED
        support[i] = len(keep)
    return StructuralMatches(found, scores, support)


def carry_across(point: Array, queries: Array, keys: Array, *, huber_mm: float = 4.0) -> Array:
    """Take a point across by a robust linear map fitted to pairs, all in mm.

    Iteratively re-weighted least squares (Huber). What the pairs do not determine stays as it is: with fewer than
    4 pairs only the displacement counts; where they lie in a plane or on a line, lengths off it are kept.

    Args:
        point: (3,).
        queries: (n, 3), n >= 1.
        keys: (n, 3), where they went.
        huber_mm: residuals beyond this count linearly (ours: a fine cell).

    Returns:
        (3,).
    """
    weight = np.ones(len(queries))
    residual = keys - queries  # of the identity: what a map has to add to it
    change = np.zeros((3, 3))
    middle = shift = np.zeros(3)
    for _ in range(10):
        share = (weight / weight.sum())[:, None]
        middle, shift = (share * queries).sum(axis=0), (share * residual).sum(axis=0)
        if len(queries) >= 4:
            root = np.sqrt(weight)[:, None]
            # spreads below a tenth of the largest determine no slope (ours): with cells of 4 mm they are noise
            slope = np.linalg.pinv(root * (queries - middle), rcond=0.1)
            change = (slope @ (root * (residual - shift))).T
        off = np.linalg.norm(residual - shift - (queries - middle) @ change.T, axis=1)
        weight = np.minimum(1.0, huber_mm / np.maximum(off, 1e-9))
    return point + shift + change @ (point - middle)
