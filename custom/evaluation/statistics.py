"""Is run B better than run A? Paired differences with intervals and tests, and every failure counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

OVERALL = "overall"
Row = Mapping[str, Any]
_Pair = tuple[str, str]  # seed, case


class Interval(NamedTuple):
    """Where the mean lies, at the level asked for; nan where there is too little to say."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """An organ, or all of them (``overall``), in run A and in run B.

    The means, the difference B - A and its interval rest on the ``num_pairs`` pairs that are finite in both
    runs. ``counts`` says in words what else there is: ``absent`` (from the reference and both predictions),
    ``without a score`` (nan in a run), and for each run ``missed in A``, ``spurious in A``, ``infinite in A``
    (HD95 of the two before: in no mean, yet ranked worst in the organ's test) and ``only in A``.
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
    """One run alone; ``counts`` has ``absent, missed, spurious, infinite`` and ``without a score``."""

    organ: str
    num_scores: int
    mean: float
    interval: Interval
    counts: dict[str, int] = field(default_factory=dict)


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Bootstrap interval of a mean; given paired differences, of the mean difference.

    Cases are drawn with replacement. One row of values gives the bias-corrected and accelerated interval
    (BCa). Several rows are training seeds: seeds and cases are both drawn, independently, and the interval
    is the percentile one. With few cases or seeds any bootstrap interval is too narrow.

    Args:
        values: (cases,) or (seeds, cases); nan where there is no value.
        seed: of the draws.
        draws: how many.
        level: the interval's coverage, in (0, 1).

    Returns:
        The interval; nan if there are fewer than two cases.

    Raises:
        ValueError: if a value is infinite, or ``level`` or ``draws`` is out of range.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if np.isinf(table).any():
        raise ValueError("An infinite value has no mean; count it and leave it out first.")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"Take a level in (0, 1) and at least one draw, got {level} and {draws}.")
    known = ~np.isnan(table)
    table, known = (part[known.any(axis=1)][:, known.any(axis=0)] for part in (table, known))
    num_seeds, num_cases = table.shape
    if num_cases < 2:
        return Interval(math.nan, math.nan)

    # a draw is how often it takes each seed and each case
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)
    case_weights = rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=draws)
    sums = (seed_weights @ np.where(known, table, 0.0) * case_weights).sum(axis=1)
    sizes = (seed_weights @ known.astype(int) * case_weights).sum(axis=1)
    means = sums[sizes > 0] / sizes[sizes > 0]

    levels = np.array([(1 - level) / 2, (1 + level) / 2])
    if num_seeds == 1:
        levels = _bca_levels(table[0], means, levels)
    return Interval(*np.quantile(means, levels).tolist())


