"""One smooth map between two scans, fitted to many of their matches and corrected by local searches.

A single best match may be far off: right instead of left, or one vertebra too high. A few hundred matches,
weighted by whether they come back to their start, agree on an affine map (as in SAM-affine of SAME, Liu et
al., MICCAI 2021) and on a smooth bending of it. Searches near the places where this map takes points then
correct it; their answers scatter much less. The bending and the local searches are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.landmarks.embeddings.blocks import Blocks
from custom.landmarks.embeddings.embedding_map import EmbeddingMap, Searchable, prepare_pair, query_cells
from custom.landmarks.matching.local_search import ROUGH_NEAR_MM, match_roughly_near, outside_mm
from custom.landmarks.sam.scan_grid import cell_to_world

Array = NDArray[Any]

ANCHORS = 512  # blocks of Q to match (ours; with 256 the map is 1 mm worse, with 1,024 it is 0.25 mm better)
FEW_ANCHORS = 128  # the same for a map that is corrected around one point, where more do not help (ours)
CYCLE_MM = 24.0  # a match that comes back this far from its start counts half (one and a half blocks; ours)
AGREE_MM = 20.0  # a match this near to the affine map supports it (ours)
BEND_MM = 60.0  # length scale of the bending (ours)
BEND_SIZE_MM, BEND_NOISE_MM = 20.0, 30.0  # standard deviations of the bending and of single matches (ours)
REFINED = 1024  # places of Q that are searched near the map (ours; with 512 answers are 1 % worse)
REFINED_ABOUT = 64  # the same around one point (ours; with 32 answers are 1 % worse)
REFINED_ABOUT_MM = 50.0  # standard deviation of these places around the point (ours)
REFINED_NOISE_MM = 5.0  # standard deviation of the answers of local searches (ours)
_TOGETHER = 4096  # points mapped at a time, to bound the memory of their covariances


class PairMap(NamedTuple):
    """Maps points of scan Q to the same anatomy in scan K: an affine map and a smooth bending.

    Attributes:
        matrix: (3, 3).
        middle_q, middle_k: (3,) mm, the centres of ``matrix`` in Q and in K.
        anchors_mm: (n, 3) of Q, the points that the bending was fitted to.
        coefficients: (n, 3); the bending is the covariance with the anchors times these.
        support: share of matches within 20 mm of the affine map; nearly 0 for scans without common anatomy.
    """

    matrix: Array
    middle_q: Array
    middle_k: Array
    anchors_mm: Array
    coefficients: Array
    support: float

    def __call__(self, points_mm: Array) -> Array:
        """(N, 3) mm of K for (N, 3) mm of Q."""
        points = np.asarray(points_mm, dtype=float)
        found = self._affine(points)
        for start in range(0, len(points), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            found[some] += _covariance(points[some], self.anchors_mm) @ self.coefficients
        return found

    def _affine(self, points: Array) -> Array:
        return (points - self.middle_q) @ self.matrix.T + self.middle_k


def fit_pair_map(blocks_q: Blocks, blocks_k: Blocks, *, anchors: int = ANCHORS) -> PairMap:
    """Fit the map that the matches of two scans agree on.

    Blocks of Q are matched to every second block of K, and these back to every second block of Q. (A block of
    the other half comes back at least 16 mm off, and so counts two thirds.) The affine map is fitted by
    re-weighted least squares with Cauchy's weights, pulled slightly towards the identity; the residual by
    Gaussian process regression with robust noise.

    Args:
        blocks_q: of the scan to map from.
        blocks_k: of the scan to map to.
        anchors: number of blocks of Q to match, drawn at random.

    Returns:
        The map; look at its ``support`` before using it.
    """
    points_q, points_k, trust = _match_blocks(blocks_q, blocks_k, anchors)
    matrix, middle_q, middle_k = robust_affine(points_q, points_k, trust)
    residual = points_k - (points_q - middle_q) @ matrix.T - middle_k
    coefficients = fit_bending(points_q, residual, trust, BEND_NOISE_MM)
    return PairMap(matrix, middle_q, middle_k, points_q, coefficients, _share_that_agrees(residual))


def agreement(blocks_q: Blocks, blocks_k: Blocks) -> float:
    """Share of 512 matches of two scans that agree on an affine map: the ``support`` of their map, without its bending."""
    points_q, points_k, trust = _match_blocks(blocks_q, blocks_k, ANCHORS)
    matrix, middle_q, middle_k = robust_affine(points_q, points_k, trust)
    return _share_that_agrees(points_k - (points_q - middle_q) @ matrix.T - middle_k)


def _match_blocks(
    blocks_q: Blocks, blocks_k: Blocks, anchors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of Q and what they match in K, both (n, 3) mm, and how far each match is trusted, (n,)."""
    chosen = np.random.default_rng(0).permutation(len(blocks_q.vectors))[:anchors]
    points_q = blocks_q.points_mm[chosen]
    there = (blocks_q.vectors[chosen] @ blocks_k.vectors[: blocks_k.alternate].T).argmax(axis=1)
    back = (blocks_k.vectors[there] @ blocks_q.vectors[: blocks_q.alternate].T).argmax(axis=1)
    cycle_mm = np.linalg.norm(blocks_q.points_mm[back] - points_q, axis=1)
    return points_q, blocks_k.points_mm[there], 1 / (1 + (cycle_mm / CYCLE_MM) ** 2)


