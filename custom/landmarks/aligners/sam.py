"""Align scans by SAM's embeddings, and calibrate the score that a match needs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from custom.errors import AliceError
from custom.landmarks.aligners.protocol import Map, Match
from custom.landmarks.embeddings.embedding_map import query_cells
from custom.landmarks.embeddings.folder import EmbeddingFolder
from custom.landmarks.embeddings.stored import StoredEmbedding
from custom.landmarks.matching.local_search import match_near
from custom.landmarks.matching.pair_map import FEW_ANCHORS, PairMap, agreement, fit_pair_map, refine_pair_map
from custom.landmarks.matching.points import Matches, match_points
from custom.landmarks.matching.search import REFUSED, Method
from custom.space import to_world

logger = logging.getLogger(__name__)


# ours: scans of unlike regions reach 0.09, scans of like regions 0.14 and more; see the SAM bundle's README
MIN_SUPPORT = 0.12


class SamAligner:
    """Finds the point with the most similar embedding (SAM, Yan et al., TMI 2022); reads embeddings from files.

    With ``consensus``, many matches of the two scans first agree on one smooth map, local searches correct
    it, and each point is searched near the place where the map takes it. Without, each point is searched on
    its own in the whole scan. In both cases a pair of scans whose matches do not agree has no common anatomy
    and is refused; single scores cannot tell, since unrelated scans reach 0.85. Safe in many workers: each
    process opens the files for itself.

    Args:
        scans: whose embeddings these are.
        embeddings: folder that ``alice embed`` wrote.
        threshold: score that a match needs. With consensus the default is the score calibrated for the
            weights; without consensus or calibration it is 0.7 (Alice).
        max_cycle_mm: refuse matches that come back farther than this from their start; None does not match
            back.
        method: for single matches, without consensus; see
            :func:`custom.landmarks.matching.points.match_points`.
        consensus: see :mod:`custom.landmarks.matching.pair_map`.
        min_support: share of matches that must agree on the map (ours).
        max_pairs: number of maps to keep.

    Raises:
        EmbeddingError: if a scan has no embedding, or one made from other voxels or weights.
        AliceError: for a threshold that would accept refused matches.
    """

    def __init__(
        self,
        scans: Any,
        embeddings: EmbeddingFolder | str | Path,
        threshold: float | None = None,
        *,
        max_cycle_mm: float | None = None,
        method: Method = "fast",
        consensus: bool = True,
        min_support: float = MIN_SUPPORT,
        max_pairs: int = 1000,
    ) -> None:
        self.embeddings = (
            embeddings if isinstance(embeddings, EmbeddingFolder) else EmbeddingFolder(embeddings)
        )
        self.embeddings.require(scans)
        known = self.embeddings.threshold if consensus else None  # calibrated with consensus
        self.threshold = float(threshold if threshold is not None else 0.7 if known is None else known)
        if not REFUSED < self.threshold <= 1:
            raise AliceError(f"threshold must be above {REFUSED:g} and at most 1, got {self.threshold}.")
        self.max_cycle_mm, self.method = max_cycle_mm, method
        self.consensus, self.min_support, self.max_pairs = consensus, min_support, max_pairs
        self.name = "sam" if consensus else "sam_nearest"
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("pair_map", "few_map", "map_near", "support", "blocks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        """As :meth:`Aligner.align`; a refused match has score -1, and a point outside the body gives nan.

        With consensus, a map of few matches is corrected around this one point. This costs less than a map of
        the whole scans, and a pair of crops does not depend on the pairs that were drawn before.
        """
        matches = self._match_one(scan_q, point_mm, scan_k)
        point, score = matches.points_mm[0], float(matches.scores[0])
        if self.max_cycle_mm is not None and score >= self.threshold:
            back = self._match_one(scan_k, point, scan_q).points_mm[0]
            near = np.linalg.norm(back - point_mm) <= self.max_cycle_mm  # False for nan
            score = score if near else REFUSED
        return Match(point, score)

    def align_all(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """As :meth:`align` for each of (N, 3) points, but without matching back."""
        each = [self._match_one(scan_q, point, scan_k) for point in points_mm]
        return Matches(*(np.concatenate(part) for part in zip(*each, strict=True)))

    def match(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """Match many points (N, 3) at once; matches of any score are returned."""
        query, key = self.embeddings[scan_q], self.embeddings[scan_k]
        if not self.consensus:
            found = match_points(points_mm, query, key, method=self.method, refine=True)
            return found if self.support(scan_q, scan_k) >= self.min_support else _refused(found)
        return self._match_by(self.pair_map(scan_q, scan_k), points_mm, query, key)

    def _match_one(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Matches:
        if not self.consensus:
            return self.match(scan_q, point_mm, scan_k)
        if not query_cells(np.reshape(point_mm, (1, 3)), self.embeddings[scan_q])[1][0]:
            return Matches(np.full((1, 3), np.nan), np.array([REFUSED]))  # before a map is fitted for it
        pair = self.map_near(scan_q, tuple(float(x) for x in point_mm), scan_k)
        return self._match_by(pair, point_mm, self.embeddings[scan_q], self.embeddings[scan_k])

    def map_of(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Map | None:
        """The scans' smooth map, corrected about a point: the one by which :meth:`align` finds it.

        None without consensus, where points are found one by one.
        """
        if not self.consensus:
            return None
        return self.map_near(scan_q, tuple(float(x) for x in point_mm), scan_k).__call__

    def _correct(self, scan_q: str, point_mm: tuple[float, ...], scan_k: str) -> PairMap:
        pair = self.few_map(scan_q, scan_k)
        if pair.support < self.min_support:
            return pair  # to be refused
        about = np.array(point_mm)
        return refine_pair_map(pair, self.embeddings[scan_q], self.embeddings[scan_k], about_mm=about)

    def _match_by(
        self, pair: PairMap, points_mm: np.ndarray, query: StoredEmbedding, key: StoredEmbedding
    ) -> Matches:
        points = np.atleast_2d(np.asarray(points_mm, dtype=float))
        matches = match_near(points, pair(points), query, key)
        return matches if pair.support >= self.min_support else _refused(matches)

    def _open(self) -> None:
        self.pair_map = functools.lru_cache(self.max_pairs)(self._fit)
        self.few_map = functools.lru_cache(self.max_pairs)(self._fit_few)
        self.map_near = functools.lru_cache(4)(self._correct)  # a pair of crops asks twice
        self.support = functools.lru_cache(100 * self.max_pairs)(self._agree)
        self.blocks = functools.lru_cache(16)(lambda name: self.embeddings[name].blocks)

    def _fit(self, scan_q: str, scan_k: str) -> PairMap:
        pair = fit_pair_map(self.blocks(scan_q), self.blocks(scan_k))  # its support is that of `_agree`
        if pair.support < self.min_support:
            return pair  # to be refused
        return refine_pair_map(pair, self.embeddings[scan_q], self.embeddings[scan_k])

    def _fit_few(self, scan_q: str, scan_k: str) -> PairMap:
        few = fit_pair_map(self.blocks(scan_q), self.blocks(scan_k), anchors=FEW_ANCHORS)
        return few._replace(support=self.support(scan_q, scan_k))  # one rule: few matches may agree by chance

    def _agree(self, scan_q: str, scan_k: str) -> float:
        """Share of matches that agree on an affine map: what :meth:`align` and :meth:`match` refuse a pair by."""
        return agreement(self.blocks(scan_q), self.blocks(scan_k))


def _refused(matches: Matches) -> Matches:
    return Matches(matches.points_mm, np.full(len(matches.scores), REFUSED))


class Calibration(NamedTuple):
    """A threshold for scores, and the table that led to it.

    Attributes:
        threshold: the lowest score above which enough matches come back near their start; None if there is
            none.
        rows: for each candidate ``score``, the share of ``accepted`` matches, the share of these ``within``
            reach, and their number ``points``.
    """

    threshold: float | None
    rows: list[dict[str, float]]


def calibrate_threshold(
    aligner: SamAligner,
    scans: Any,
    names: Sequence[str],
    *,
    num_pairs: int = 40,
    num_points: int = 25,
    reach_mm: float = 10.0,
    share: float = 0.9,
    seed: int = 0,
) -> Calibration:
    """Find the score above which enough matches between held-back scans come back near their start.

    Args:
        aligner: gives the scores; its own threshold is not used.
        scans: the ``VolumeStore``, to draw points in bodies.
        names: scans held back from training, at least two.
        num_pairs: ordered pairs to draw.
        num_points: points in each pair.
        reach_mm: largest distance from its start at which a match may come back.
        share: share of matches that must come back so near, at every score above the threshold.
        seed: of the draws.

    Returns:
        The threshold, to be stored with the weights, and the table.

    Raises:
        AliceError: if the scans come from fewer than two patients.
    """
    pairs = [(q, k) for q in names for k in names if scans.patient(q) != scans.patient(k)]
    if not pairs:
        raise AliceError(f"A threshold is calibrated on pairs of two patients' scans; got {list(names)}.")
    rng = np.random.default_rng(seed)
    scores, errors = [], []
    for _ in range(num_pairs):
        name_q, name_k = pairs[rng.integers(len(pairs))]
        voxels = scans.body_voxels(name_q)
        points = to_world(scans.affine(name_q), voxels[rng.integers(len(voxels), size=num_points)])
        there = aligner.align_all(name_q, points, name_k)
        back = aligner.align_all(name_k, there.points_mm, name_q)
        scores.append(there.scores)
        errors.append(np.nan_to_num(np.linalg.norm(back.points_mm - points, axis=1), nan=np.inf))
    score, near = np.concatenate(scores), np.concatenate(errors) <= reach_mm
    rows, threshold, above, good = [], None, np.inf, True
    for candidate in np.arange(0.95, -0.5, -0.025).round(3):
        accepted = score >= candidate
        within = float(near[accepted].mean()) if accepted.any() else float("nan")
        rows.append(
            {
                "score": float(candidate),
                "accepted": float(accepted.mean()),
                "within": within,
                "points": int(accepted.sum()),
            }
        )
        # the matches that a lower threshold adds must be good themselves; fewer than 20 are too few to tell
        # (ours)
        added = accepted & (score < above)
        if added.sum() >= 20:
            good, above = good and float(near[added].mean()) >= share, candidate
            threshold = float(candidate) if good else threshold
    return Calibration(threshold, rows)