def signed_rank_p(differences: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros keep their ranks (Pratt), infinities rank highest.

    Nan is left out. Zeros alone give 1, nothing at all gives nan. With fewer than six differences no outcome
    falls below 0.05.
    """
    values = np.asarray(differences, dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan
    values = np.where(np.isinf(values), values, values.round(12))  # 0.9 - 0.8 and 0.8 - 0.7 are a tie
    if not values.any():
        return 1.0
    # the test sees ranks alone, so that a stand-in of the same rank makes infinities finite
    _, stand_in = np.unique(np.append(np.abs(values), 0.0), return_inverse=True)
    return float(stats.wilcoxon(np.sign(values) * stand_in[:-1], zero_method="pratt").pvalue)


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str = "dsc", *, seed: int = 0, draws: int = 10_000
) -> list[Comparison]:
    """Compare two runs case by case, per organ and overall.

    Rows pair by case, organ and, where they have one, training ``seed``. ``overall`` takes each case's mean
    over the organs that are finite in both runs. The tests see each case's mean over seeds.

    Args:
        rows_a: rows of :func:`custom.evaluation.metrics.case_rows`, of all cases.
        rows_b: the same of the other run.
        metric: ``dsc``, ``nsd``, ``hd95`` or another column of numbers.
        seed: of the bootstrap's draws.
        draws: how many.

    Returns:
        A line per organ in the order of the rows, then ``overall``. Differences are B - A.

    Raises:
        ValueError: if a run scores an organ of a case twice, the runs share no case or followed different
            protocols, or the metric is missing.
    """
    protocols = sorted({str(row.get("protocol", "")) for row in [*rows_a, *rows_b]})
    if len(protocols) > 1:
        raise ValueError(f"Scores of the protocols {protocols} do not compare; score both runs by one.")
    by_organ_a, by_organ_b = _by_organ(rows_a, metric, "Run A"), _by_organ(rows_b, metric, "Run B")

    lines = []
    cases: dict[_Pair, list[tuple[float, float]]] = {}
    total: dict[str, int] = {}
    for organ in dict.fromkeys([*by_organ_a, *by_organ_b]):
        run_a, run_b = by_organ_a.get(organ, {}), by_organ_b.get(organ, {})
        pairs = {key: (run_a[key][metric], run_b[key][metric]) for key in run_a if key in run_b}
        counts = _pair_counts(run_a, run_b, metric)
        lines.append(_line(organ, pairs, counts, seed, draws))
        for key, scores in pairs.items():
            if np.isfinite(scores).all():
                cases.setdefault(key, []).append(scores)
        total = {what: total.get(what, 0) + count for what, count in counts.items()}
    if not any(key in by_organ_b.get(organ, {}) for organ, run in by_organ_a.items() for key in run):
        raise ValueError("The runs share no case; compare runs over the same cases, organs and seeds.")

    adjusted = _holm([line.p_value for line in lines])
    lines = [replace(line, p_holm=p) for line, p in zip(lines, adjusted, strict=True)]
    means = {key: (_mean(a for a, _ in scores), _mean(b for _, b in scores)) for key, scores in cases.items()}
    return [*lines, _line(OVERALL, means, total, seed, draws)]


def summarise(
    rows: Sequence[Row], metric: str = "dsc", *, seed: int = 0, draws: int = 10_000
) -> list[Summary]:
    """Mean, interval and counts of one run per organ and, over the means of cases, overall.

    Raises:
        ValueError: if the run scores an organ of a case twice, or the metric is missing.
    """
    lines = []
    cases: dict[_Pair, list[float]] = {}
    total: dict[str, int] = {}
    for organ, run in _by_organ(rows, metric, "The run").items():
        scores = {key: row[metric] for key, row in run.items()}
        counts = _run_counts(run, metric)
        lines.append(_summary(organ, scores, counts, seed, draws))
        for key, score in scores.items():
            if math.isfinite(score):
                cases.setdefault(key, []).append(score)
        total = {what: total.get(what, 0) + count for what, count in counts.items()}
    means = {key: _mean(scores) for key, scores in cases.items()}
    return [*lines, _summary(OVERALL, means, total, seed, draws)]


def merge_folds(folds: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Put the rows of all folds together, each with the number of its ``fold``.

    Raises:
        ValueError: naming a case that two folds scored: it cannot have been held back from both.
    """
    home: dict[_Pair, int] = {}
    merged = []
    for fold, rows in enumerate(folds):
        for row in rows:
            key = _key(row)
            if home.setdefault(key, fold) != fold:
                raise ValueError(
                    f"Case '{key[1]}' is in fold {home[key]} and in fold {fold}, but is held back only once; "
                    "check that all folds come from one split, and that no file is given twice."
                )
            merged.append({**row, "fold": fold})
    return merged


def worst_rows(rows: Sequence[Row], metric: str = "dsc", count: int = 4) -> list[Row]:
    """The rows that deserve a look, worst score first; those without a score are left out.

    Of equal scores (missed organs, say) the larger organ comes first.
    """
    sign = -1 if metric == "hd95" else 1  # a distance is worst when large
    scored = [row for row in rows if not math.isnan(row[metric])]
    return sorted(scored, key=lambda row: (sign * row[metric], -row.get("reference_ml", 0.0)))[:count]


# -- the table as text ------------------------------------------------------------------------------

COLUMNS = ("organ", "pairs", "mean A", "mean B", "B - A", "95 % interval", "p", "p (Holm)", "counted")
HOW = (
    "Paired by case. Intervals: bootstrap of the mean difference over cases (BCa), or over seeds and cases "
    "where there are several seeds (percentile). p: Wilcoxon signed-rank test on cases, two-sided; Holm's "
    "adjustment is over the organs. Overall: means of cases over the organs measured in both runs."
)


def table_cells(lines: Sequence[Comparison], digits: int = 4) -> list[list[str]]:
    """The comparison as text, a list per line in the order of :data:`COLUMNS`; counts of 0 go unsaid."""
    return [
        [
            line.organ,
            str(line.num_pairs),
            _number(line.mean_a, f".{digits}f"),
            _number(line.mean_b, f".{digits}f"),
            _number(line.difference, f"+.{digits}f"),
            _interval(line.interval, digits),
            _p(line.p_value),
            _p(line.p_holm),
            ", ".join(f"{count} {what}" for what, count in line.counts.items() if count) or "–",
        ]
        for line in lines
    ]


def to_markdown(
    lines: Sequence[Comparison], *, name_a: str = "A", name_b: str = "B", metric: str = "dsc", digits: int = 4
) -> str:
    """The comparison as a Markdown table, with what A and B are and how the columns came about."""
    header = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 2) + " --- |"]
    cells = table_cells(lines, digits)
    rows = ["| " + " | ".join([_markdown(organ), *numbers]) + " |" for organ, *numbers in cells]
    title = f"**{_markdown(metric)}** of A: {_markdown(name_a)} and B: {_markdown(name_b)}"
    return "\n".join([title, "", *header, *rows, "", HOW, ""])


def _markdown(text: str) -> str:
    """Text that stays text in a Markdown table."""
    for sign in "\\`*_[]<|":
        text = text.replace(sign, "&lt;" if sign == "<" else "\\" + sign)
    return " ".join(text.split())


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _interval(interval: Interval, digits: int) -> str:
    return "–" if math.isnan(interval.low) else f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else _number(value, ".4f")


# -- inside -----------------------------------------------------------------------------------------


