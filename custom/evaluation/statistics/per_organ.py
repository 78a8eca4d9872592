"""Statistics per organ and overall: one run alone, or two runs compared case by case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from custom.errors import AliceError
from custom.evaluation.statistics.paired_rows import (
    Pair,
    Row,
    by_organ,
    case_differences,
    key_of,
    mean_of,
    pair_counts,
    run_counts,
    seeds_by_cases,
)
from custom.evaluation.statistics.significance import Interval, bootstrap_interval, holm, signed_rank_p

OVERALL = "overall"


@dataclass(frozen=True)
class Comparison:
    """One organ, or all of them (``overall``), in run A and in run B.

    The means, the difference B - A and its interval are over the ``num_pairs`` pairs that are finite in both
    runs. ``counts`` has all other pairs: ``absent`` (from the reference and both predictions), ``without a
    score`` (nan in a run), and for each run ``missed in A``, ``spurious in A``, ``failed in A`` (no
    prediction at all), ``infinite in A`` (the HD95 of these three: in no mean, but ranked worst in the
    organ's test) and ``only in A``.
    """

    organ: str
    num_pairs: int
    mean_a: float
    mean_b: float
    difference: float
    interval: Interval
    p_value: float
    p_holm: float  # adjusted for the number of organs; ``overall`` stands alone
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """One run alone; ``counts`` has ``absent, missed, spurious, failed, infinite`` and ``without a score``."""

    organ: str
    num_scores: int
    mean: float
    interval: Interval
    counts: dict[str, int] = field(default_factory=dict)


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str = "dsc", *, seed: int = 0, draws: int = 10_000
) -> list[Comparison]:
    """Compare two runs case by case, per organ and overall.

    Rows pair by case, organ and, where they have one, training ``seed``. ``overall`` takes each case's mean
    over the organs that are finite in both runs. The tests see each case's mean over seeds.

    Args:
        rows_a: rows of :func:`custom.evaluation.scores.metrics.case_rows`, of all cases.
        rows_b: the same of the other run.
        metric: ``dsc``, ``nsd``, ``hd95`` or another column of numbers.
        seed: of the bootstrap's random draws.
        draws: number of draws.

    Returns:
        One line for each organ in the order of the rows, then ``overall``. Differences are B - A.

    Raises:
        AliceError: if a run scores an organ of a case twice, the runs share no case or followed different
            protocols, or the metric is missing.
    """
    protocols = sorted({str(row.get("protocol", "")) for row in [*rows_a, *rows_b]})
    if len(protocols) > 1:
        raise AliceError(f"Scores of the protocols {protocols} do not compare; score both runs by one.")
    organs_a, organs_b = by_organ(rows_a, metric, "Run A"), by_organ(rows_b, metric, "Run B")

    lines = []
    cases: dict[Pair, list[tuple[float, float]]] = {}
    total: dict[str, int] = {}
    for organ in dict.fromkeys([*organs_a, *organs_b]):
        run_a, run_b = organs_a.get(organ, {}), organs_b.get(organ, {})
        pairs = {key: (run_a[key][metric], run_b[key][metric]) for key in run_a if key in run_b}
        counts = pair_counts(run_a, run_b, metric)
        lines.append(_line(organ, pairs, counts, seed, draws))
        for key, scores in pairs.items():
            if np.isfinite(scores).all():
                cases.setdefault(key, []).append(scores)
        total = {what: total.get(what, 0) + count for what, count in counts.items()}
    if not any(key in organs_b.get(organ, {}) for organ, run in organs_a.items() for key in run):
        raise AliceError("The runs share no case; compare runs over the same cases, organs and seeds.")

    adjusted = holm([line.p_value for line in lines])
    lines = [replace(line, p_holm=p) for line, p in zip(lines, adjusted, strict=True)]
    means = {
        key: (mean_of(a for a, _ in scores), mean_of(b for _, b in scores)) for key, scores in cases.items()
    }
    return [*lines, _line(OVERALL, means, total, seed, draws)]


def summarise(
    rows: Sequence[Row], metric: str = "dsc", *, seed: int = 0, draws: int = 10_000
) -> list[Summary]:
    """Mean, interval and counts of one run, for each organ and overall (over the cases' means).

    Raises:
        AliceError: if the run scores an organ of a case twice, or the metric is missing.
    """
    lines = []
    cases: dict[Pair, list[float]] = {}
    total: dict[str, int] = {}
    for organ, run in by_organ(rows, metric, "The run").items():
        scores = {key: row[metric] for key, row in run.items()}
        counts = run_counts(run, metric)
        lines.append(_summary(organ, scores, counts, seed, draws))
        for key, score in scores.items():
            if math.isfinite(score):
                cases.setdefault(key, []).append(score)
        total = {what: total.get(what, 0) + count for what, count in counts.items()}
    means = {key: mean_of(scores) for key, scores in cases.items()}
    return [*lines, _summary(OVERALL, means, total, seed, draws)]


def merge_folds(folds: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Join the rows of all folds. A row without a ``fold`` gets the place of its list.

    Raises:
        AliceError: if two folds scored the same case, which cannot have been held back in both.
    """
    home: dict[Pair, int] = {}
    merged = []
    for fold, rows in enumerate(folds):
        for row in rows:
            key = key_of(row)
            if home.setdefault(key, fold) != fold:
                raise AliceError(
                    f"Case '{key[1]}' is in fold {home[key]} and in fold {fold}, but is held back only once; "
                    "check that all folds come from one split, and that no file is given twice."
                )
            merged.append({**row, "fold": row.get("fold", fold)})
    return merged


def worst_rows(rows: Sequence[Row], metric: str = "dsc", count: int = 4) -> list[Row]:
    """The rows with the worst scores, worst first; rows without a score are left out.

    Among equal scores, such as those of missed organs, the larger organ comes first.
    """
    sign = -1 if metric == "hd95" else 1  # a distance is worst when large
    scored = [row for row in rows if not math.isnan(row[metric])]
    return sorted(scored, key=lambda row: (sign * row[metric], -row.get("reference_ml", 0.0)))[:count]


def _line(
    organ: str, pairs: Mapping[Pair, tuple[float, float]], counts: dict[str, int], seed: int, draws: int
) -> Comparison:
    finite = {key: scores for key, scores in pairs.items() if np.isfinite(scores).all()}
    differences = {key: b - a for key, (a, b) in finite.items()}
    p_value = signed_rank_p(case_differences(pairs))
    return Comparison(
        organ=organ,
        num_pairs=len(finite),
        mean_a=mean_of(a for a, _ in finite.values()),
        mean_b=mean_of(b for _, b in finite.values()),
        difference=mean_of(differences.values()),
        interval=bootstrap_interval(seeds_by_cases(differences), seed=seed, draws=draws),
        p_value=p_value,
        p_holm=p_value,
        counts=counts,
    )


def _summary(
    organ: str, scores: Mapping[Pair, float], counts: dict[str, int], seed: int, draws: int
) -> Summary:
    finite = {key: score for key, score in scores.items() if math.isfinite(score)}
    interval = bootstrap_interval(seeds_by_cases(finite), seed=seed, draws=draws)
    return Summary(organ, len(finite), mean_of(finite.values()), interval, counts)
