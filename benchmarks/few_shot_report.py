"""Table and figure of an experiment of docs/experiments, from its rows.

    python benchmarks/few_shot_report.py docs/experiments/openkbp WORK      takes the rows from WORK first
    python benchmarks/few_shot_report.py docs/experiments/openkbp           from the rows that lie there

Written are rows/ARM_labelled-N.csv (one per arm and number of patients, all seeds), table.md and figure.svg.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from few_shot_plan import Labelled, Plan, labelled_name, read_plan, runs_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from custom.evaluation.scores.csv_rows import read_rows, write_rows
from custom.evaluation.statistics.per_organ import OVERALL, Comparison, compare, summarise
from custom.files import write_text

Rows = list[dict[str, Any]]
Results = Mapping[tuple[str, Labelled], Rows]
COLOURS = ("#8a94a3", "#3d84c6", "#e08a1e", "#5f9e6e", "#a5678e")  # of the arms, in the plan's order


def rows_file(plan: Plan, arm: str, labelled: Labelled) -> Path:
    return plan.folder / "rows" / f"{arm}_labelled-{labelled_name(labelled)}.csv"


def take_rows(plan: Plan, work: Path) -> list[str]:
    """Put the rows of all finished runs, of the organs that are scored, into the experiment's folder; the names of the runs that are missing."""
    missing = []
    merged: dict[tuple[str, Labelled], Rows] = {}
    for run in runs_of(plan):
        if run.labelled is None:
            continue
        path = work / run.folder / "rows.csv"
        if path.is_file():
            rows = [row for row in read_rows(path) if row["organ"] in plan.scored]
            merged.setdefault((run.arm, run.labelled), []).extend(rows)
        else:
            missing.append(run.folder.as_posix())
    for (arm, labelled), rows in merged.items():
        write_rows(rows_file(plan, arm, labelled), rows)
    return missing


def read_results(plan: Plan) -> Results:
    """``{(arm, labelled): rows}`` of the experiment's folder.

    Raises:
        ValueError: naming the file, if one is missing or lacks a seed of the plan.
    """
    results = {}
    for arm in plan.arms:
        for labelled in plan.labelled:
            path = rows_file(plan, arm, labelled)
            if not path.is_file():
                raise ValueError(f"{path}: no such file; finish the runs, and name their folder.")
            rows = read_rows(path)
            if lacking := sorted(set(plan.seeds) - {row["seed"] for row in rows}):
                raise ValueError(f"{path}: lacks the seeds {lacking}; finish the runs.")
            results[arm, labelled] = rows
    return results


def markdown(plan: Plan, results: Results) -> str:
    """Means per arm, paired differences overall, and per organ."""
    cases = {row["case"] for rows in results.values() for row in rows}
    over = f"{len(cases)} patients held back, {len(plan.seeds)} seeds"
    parts = [
        f"# {plan.folder.resolve().name}: pre-trained against scratch, few labels",
        f"{over}. Written by `benchmarks/few_shot_report.py` from `rows/`; what was done, and what it shows, is in "
        "[Experiments](../README.md).",
        "\n".join(verdict(plan, results, a, b) for a, b in plan.compare),
        "![Mean DSC of the arms, and paired differences with 95 % intervals](figure.svg)",
        "## Means",
        "DSC, mean over patients of each patient's mean over organs, and its 95 % interval over seeds and patients. "
        "Missed: organs that a network did not find at all; they count as 0.",
        _means(plan, results),
        "## Paired differences",
        "B - A by patient and seed, overall; 95 % intervals from a bootstrap over seeds and patients, those that "
        "exclude 0 in bold. p: Wilcoxon's signed-rank test on patients, seeds averaged.",
        _differences(plan, results),
        "## By organ, DSC",
        *(_organs(plan, results, a, b) for a, b in plan.compare),
    ]
    return "\n\n".join(parts) + "\n"


def _means(plan: Plan, results: Results) -> str:
    def cell(arm: str, labelled: Labelled) -> str:
        overall = _overall(summarise(results[arm, labelled], "dsc"))
        missed = overall.counts["missed"]
        return (
            f"{overall.mean:.3f} [{overall.interval.low:.3f}, {overall.interval.high:.3f}], {missed} missed"
        )

    rows = [[labelled_name(n), *(cell(arm, n) for arm in plan.arms)] for n in plan.labelled]
    return _table(["labelled", *plan.arms], rows)


