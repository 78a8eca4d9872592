"""Errors of an aligner in mm, with intervals: against the truth, and after matching there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from custom.data.store.volume_store import VolumeStore
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.quality.ground_truth import Truth, warp_truth
from custom.landmarks.quality.known_warp import WARPED, Warp
from custom.space import to_world

Pair: TypeAlias = tuple[str, str]
Row: TypeAlias = dict[str, Any]
NEAR_MM = 10.0  # a point this near counts as found, as in the DLT benchmark's CPM@10mm
_DRAWS = 1000
_MIN_PAIRS = 3  # an interval of two pairs would only repeat the two values (ours)


class Figures(NamedTuple):
    """Values of one kind from many pairs of scans: an array for each pair."""

    by_pair: list[NDArray[np.float64]]

    def row(self, aligner: str, measure: str, statistic: str, seed: int = 0) -> Row:
        """A statistic of all values, with a 95 % interval over pairs (bootstrap; nan for fewer than three)."""
        compute = STATISTICS[statistic]
        known = [values[~np.isnan(values)] for values in self.by_pair]
        known = [values for values in known if len(values)]
        row = {"aligner": aligner, "measure": measure, "statistic": statistic, "pairs": len(known)}
        row |= {
            "points": sum(len(values) for values in known),
            "value": math.nan,
            "low": math.nan,
            "high": math.nan,
        }
        if known:
            row["value"] = float(compute(np.concatenate(known)))
        if len(known) >= _MIN_PAIRS:
            rng = np.random.default_rng(seed)
            picks = rng.integers(len(known), size=(_DRAWS, len(known)))
            drawn = np.sort([compute(np.concatenate([known[i] for i in pick])) for pick in picks])
            row["low"], row["high"] = float(drawn[_DRAWS // 40]), float(drawn[-1 - _DRAWS // 40])
        return row


STATISTICS: dict[str, Callable[[NDArray[np.float64]], Any]] = {
    "mean": np.mean,
    "median": np.median,
    "P90": lambda values: np.sort(values)[math.ceil(0.9 * (len(values) - 1))],  # works with infinite errors
    "within 10 mm": lambda values: (values <= NEAR_MM).mean(),
}


class Answers(NamedTuple):
    """What an aligner answered for points of one pair.

    Attributes:
        points_mm: (N, 3), nan where there is no answer.
        scores: (N,).
        accepted: bool (N,), True where there is an answer with a high enough score.
    """

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]
    accepted: NDArray[np.bool_]


def query_aligner(aligner: Aligner, pair: Pair, points_mm: NDArray[np.float64], seed: int = 0) -> Answers:
    """Match points (N, 3) of scan ``pair[0]`` in ``pair[1]``, one by one as pre-training does."""
    rng = np.random.default_rng(seed)
    matches = [aligner.align(pair[0], point, pair[1], rng) for point in points_mm]
    found = np.array([m.point_mm for m in matches], dtype=float).reshape(-1, 3)
    scores = np.array([m.score for m in matches], dtype=float)
    return Answers(found, scores, (scores >= aligner.threshold) & np.isfinite(found).all(axis=1))


def errors_mm(answers: Answers, truth_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances (N,); infinite where there is no answer, nan where there is no truth."""
    distance = np.linalg.norm(answers.points_mm - truth_mm, axis=1)
    unanswered = ~np.isfinite(answers.points_mm).all(axis=1)
    distance[unanswered] = np.inf
    distance[~np.isfinite(truth_mm).all(axis=1)] = np.nan
    return distance


def body_points(store: VolumeStore, pairs: Sequence[Pair], count: int, seed: int):
    """Pairs, each with random points of the query's body, the same for every aligner."""
    for index, pair in enumerate(pairs):
        voxels = store.body_voxels(pair[0])
        rng = np.random.default_rng([seed, index])
        yield pair, to_world(store.affine(pair[0]), voxels[rng.integers(len(voxels), size=count)])


def truth_error(
    aligner: Aligner, store: VolumeStore, truth: Truth, pairs: Sequence[Pair], num_points: int, seed: int = 0
) -> Figures:
    """Distance of answers from the truth in mm, for points of the body, accepted or not."""
    by_pair = []
    for pair, points in body_points(store, pairs, num_points, seed):
        by_pair.append(errors_mm(query_aligner(aligner, pair, points, seed), truth(pair[0], points, pair[1])))
    return Figures(by_pair)


def known_warp(
    aligner: Aligner, store: VolumeStore, warps: Mapping[str, Warp], num_points: int, seed: int = 0
) -> Figures:
    """Target registration error in mm from deformed scans to their originals, as ``write_warped`` made them."""
    pairs = [(name, name.removesuffix(WARPED)) for name in sorted(warps)]
    return truth_error(aligner, store, warp_truth(warps, store), pairs, num_points, seed)


def landmark_error(
    aligner: Aligner, landmarks: Mapping[str, Mapping[str, NDArray]], pairs: Sequence[Pair]
) -> Figures:
    """Distance in mm between matched landmarks and the key's own, for the landmarks a pair shares."""
    by_pair = []
    for name_q, name_k in pairs:
        shared = sorted(set(landmarks.get(name_q, {})) & set(landmarks.get(name_k, {})))
        if shared:
            points, truth = (
                np.array([landmarks[name][mark] for mark in shared]) for name in (name_q, name_k)
            )
            by_pair.append(errors_mm(query_aligner(aligner, (name_q, name_k), points), truth))
    return Figures(by_pair)


def cycle_figures(
    aligner: Aligner, store: VolumeStore, pairs: Sequence[Pair], num_points: int, seed: int = 0
) -> tuple[Figures, Figures, Figures]:
    """For points of the body: the error there and back in mm, the score, and 1 if accepted, else 0."""
    cycles, scores, accepted = [], [], []
    for pair, points in body_points(store, pairs, num_points, seed):
        there = query_aligner(aligner, pair, points, seed)
        cycle = np.full(len(points), np.inf)
        known = np.flatnonzero(np.isfinite(there.points_mm).all(axis=1))
        if len(known):
            back = query_aligner(aligner, (pair[1], pair[0]), there.points_mm[known], seed + 1)
            cycle[known] = errors_mm(back, points[known])
        cycles.append(cycle)
        scores.append(there.scores)
        accepted.append(there.accepted.astype(float))
    return Figures(cycles), Figures(scores), Figures(accepted)