def _key(row: Row) -> _Pair:
    return str(row.get("seed", "")), str(row["case"])


def _by_organ(rows: Sequence[Row], metric: str, run: str) -> dict[str, dict[_Pair, Row]]:
    """``{organ: {(seed, case): row}}`` in the order of the rows."""
    by_organ: dict[str, dict[_Pair, Row]] = {}
    for row in rows:
        if not isinstance(row.get(metric), (int, float)):
            raise ValueError(f"{run} has a row without the number '{metric}'; its columns are {sorted(row)}.")
        organ_rows = by_organ.setdefault(str(row["organ"]), {})
        key = _key(row)
        if key in organ_rows:
            raise ValueError(
                f"{run} scores the {row['organ']} of case '{key[1]}' twice; keep one of the rows, "
                "or give the rows of each training seed a column 'seed'."
            )
        organ_rows[key] = row
    return by_organ


def _run_counts(run: Mapping[_Pair, Row], metric: str) -> dict[str, int]:
    statuses = [row.get("status") for row in run.values()]
    scores = [row[metric] for row in run.values()]
    counts = {status: statuses.count(status) for status in ("absent", "missed", "spurious")}
    return counts | {
        "infinite": sum(map(math.isinf, scores)),
        "without a score": sum(map(math.isnan, scores)),
    }


def _pair_counts(run_a: Mapping[_Pair, Row], run_b: Mapping[_Pair, Row], metric: str) -> dict[str, int]:
    pairs = [(run_a[key], run_b[key]) for key in run_a if key in run_b]
    counts = {
        "absent": sum(a.get("status") == b.get("status") == "absent" for a, b in pairs),
        "without a score": sum(math.isnan(a[metric]) or math.isnan(b[metric]) for a, b in pairs),
    }
    for name, run, other in (("A", run_a, run_b), ("B", run_b, run_a)):
        of_run = _run_counts(run, metric)
        counts |= {f"{what} in {name}": of_run[what] for what in ("missed", "spurious", "infinite")}
        counts[f"only in {name}"] = len(run.keys() - other.keys())
    return counts


def _line(
    organ: str, pairs: Mapping[_Pair, tuple[float, float]], counts: dict[str, int], seed: int, draws: int
) -> Comparison:
    finite = {key: scores for key, scores in pairs.items() if np.isfinite(scores).all()}
    differences = {key: b - a for key, (a, b) in finite.items()}
    p_value = signed_rank_p(_case_differences(pairs))
    return Comparison(
        organ=organ,
        num_pairs=len(finite),
        mean_a=_mean(a for a, _ in finite.values()),
        mean_b=_mean(b for _, b in finite.values()),
        difference=_mean(differences.values()),
        interval=bootstrap_interval(_seeds_by_cases(differences), seed=seed, draws=draws),
        p_value=p_value,
        p_holm=p_value,
        counts=counts,
    )


def _summary(
    organ: str, scores: Mapping[_Pair, float], counts: dict[str, int], seed: int, draws: int
) -> Summary:
    finite = {key: score for key, score in scores.items() if math.isfinite(score)}
    interval = bootstrap_interval(_seeds_by_cases(finite), seed=seed, draws=draws)
    return Summary(organ, len(finite), _mean(finite.values()), interval, counts)


def _case_differences(pairs: Mapping[_Pair, tuple[float, float]]) -> list[float]:
    """B - A of each case, averaged over seeds; infinite where one run alone is."""
    by_case: dict[str, list[float]] = {}
    for (_, case), (a, b) in pairs.items():
        if not (math.isnan(a) or math.isnan(b)):
            by_case.setdefault(case, []).append(0.0 if a == b else b - a)  # inf - inf is a tie
    means = (
        math.fsum(values) / len(values) if np.isfinite(values).all() else sum(values)
        for values in by_case.values()
    )
    return [0.0 if math.isnan(mean) else mean for mean in means]  # one seed inf, another -inf: a tie too


def _seeds_by_cases(values: Mapping[_Pair, float]) -> NDArray[np.float64]:
    """(seeds, cases), nan where a seed lacks a case; sorted, so that the rows' order leaves no trace."""
    seeds = {seed: index for index, seed in enumerate(sorted({seed for seed, _ in values}))}
    cases = {case: index for index, case in enumerate(sorted({case for _, case in values}))}
    table = np.full((len(seeds), len(cases)), np.nan)
    for (seed, case), value in values.items():
        table[seeds[seed], cases[case]] = value
    return table


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan


def _bca_levels(
    cases: NDArray[np.float64], means: NDArray[np.float64], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The quantiles of the drawn means that make the interval BCa (Efron 1987)."""
    observed = cases.mean()
    below = np.mean(means < observed) + np.mean(means == observed) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / (len(means) + 1), len(means) / (len(means) + 1)))
    pulls = cases - observed  # what leaving a case out does to the mean, up to a factor that cancels
    spread = (pulls**2).sum() ** 1.5
    acceleration = (pulls**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = bias + stats.norm.ppf(levels)
    return stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; nan counts as no test."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = list(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
