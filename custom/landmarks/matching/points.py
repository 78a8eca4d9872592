"""Find points of one scan in another by their embeddings, and check whether they come back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.errors import AliceError
from custom.landmarks.embeddings.embedding_map import Searchable, coarse_vectors, prepare_pair, query_cells
from custom.landmarks.matching.search import METHODS, REFUSED, Method, Search
from custom.landmarks.sam.scan_grid import cell_to_world


class Matches(NamedTuple):
    """The points found, one row for each query point.

    Attributes:
        points_mm: (N, 3) RAS; nan for a query point outside its scan's grid or body.
        scores: (N,) similarity in [-1, 1]; -1 where ``points_mm`` is nan.
    """

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]


def match_points(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    method: Method = "exact",
    refine: bool = False,
) -> Matches:
    """Find points of scan Q in scan K (SAM, Yan et al., TMI 2022).

    A cell's similarity is the mean of the fine and the coarse cosine; the coarse map is interpolated to the
    fine grid and normalised again. The query is the fine cell that holds the point, and the answer is the
    centre of the most similar cell of K. So without ``refine`` even a perfect match is off by 1.9 mm on
    average.

    Args:
        points_mm: (N, 3) or (3,) world mm (RAS).
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search. Further searches of the same ``ScanEmbedding`` are quick: what the
            first one prepares is kept as long as the embedding.
        method: ``exact`` skips cells whose coarse similarity is too low to win; ``fast`` searches the map
            pooled to 8 mm and then 8 x 8 x 8 fine cells around the winner; ``exhaustive`` is the authors'
            arithmetic over the whole volume, the reference for the other two.
        refine: correct the answer by a parabola through the similarities of neighbouring cells, and by the
            query point's offset from the centre of its own cell.

    Returns:
        Points and scores. A point that is not finite, or lies outside Q's grid or body, has no answer: nan
        and score -1. Scans without common anatomy also get answers, perhaps with high scores. Check them by
        :func:`cycle_error`, or by the ``support`` of :func:`custom.landmarks.matching.pair_map.fit_pair_map`
        as the aligners do.

    Raises:
        AliceError: for an unknown method, points of another shape, or embeddings of different length.
    """
    if method not in METHODS:
        raise AliceError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    if points.ndim != 2 or points.shape[1] != 3:
        raise AliceError(f"Points must have shape (N, 3), got {np.shape(points_mm)}.")
    map_q, map_k = prepare_pair(embedding_q, embedding_k)

    cells, inside = query_cells(points, map_q)
    found_mm, scores = np.full(points.shape, np.nan), np.full(len(points), REFUSED)
    if not inside.any():
        return Matches(found_mm, scores)
    asked, back = np.unique(cells[inside], axis=0, return_inverse=True)  # points of one cell share an answer
    fine, coarse = map_q.fine_vectors(asked), coarse_vectors(map_q, asked)
    positions, best = np.empty((len(asked), 3)), np.empty(len(asked))
    search = Search(map_k, method)
    coarse_similarities = coarse @ map_k.coarse.reshape(-1, map_k.coarse.shape[-1]).T
    for i in range(len(asked)):
        index, best[i] = search(fine[i], coarse[i], coarse_similarities[i].reshape(map_k.coarse.shape[:3]))
        positions[i] = search.position(index, refine)
    answers = cell_to_world(positions, map_k.affine, "fine")[back.reshape(-1)]
    if refine:
        answers = answers + points[inside] - cell_to_world(cells[inside], map_q.affine, "fine")
    found_mm[inside], scores[inside] = answers, best[back.reshape(-1)]
    return Matches(found_mm, scores)


def cycle_error(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    matches: Matches | None = None,
    method: Method = "exact",
    refine: bool = False,
) -> NDArray[np.float64]:
    """Distance of a point from itself after matching it to K and back to Q.

    Args:
        points_mm: (N, 3) world mm.
        embedding_q: of the scan that holds the points.
        embedding_k: of the other.
        matches: the matches in K, if they are known.
        method: see :func:`match_points`.
        refine: see :func:`match_points`.

    Returns:
        (N,) mm; infinite if there is no match in one of the directions.
    """
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    there = matches or match_points(points, embedding_q, embedding_k, method=method, refine=refine)
    back = match_points(there.points_mm, embedding_k, embedding_q, method=method, refine=refine)
    return np.nan_to_num(np.linalg.norm(back.points_mm - points, axis=1), nan=np.inf)