def _differences(plan: Plan, results: Results) -> str:
    rows = []
    for labelled in plan.labelled:
        for a, b in plan.compare:
            cells = [labelled_name(labelled), a, b]
            for metric in ("dsc", "nsd"):
                line = _overall(compare(results[a, labelled], results[b, labelled], metric))
                cells += [_difference(line), f"{line.p_value:.3f}" if line.p_value >= 0.001 else "< 0.001"]
            rows.append(cells)
    return _table(["labelled", "A", "B", "DSC, B - A", "p", "NSD at 2 mm, B - A", "p"], rows)


def verdict(plan: Plan, results: Results, a: str, b: str) -> str:
    """In words, where the interval of the overall DSC's difference excludes 0, and where it does not."""
    found: dict[str, list[str]] = {}
    for labelled in plan.labelled:
        line = _overall(compare(results[a, labelled], results[b, labelled], "dsc"))
        told = ("better" if line.difference > 0 else "worse") if excludes_zero(line) else "not told apart"
        found.setdefault(told, []).append(f"{labelled_name(labelled)} ({line.difference:+.3f})")
    said = "; ".join(f"{told} with {' and '.join(where)} labelled" for told, where in found.items())
    return f"- **{b} against {a}**: {said}."


def _organs(plan: Plan, results: Results, a: str, b: str) -> str:
    columns = [compare(results[a, n], results[b, n], "dsc") for n in plan.labelled]
    rows = [[lines[0].organ, *map(_difference, lines)] for lines in zip(*columns, strict=True)]
    return f"**{b} - {a}**\n\n" + _table(
        ["organ", *(f"labelled {labelled_name(n)}" for n in plan.labelled)], rows
    )


def _difference(line: Comparison) -> str:
    text = f"{line.difference:+.3f} [{line.interval.low:+.3f}, {line.interval.high:+.3f}]"
    return f"**{text}**" if excludes_zero(line) else text


def excludes_zero(line: Comparison) -> bool:
    return line.interval.low > 0 or line.interval.high < 0


def _overall(lines: Sequence[Any]) -> Any:
    (found,) = (line for line in lines if line.organ == OVERALL)
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(plan: Plan, results: Results) -> Figure:
    """Means with a dot per seed; paired differences with their intervals."""
    drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    _draw_means(left, plan, results)
    _draw_differences(right, plan, results)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_means(axes: Axes, plan: Plan, results: Results) -> None:
    for number, (arm, colour) in enumerate(zip(plan.arms, COLOURS, strict=False)):
        shift = 0.09 * (number - (len(plan.arms) - 1) / 2)
        places = [i + shift for i in range(len(plan.labelled))]
        means = []
        for place, labelled in zip(places, plan.labelled, strict=True):
            rows = results[arm, labelled]
            seeds = [
                _overall(summarise([row for row in rows if row["seed"] == seed], draws=1)).mean
                for seed in plan.seeds
            ]
            axes.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.6)
            means.append(math.fsum(seeds) / len(seeds))
        axes.plot(places, means, "D-", color=colour, label=arm)
    axes.set_xticks(range(len(plan.labelled)), [labelled_name(n) for n in plan.labelled])
    axes.set_xlim(-0.5, len(plan.labelled) - 0.5)
    axes.set_xlabel("labelled patients")
    axes.set_ylabel("DSC, a dot per seed")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, plan: Plan, results: Results) -> None:
    names: list[str] = []
    axes.axvline(0, color="#8a94a3", linewidth=1)
    for labelled in plan.labelled:
        for a, b in plan.compare:
            line = _overall(compare(results[a, labelled], results[b, labelled], "dsc"))
            colour = COLOURS[list(plan.arms).index(b) % len(COLOURS)]
            y = len(names)
            axes.plot(line.interval, (y, y), color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(line.difference, y, "D", color=colour)
            names.append(f"{b} - {a}, {labelled_name(labelled)}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("paired difference in DSC, 95 % interval")


def main() -> None:
    """Take rows, write table and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="a folder of docs/experiments")
    parser.add_argument("work", type=Path, nargs="?", help="folder of the runs")
    asked = parser.parse_args()
    plan = read_plan(asked.experiment)
    if asked.work is not None and (missing := take_rows(plan, asked.work)):
        print(f"Missing: {', '.join(missing)}")
    results = read_results(plan)
    write_text(plan.folder / "table.md", text := markdown(plan, results))
    matplotlib.rcParams["svg.hashsalt"] = "alice"  # the same rows make the same file
    figure(plan, results).savefig(plan.folder / "figure.svg", metadata={"Date": None})
    print(text)


if __name__ == "__main__":
    main()
