"""Match the rows of two runs by case and seed; count and average them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.errors import AliceError

Row = Mapping[str, Any]
Pair = tuple[str, str]  # seed, case
FAULTS = ("missed", "spurious", "failed")  # of the statuses in custom.evaluation.scores.metrics


def key_of(row: Row) -> Pair:
    """Seed and case of a row. Rows of two runs are partners if these and the organ are equal."""
    return str(row.get("seed", "")), str(row["case"])


def by_organ(rows: Sequence[Row], metric: str, run: str) -> dict[str, dict[Pair, Row]]:
    """``{organ: {(seed, case): row}}`` in the order of the rows.

    Raises:
        AliceError: if a row lacks the metric, or a case has an organ twice; the message names the ``run``.
    """
    found: dict[str, dict[Pair, Row]] = {}
    for row in rows:
        if not isinstance(row.get(metric), (int, float)):
            raise AliceError(f"{run} has a row without the number '{metric}'; its columns are {sorted(row)}.")
        organ_rows = found.setdefault(str(row["organ"]), {})
        key = key_of(row)
        if key in organ_rows:
            raise AliceError(
                f"{run} scores the {row['organ']} of case '{key[1]}' twice; keep one of the rows, "
                "or give the rows of each training seed a column 'seed'."
            )
        organ_rows[key] = row
    return found


def run_counts(run: Mapping[Pair, Row], metric: str) -> dict[str, int]:
    """Count the rows of one run that are absent, faulty, or have a score that enters no mean."""
    statuses = [row.get("status") for row in run.values()]
    scores = [row[metric] for row in run.values()]
    counts = {status: statuses.count(status) for status in ("absent", *FAULTS)}
    return counts | {
        "infinite": sum(map(math.isinf, scores)),
        "without a score": sum(map(math.isnan, scores)),
    }


def pair_counts(run_a: Mapping[Pair, Row], run_b: Mapping[Pair, Row], metric: str) -> dict[str, int]:
    """The same for two runs; faults are counted for each run."""
    pairs = [(run_a[key], run_b[key]) for key in run_a if key in run_b]
    counts = {
        "absent": sum(a.get("status") == b.get("status") == "absent" for a, b in pairs),
        "without a score": sum(math.isnan(a[metric]) or math.isnan(b[metric]) for a, b in pairs),
    }
    for name, run, other in (("A", run_a, run_b), ("B", run_b, run_a)):
        of_run = run_counts(run, metric)
        counts |= {f"{what} in {name}": of_run[what] for what in (*FAULTS, "infinite")}
        counts[f"only in {name}"] = len(run.keys() - other.keys())
    return counts


def case_differences(pairs: Mapping[Pair, tuple[float, float]]) -> list[float]:
    """B - A of each case, averaged over seeds; infinite if only one of the runs is infinite."""
    by_case: dict[str, list[float]] = {}
    for (_, case), (a, b) in pairs.items():
        if not (math.isnan(a) or math.isnan(b)):
            by_case.setdefault(case, []).append(0.0 if a == b else b - a)  # inf - inf is a tie
    means = (
        math.fsum(values) / len(values) if np.isfinite(values).all() else sum(values)
        for values in by_case.values()
    )
    return [0.0 if math.isnan(mean) else mean for mean in means]  # one seed inf, another -inf: a tie too


def seeds_by_cases(values: Mapping[Pair, float]) -> NDArray[np.float64]:
    """Values as a sorted table (seeds, cases), nan where one is missing; the order of rows does not matter."""
    seeds = {seed: index for index, seed in enumerate(sorted({seed for seed, _ in values}))}
    cases = {case: index for index, case in enumerate(sorted({case for _, case in values}))}
    table = np.full((len(seeds), len(cases)), np.nan)
    for (seed, case), value in values.items():
        table[seeds[seed], cases[case]] = value
    return table


def mean_of(values: Iterable[float]) -> float:
    """The mean, with an exact sum; nan if there are no values."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan
