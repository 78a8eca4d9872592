"""Alignment by SAM's embeddings."""

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
from custom.landmarks.matching.pair_map import FEW_ANCHORS, PairMap, fit_pair_map, refine_pair_map
from custom.landmarks.matching.points import Matches, match_points
from custom.landmarks.matching.search import REFUSED, Method
from custom.space import to_world

logger = logging.getLogger(__name__)


MIN_SUPPORT = (
    0.12  # ours: scans of unlike regions reach 0.09, of like ones 0.14 and more; see the SAM bundle's docs
)


class SamAligner:
    """The point whose embedding is most alike (SAM; spec 2.4), from embeddings made beforehand.

    With ``consensus`` the scans' matches first agree on one smooth map, which places found near it correct, and a point is
    looked for near where that takes it; without, every point for itself. Either way a pair of scans whose matches do not agree has no common anatomy, and
    is refused: single scores do not tell (strangers reach 0.85). Safe to use from many workers: files are opened per
    process.

    Args:
        scans: whose embeddings these are.
        embeddings: folder that ``alice embed`` wrote.
        threshold: score that a match needs; by default what was calibrated for the weights, with consensus; else 0.7
            (Alice).
        max_cycle_mm: refuse matches that come back farther from where they started; None asks no match back.
        method: of single matches, without consensus; see :func:`custom.landmarks.matching.points.match_points`.
        consensus: see :mod:`custom.landmarks.matching.pair_map`.
        min_support: share of matches that must agree on the map (ours).
        max_pairs: maps kept.

    Raises:
        EmbeddingError: if a scan has no embedding, or one of other voxels or weights.
        ValueError: for a threshold that would accept what is refused.
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
        known = self.embeddings.threshold if consensus else None  # it was calibrated so
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
        """As :meth:`Aligner.align`; score -1 for a match refused; nan for a point off the body.

        With consensus, a map of few matches is corrected about this one point: that costs less than one of the whole
        scans, and what a pair of crops is does not depend on which pairs were drawn before.
        """
        matches = self._match_one(scan_q, point_mm, scan_k)
        point, score = matches.points_mm[0], float(matches.scores[0])
        if self.max_cycle_mm is not None and score >= self.threshold:
            back = self._match_one(scan_k, point, scan_q).points_mm[0]
            near = np.linalg.norm(back - point_mm) <= self.max_cycle_mm  # False for nan
            score = score if near else REFUSED
        return Match(point, score)

    def align_all(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """As :meth:`align` for each of (N, 3) points, without the way back."""
        each = [self._match_one(scan_q, point, scan_k) for point in points_mm]
        return Matches(*(np.concatenate(part) for part in zip(*each, strict=True)))

    def match(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """Many points (N, 3) at once; every match is given with its score, however low."""
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
        return self.map_near(scan_q, tuple(float(x) for x in point_mm), scan_k)

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
        pair = fit_pair_map(self.blocks(scan_q), self.blocks(scan_k))
        if pair.support < self.min_support:
            return pair  # to be refused
        return refine_pair_map(pair, self.embeddings[scan_q], self.embeddings[scan_k])

    def _fit_few(self, scan_q: str, scan_k: str) -> PairMap:
        return fit_pair_map(self.blocks(scan_q), self.blocks(scan_k), anchors=FEW_ANCHORS)

    def _agree(self, scan_q: str, scan_k: str) -> float:
        """Share of a few matches that agree on an affine map; the same few as :meth:`align` fits one by."""
        return self.few_map(scan_q, scan_k).support


def _refused(matches: Matches) -> Matches:
    return Matches(matches.points_mm, np.full(len(matches.scores), REFUSED))


class Calibration(NamedTuple):
    """A score to ask for, and what led to it.

    Attributes:
        threshold: the lowest score at which matches come back near enough, often enough; None if there is none.
        rows: per candidate ``score``, the share of ``accepted`` matches, the share of those ``within`` reach, and
            their ``points``.
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
    """The score at which enough matches between held-back scans come back to where they started (spec 1.8).

    Args:
        aligner: whose scores they are; its own threshold plays no part.
        scans: bodies, to draw points from.
        names: scans held back from training, two at least.
        num_pairs: ordered pairs to draw.
        num_points: points a pair.
        reach_mm: how far from the start a match may come back.
        share: of the matches of any score above the threshold that must.
        seed: of the draws.

    Returns:
        The threshold, to be stored with the weights, and the table.

    Raises:
        ValueError: if they are of fewer than two patients.
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
        # the matches that a lower threshold lets in have to be good themselves; fewer than 20 say too little (ours)
        added = accepted & (score < above)
        if added.sum() >= 20:
            good, above = good and float(near[added].mean()) >= share, candidate
            threshold = float(candidate) if good else threshold
    return Calibration(threshold, rows)