def _share_that_agrees(residual: np.ndarray) -> float:
    return float((np.linalg.norm(residual, axis=1) < AGREE_MM).mean())


def refine_pair_map(
    pair: PairMap, embedding_q: Searchable, embedding_k: Searchable, *, about_mm: ArrayLike | None = None
) -> PairMap:
    """Correct the map by searching places of Q near where it takes them.

    Args:
        pair: of :func:`fit_pair_map`.
        embedding_q: of the scan to map from.
        embedding_k: of the scan to map to.
        about_mm: (3,), a point of Q if the map is for this point only. 64 places around it are then enough;
            otherwise 1,024 of the whole scan are searched.

    Returns:
        The corrected map, with the ``support`` of ``pair``; ``pair`` itself if no place is found.

    Raises:
        AliceError: if the embeddings do not compare.
    """
    map_q, map_k = prepare_pair(embedding_q, embedding_k)
    places = draw_places(map_q, None if about_mm is None else np.asarray(about_mm, dtype=float).reshape(3))
    expected = pair(places)
    residual = match_roughly_near(places, expected, map_q, map_k) - expected
    # near K's edge a search is one-sided, and outside K every answer lies too far inside
    known = np.isfinite(residual).all(axis=1) & (outside_mm(expected, map_k) <= -ROUGH_NEAR_MM)
    if not known.any():
        return pair
    places, residual = places[known], residual[known]
    coefficients = fit_bending(places, residual, np.ones(len(residual)), REFINED_NOISE_MM)
    return pair._replace(
        anchors_mm=np.concatenate([pair.anchors_mm, places]),
        coefficients=np.concatenate([pair.coefficients, coefficients]),
    )


def draw_places(map_q: EmbeddingMap, about_mm: Array | None) -> Array:
    """Draw places (n, 3) mm in the body of a scan: evenly, or around a point."""
    rng = np.random.default_rng(0)
    if about_mm is not None:
        drawn = about_mm + rng.normal(0, REFINED_ABOUT_MM, (4 * REFINED_ABOUT, 3))
        _, inside = query_cells(drawn, map_q)
        return drawn[inside][:REFINED_ABOUT]
    lattice = map_q.pooled_lattice
    cells = np.arange(np.prod(lattice.grid)) if lattice.outside is None else np.flatnonzero(~lattice.outside)
    chosen = np.stack(np.unravel_index(rng.permutation(cells)[:REFINED], lattice.grid), axis=-1)
    return cell_to_world(np.minimum(2 * chosen + 0.5, np.array(map_q.grid) - 1), map_q.affine, "fine")


def robust_affine(points_q: Array, points_k: Array, trust: Array) -> tuple[Array, Array, Array]:
    """Fit an affine map to matched points, of which many may be wrong.

    Args:
        points_q: (n, 3) mm.
        points_k: (n, 3) mm, where they were found.
        trust: (n,) weights.

    Returns:
        (3, 3) matrix, and its centre in Q and in K.
    """
    shift = points_k - points_q
    typical = np.median(shift[trust >= np.median(trust)], axis=0)
    weight = trust / (1 + (np.linalg.norm(shift - typical, axis=1) / 60.0) ** 2)
    # mm^2: pulls towards the identity, as if points that do not move spread 14 mm wider (ours)
    held = 200.0 * np.eye(3)
    matrix, middle_q, middle_k = np.eye(3), points_q.mean(axis=0), points_k.mean(axis=0)
    for _ in range(30):
        share = weight / weight.sum()
        middle_q, middle_k = share @ points_q, share @ points_k
        from_q, from_k = points_q - middle_q, points_k - middle_k
        weighted = share[:, None] * from_q
        before, matrix = matrix, np.linalg.solve(from_q.T @ weighted + held, weighted.T @ from_k + held).T
        off = np.linalg.norm(from_k - from_q @ matrix.T, axis=1)
        weight = trust / (1 + (off / max(12.0, float(np.median(off)))) ** 2)
        if np.abs(matrix - before).max() < 1e-4:  # a hundredth of a millimetre at 10 cm
            break
    return matrix, middle_q, middle_k


def fit_bending(anchors_mm: Array, residual_mm: Array, trust: Array, noise_mm: float) -> Array:
    """Fit an affine map's residuals by Gaussian process regression, with noise that grows with the misfit.

    Args:
        anchors_mm: (n, 3).
        residual_mm: (n, 3), displacements at the anchors.
        trust: (n,) weights.
        noise_mm: standard deviation of a displacement of weight 1.

    Returns:
        (n, 3) coefficients: a point's displacement is its covariance with the anchors times these.
    """
    covariance = _covariance(anchors_mm, anchors_mm)
    weight, coefficients = trust, np.zeros_like(residual_mm)
    for _ in range(4):
        noise = np.diag(noise_mm**2 / np.maximum(weight, 1e-3))
        coefficients = np.linalg.solve(covariance + noise, residual_mm)
        off = np.linalg.norm(residual_mm - covariance @ coefficients, axis=1)
        weight = trust / (1 + (off / 15.0) ** 2)
    return coefficients


def _covariance(points: Array, anchors: Array) -> Array:
    """(N, n) covariances of the bending, mm^2."""
    squared = (points**2).sum(1)[:, None] + (anchors**2).sum(1) - 2 * points @ anchors.T
    values: Array = BEND_SIZE_MM**2 * np.exp(-np.maximum(squared, 0) / (2 * BEND_MM**2))
    return values
