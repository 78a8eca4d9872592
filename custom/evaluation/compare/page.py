"""The page of ``alice compare``: intervals, box plots, tables, and the worst cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from custom.evaluation.compare.overlays import Overlay, overlay_pictures
from custom.evaluation.compare.run_files import cases_in_words
from custom.evaluation.statistics.markdown import COLUMNS, HOW, METRIC_NAMES, table_cells
from custom.evaluation.statistics.per_organ import OVERALL, Comparison
from custom.report import COLOUR_A, COLOUR_B, Page


def comparison_page(
    tables: Mapping[str, Sequence[Comparison]],
    rows_a: Sequence[Mapping[str, Any]],
    rows_b: Sequence[Mapping[str, Any]],
    *,
    name_a: str = "A",
    name_b: str = "B",
    overlays: Sequence[Overlay] = (),
) -> Page:
    """The page of ``alice compare``: intervals, box plots and tables per metric, then the worst cases.

    Args:
        tables: ``{metric: compare(rows_a, rows_b, metric)}``.
        rows_a: the rows themselves, for the box plots.
        rows_b: the same of run B.
        name_a: name of run A.
        name_b: name of run B.
        overlays: cases to show, worst first.
    """
    page = Page(f"{name_b} against {name_a}", f"A is {name_a}, B is {name_b}. Differences are B - A.")
    protocols = sorted({str(row.get("protocol", "")) for row in [*rows_a, *rows_b]} - {""})
    cases = {str(row["case"]) for row in rows_a} & {str(row["case"]) for row in rows_b}
    facts: dict[str, Any] = {"protocol": ", ".join(protocols) or "unnamed", "cases in both runs": len(cases)}
    for metric, lines in tables.items():
        *_, overall = table_cells(lines)
        facts[f"{METRIC_NAMES.get(metric, metric)}, B - A"] = overall[4]
    page.facts(facts)
    page.text("\n\n".join(cases_in_words(rows_a, rows_b)))

    for metric, lines in tables.items():
        name = METRIC_NAMES.get(metric, metric)
        page.section(name)
        cells = table_cells(lines)
        overall = cells[-1]
        found = f"Overall {overall[4]} {overall[5]}, {overall[1]} pairs."
        page.figure(
            difference_figure(lines, metric),
            f"Mean paired difference in {name}, B - A, with its 95 % interval. {found}",
        )
        page.figure(
            box_figure(rows_a, rows_b, metric, name_a=name_a, name_b=name_b),
            f"{name} of each case, a dot each. Boxes hold the middle half, with a line at the median and "
            "whiskers to the extremes. Scores that are nan or infinite are not drawn; the table counts them.",
        )
        page.table(COLUMNS, cells, f"{name} per organ. A: {name_a}. B: {name_b}.")

    if overlays:
        page.section("Worst cases").text(
            "The axial slice on which reference and predictions differ most, patient's right on the left. "
            "Green outlines the reference, pink the prediction."
        )
    for overlay in overlays:
        worst, pictures = overlay_pictures(overlay)
        runs = (f"A ({name_a})", f"B ({name_b})")
        page.gallery(list(zip(pictures, runs, strict=True)), f"{overlay.caption}, slice {worst}")
    return page.section("How these numbers were computed").text(HOW)


def difference_figure(lines: Sequence[Comparison], metric: str) -> Figure:
    """Each organ's mean difference and interval on one axis, zero marked."""
    figure = Figure(figsize=(7.5, 0.8 + 0.3 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#8a94a3", linewidth=1)
    for y, line in enumerate(lines):
        bold = line.organ == OVERALL
        if not math.isnan(line.interval.low):
            axes.plot(
                line.interval, (y, y), color=COLOUR_B, linewidth=3 if bold else 1.8, solid_capstyle="butt"
            )
        axes.plot(
            line.difference, y, marker="D" if bold else "o", color=COLOUR_B, markersize=7 if bold else 5
        )
    axes.set_yticks(range(len(lines)), [line.organ for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel(f"{METRIC_NAMES.get(metric, metric)}, B - A")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def box_figure(
    rows_a: Sequence[Mapping[str, Any]],
    rows_b: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    name_a: str = "A",
    name_b: str = "B",
) -> Figure:
    """Box plots of two runs side by side, organ by organ, with a dot per case."""
    organs = list(dict.fromkeys(str(row["organ"]) for row in [*rows_a, *rows_b]))
    figure = Figure(figsize=(7.5, 1.1 + 0.5 * len(organs)), layout="constrained")
    axes = figure.add_subplot()
    runs = ((rows_a, -0.19, COLOUR_A), (rows_b, 0.19, COLOUR_B))
    for rows, shift, colour in runs:
        for y, organ in enumerate(organs):
            scores = [row[metric] for row in rows if row["organ"] == organ and math.isfinite(row[metric])]
            if not scores:
                continue
            lowest, first, median, third, highest = np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))
            middle = y + shift
            axes.plot((lowest, highest), (middle, middle), color=colour, linewidth=1)
            box = Rectangle(
                (first, middle - 0.15), third - first, 0.3, facecolor=colour + "40", edgecolor=colour
            )
            axes.add_patch(box)
            axes.plot((median, median), (middle - 0.15, middle + 0.15), color=colour, linewidth=2.2)
            # spread over the box's width, in the same way in every drawing
            offsets = 0.11 * np.sin(2.4 * np.arange(len(scores)))
            axes.plot(scores, middle + offsets, ".", color=colour, markersize=4, alpha=0.7)
    axes.set_yticks(range(len(organs)), organs)
    axes.invert_yaxis()
    axes.set_xlabel(METRIC_NAMES.get(metric, metric))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOUR_A, label=f"A: {name_a}"), Patch(color=COLOUR_B, label=f"B: {name_b}")]
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # show a dollar sign in a name as it is
    return figure
