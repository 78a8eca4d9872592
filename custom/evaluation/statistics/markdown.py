"""Comparisons and summaries as cells of text and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from custom.evaluation.statistics.per_organ import Comparison, Summary
from custom.evaluation.statistics.significance import Interval

METRIC_NAMES = {"dsc": "DSC", "nsd": "NSD", "hd95": "HD95 in mm"}
COLUMNS = ("organ", "pairs", "mean A", "mean B", "B - A", "95 % interval", "p", "p (Holm)", "counted")
HOW = (
    "Paired by case. Intervals: bootstrap of the mean difference over cases (BCa), or over seeds and cases "
    "where there are several seeds (percentile). With few cases, about ten, they are too narrow; with two there is none. "
    "p: Wilcoxon signed-rank test on cases, two-sided; Holm's adjustment is over the organs. Overall: means of cases "
    "over the organs measured in both runs."
)
SUMMARY_HOW = (
    '"of" is the number of scores in the mean. A missed or spurious organ, and every organ of a failed case, counts '
    "as DSC and NSD 0 and has no finite HD95. Overall: means of cases over their organs. Intervals: bootstrap over "
    "cases (BCa). With few cases they are too narrow; with two there is none."
)


def table_cells(lines: Sequence[Comparison], digits: int = 4) -> list[list[str]]:
    """The comparison as text, one list for each line, in the order of :data:`COLUMNS`; counts of 0 are left out."""
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
    lines: Sequence[Comparison],
    *,
    name_a: str = "A",
    name_b: str = "B",
    metric: str = "dsc",
    digits: int = 4,
    how: bool = True,
) -> str:
    """The comparison as a Markdown table that names A and B and, with ``how``, explains the columns."""
    header = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 2) + " --- |"]
    cells = table_cells(lines, digits)
    rows = ["| " + " | ".join([markdown_text(organ), *numbers]) + " |" for organ, *numbers in cells]
    name = METRIC_NAMES.get(metric, metric)
    title = f"**{markdown_text(name)}** of A: {markdown_text(name_a)} and B: {markdown_text(name_b)}"
    return "\n".join([title, "", *header, *rows, "", *([HOW, ""] if how else [])])


def summary_markdown(summaries: Mapping[str, Sequence[Summary]], digits: int = 4) -> str:
    """One run as a Markdown table: for each organ the mean of each metric, and its counts.

    Args:
        summaries: ``{metric: summarise(rows, metric)}``.
        digits: after the point.
    """
    metrics = list(summaries)
    names = [METRIC_NAMES.get(metric, metric) for metric in metrics]
    header = ["organ", *(column for name in names for column in (name, "95 % interval", "of")), "counted"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (3 * len(metrics)) + " --- |"]
    for of_organ in zip(*summaries.values(), strict=True):
        cells = [markdown_text(of_organ[0].organ)]
        for line in of_organ:
            low, high = line.interval
            interval = "–" if math.isnan(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"
            cells += [_number(line.mean, f".{digits}f"), interval, str(line.num_scores)]
        # "of" and the other counts already tell how many scores are infinite or nan
        shown = {
            what: n for what, n in of_organ[0].counts.items() if what not in ("infinite", "without a score")
        }
        cells.append(", ".join(f"{count} {what}" for what, count in shown.items() if count) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", SUMMARY_HOW, ""])


def markdown_text(text: str) -> str:
    """Escape text for use in a Markdown table."""
    for sign in "\\`*_[]<|":
        text = text.replace(sign, "&lt;" if sign == "<" else "\\" + sign)
    return " ".join(text.split())


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _interval(interval: Interval, digits: int) -> str:
    return "–" if math.isnan(interval.low) else f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else _number(value, ".4f")
