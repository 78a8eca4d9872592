"""Tables and figure of a comparison of methods, from its rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from custom.engine.run_log import read_log
from custom.errors import AliceError
from custom.evaluation.scores.csv_rows import read_rows, write_rows
from custom.evaluation.statistics.per_organ import OVERALL, Comparison, compare, summarise
from custom.evaluation.statistics.significance import (
    MIN_CASES,
    Interval,
    bootstrap_interval,
    holm,
    signed_rank_p,
)
from custom.files import write_text
from custom.study.plan import Labelled, Plan, labelled_name, runs_of, trained_arms

Rows = list[dict[str, Any]]
Cell = tuple[str, str, Labelled]  # network, way, number of labelled patients
FEWEST_SEEDS = 3  # of an interval (ours)
LEVEL = 0.05  # of the adjusted p
FEW = "Three seeds are few: intervals are too narrow rather than too wide."
COLOURS = (
    "#8a94a3",
    "#3d84c6",
    "#e08a1e",
    "#5f9e6e",
    "#a5678e",
    "#b9a13b",
    "#6d6fc4",
    "#c2574d",
    "#4aa3a3",
    "#7a6a58",
)


def rows_file(folder: Path, cell: Cell, arm: str) -> Path:
    """Scores of one arm, all seeds."""
    network, way, labelled = cell
    return folder / "rows" / network / arm / f"{way}_labelled-{labelled_name(labelled)}.csv"


def collect(plan: Plan, work: Path, folder: Path) -> list[str]:
    """Put the rows of all finished runs into a folder; the names of the runs that are missing.

    Args:
        plan: what is compared.
        work: of the sweep.
        folder: gets ``rows/NETWORK/ARM/WAY_labelled-N.csv`` (of the organs that are scored), ``probe.json``, ``costs.json`` and
            ``chosen.json``.
    """
    missing, probed = [], []
    scores: dict[tuple[Cell, str], Rows] = {}
    costs: dict[str, dict[str, Any]] = {}
    shutil.rmtree(folder / "rows", ignore_errors=True)
    for run in runs_of(plan):
        path = work / run.folder
        if run.labelled is None:
            if not (path / "probe.json").is_file():
                missing.append(run.folder.as_posix())
                continue
            found = json.loads((path / "probe.json").read_text(encoding="utf-8"))
            probed.append({"network": run.network, "arm": run.arm, "seed": run.seed} | found)
            examined = json.loads(
                (work / "examined" / run.network / f"{run.arm}.json").read_text(encoding="utf-8")
            )
            one = costs.setdefault(
                f"{run.network}/{run.arm}", examined | {"steps": found["step"], "seconds": []}
            )
            one["seconds"].append(round(_seconds(path, examined["crops a step"]), 1))
        elif (path / "rows.csv").is_file():
            assert run.way is not None
            rows = [row for row in read_rows(path / "rows.csv") if row["organ"] in plan.scored]
            scores.setdefault(((run.network, run.way, run.labelled), run.arm), []).extend(rows)
        else:
            missing.append(run.folder.as_posix())
    for (cell, arm), rows in scores.items():
        write_rows(rows_file(folder, cell, arm), rows)
    if probed:
        write_text(folder / "probe.json", json.dumps(probed, indent=1) + "\n")
        write_text(folder / "costs.json", json.dumps(costs, indent=1) + "\n")
    if (work / "chosen.json").is_file():
        shutil.copyfile(work / "chosen.json", folder / "chosen.json")
    return missing


def _seconds(run: Path, crops_a_step: float) -> float:
    """How long a pre-training took, by the speeds in its log; what a killed part did is in it, starts are not."""
    seconds, before = 0.0, 0
    for line in read_log(run):
        if line.get("crops_per_second"):
            seconds += (line["step"] - before) * crops_a_step / line["crops_per_second"]
            before = line["step"]
    return seconds


def read_results(plan: Plan, folder: Path) -> Mapping[tuple[Cell, str], Rows]:
    """``{((network, way, labelled), arm): rows}`` of a folder; arms without rows are left out."""
    results = {}
    for network in plan.networks:
        for way in plan.ways:
            for labelled in plan.labelled:
                for arm in plan.arms:
                    path = rows_file(folder, (network, way, labelled), arm)
                    if path.is_file():
                        results[(network, way, labelled), arm] = read_rows(path)
    return results


def write_report(plan: Plan, folder: Path) -> str:
    """Write ``table.md`` and ``figure.svg`` from the rows of a folder; the text of the table.

    Raises:
        AliceError: if the folder has no rows.
    """
    results = read_results(plan, folder)
    path = folder / "probe.json"
    probed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not results and not probed:
        raise AliceError(f"{folder}: has no rows of this plan; finish a run first.")
    text = markdown(plan, folder, results, probed)
    write_text(folder / "table.md", text)
    if results:
        matplotlib.rcParams["svg.hashsalt"] = "alice"  # the same rows make the same file
        figure(plan, results).savefig(folder / "figure.svg", metadata={"Date": None})
    return text


def markdown(plan: Plan, folder: Path, results: Mapping[tuple[Cell, str], Rows], probed: Rows) -> str:
    """Verdicts, means, paired differences, organs, probe, costs and rates."""
    cases = {row["case"] for rows in results.values() for row in rows}
    over = (
        f"{len(cases)} patients held back, {len(plan.seeds)} seeds. "
        if cases
        else f"Seeds: {len(plan.seeds)}. "
    )
    parts = [
        f"# {plan.folder.resolve().name}: methods compared",
        f"{over}Written by `alice compare-methods` from the rows beside it.",
    ]
    if len(plan.seeds) < FEWEST_SEEDS:
        parts.append(
            f"**Seeds: {len(plan.seeds)}. Fewer than {FEWEST_SEEDS}: no interval is printed, and nothing is told apart.**"
        )
    if results:
        parts += _scores(plan, results)
    if probed:
        parts += _probe(plan, probed)
    if (folder / "costs.json").is_file():
        parts += _costs(plan, json.loads((folder / "costs.json").read_text(encoding="utf-8")))
    if (folder / "chosen.json").is_file():
        parts += _rates(json.loads((folder / "chosen.json").read_text(encoding="utf-8")))
    if plan.published:
        parts += [
            "## Published by others",
            "Theirs: other data, networks and budgets. Not comparable with the tables above.",
        ]
        parts.append("\n".join(f"- {line}" for line in plan.published))
    return "\n\n".join(parts) + "\n"


def _scores(plan: Plan, results: Mapping[tuple[Cell, str], Rows]) -> list[str]:
    cells = list(dict.fromkeys(cell for cell, _ in results))
    cases = len({row["case"] for rows in results.values() for row in rows})
    enough = len(plan.seeds) >= FEWEST_SEEDS and cases >= MIN_CASES
    lines = {(cell, a, b): _compared(plan, results, cell, a, b) for cell in cells for a, b in plan.pairs}
    known = {key: found for key, found in lines.items() if found and enough}
    overall = {key: (_overall(dsc), _overall(nsd)) for key, (dsc, nsd) in known.items()}
    adjusted = dict(zip(overall, holm([dsc.p_value for dsc, _ in overall.values()]), strict=True))
    told = {key: (dsc.difference, dsc.interval, adjusted[key]) for key, (dsc, _) in overall.items()}
    parts = []
    if cases < MIN_CASES:
        parts.append(f"**Patients held back: {cases}. Fewer than {MIN_CASES}: nothing is told apart.**")
    if enough:
        parts.append("\n".join(verdict(plan, told, a, b) for a, b in plan.pairs))
    header = ["", *plan.arms]
    parts += [
        "![Mean DSC of the arms, and paired differences with 95 % intervals](figure.svg)",
        "## Means",
        "DSC, mean over patients of each patient's mean over organs, and its 95 % interval over seeds and patients. "
        "Missed: organs that a network did not find at all; they count as 0.",
        _table(
            header,
            [
                [_name(plan, cell), *(_mean(plan, results.get((cell, arm))) for arm in plan.arms)]
                for cell in cells
            ],
        ),
    ]
    if known:
        rows = [
            [
                _name(plan, key[0]),
                *key[1:],
                _difference(dsc),
                _p(dsc.p_value),
                _p(adjusted[key]),
                _difference(nsd),
            ]
            for key, (dsc, nsd) in overall.items()
        ]
        parts += [
            "## Paired differences",
            f"B - A by patient and seed, overall; 95 % intervals from a bootstrap over seeds and patients, those that exclude 0 in bold. {FEW} "
            "p: Wilcoxon's signed-rank test on patients, seeds averaged; Holm: adjusted for the number of rows. An arm is called better or "
            "worse if the interval excludes 0 and the adjusted p is below 0.05.",
            _table(["", "A", "B", "DSC, B - A", "p", "Holm", "NSD at 2 mm, B - A"], rows),
            "## By organ, DSC",
            "Nothing is adjusted for the number of cells here: of twenty, one excludes 0 by chance.",
        ]
        for a, b in plan.pairs:
            columns = {cell: found[0] for (cell, x, y), found in known.items() if (x, y) == (a, b)}
            organs = [
                [line[0].organ, *map(_difference, line)] for line in zip(*columns.values(), strict=True)
            ]
            parts.append(
                f"**{b} - {a}**\n\n" + _table(["organ", *(_name(plan, cell) for cell in columns)], organs)
            )
    return parts


def _compared(
    plan: Plan, results: Mapping[tuple[Cell, str], Rows], cell: Cell, a: str, b: str
) -> tuple[list[Comparison], list[Comparison]] | None:
    """DSC and NSD of two arms; None unless both have all seeds."""
    of_a, of_b = (results.get((cell, arm), []) for arm in (a, b))
    if any(set(plan.seeds) - {row["seed"] for row in rows} for rows in (of_a, of_b)):
        return None
    return compare(of_a, of_b, "dsc"), compare(of_a, of_b, "nsd")


def verdict(
    plan: Plan,
    told: Mapping[Any, tuple[float, Interval, float]],
    a: str,
    b: str,
    more: str = "better",
    digits: int = 3,
) -> str:
    """In words: where the interval of a difference excludes 0 and the adjusted p is below 0.05, and where not.

    Args:
        plan: what is compared.
        told: ``(cell or its name, A, B)`` -> difference B - A, its interval, adjusted p.
        a, b: two arms.
        more: what a positive difference is, better or worse.
        digits: of the difference.
    """
    words = {True: more, False: "worse" if more == "better" else "better"}
    found: dict[str, list[str]] = {}
    for (cell, x, y), (difference, interval, p) in told.items():
        if (x, y) == (a, b):
            apart = (interval.low > 0 or interval.high < 0) and p < LEVEL
            name = cell if isinstance(cell, str) else _name(plan, cell)
            found.setdefault(words[difference > 0] if apart else "not told apart", []).append(
                f"{name} ({difference:+.{digits}f})"
            )
    said = "; ".join(f"{how} at {' and '.join(where)}" for how, where in found.items())
    return f"- **{b} against {a}**: {said or 'runs are missing'}."


def _mean(plan: Plan, rows: Rows | None) -> str:
    if not rows:
        return "-"
    seeds = {row["seed"] for row in rows} & set(plan.seeds)
    overall = _overall(summarise(rows, "dsc"))
    lacking = "" if len(seeds) == len(plan.seeds) else f", {len(seeds)} of {len(plan.seeds)} seeds"
    interval = (
        f" [{overall.interval.low:.3f}, {overall.interval.high:.3f}]" if len(seeds) >= FEWEST_SEEDS else ""
    )
    return f"{overall.mean:.3f}{interval}, {overall.counts['missed']} missed{lacking}"


def _probe(plan: Plan, probed: Rows) -> list[str]:
    titles = {"retrieval": "retrieval", "place_mm": "place, mm", "linear": "linear"}
    rows = []
    for network in plan.networks:
        of_network = [row for row in probed if row["network"] == network]
        untrained = list({row["seed"]: row["untrained"] for row in of_network}.values())
        lines = [("untrained", untrained)] if untrained else []
        for arm in trained_arms(plan):
            lines.append((arm, [row["trained"] for row in of_network if row["arm"] == arm]))
        for name, found in lines:
            lacking = f", {len(found)} of {len(plan.seeds)} seeds" if len(found) < len(plan.seeds) else ""
            rows.append([network, name + lacking, *(_spread([one[key] for one in found]) for key in titles)])
    parts = [
        "## Probe of the frozen encoders",
        "Scans held back; mean over seeds, and the lowest and highest seed. Retrieval: how often the same region of another patient is "
        "the nearest one. Place: how far the most similar token of another patient lies from the right place. Linear: how well "
        "organs are read off single tokens (mean r). The encoder is the one that is exported, which for some methods is the teacher's. "
        "`alice probe --help` says more.",
        _table(["network", "encoder", *titles.values()], rows),
    ]
    if len(plan.seeds) >= FEWEST_SEEDS:
        parts += _probe_differences(plan, probed)
    return parts


def _probe_differences(plan: Plan, probed: Rows) -> list[str]:
    """Paired by patient and seed: retrieval and place error of each two trained arms that are compared."""
    said, rows = [], []
    patients = 0
    for key, title, more, digits in (
        ("retrieval", "retrieval", "better", 3),
        ("place_mm", "place, mm", "worse", 1),
    ):
        differences = {
            (f"{network}, {title}", a, b): found
            for network in plan.networks
            for a, b in plan.pairs
            if (found := _paired(plan, probed, network, a, b, key)) is not None
        }
        if not differences:
            return []
        patients = min(found.shape[1] for found in differences.values())
        p_values = [signed_rank_p(found.mean(axis=0)) for found in differences.values()]
        told = {
            pair: (float(found.mean()), bootstrap_interval(found), p)
            for (pair, found), p in zip(differences.items(), holm(p_values), strict=True)
        }
        said += [verdict(plan, told, a, b, more, digits) for a, b in plan.pairs]
        for (name, a, b), (difference, interval, p) in told.items():
            text = f"{difference:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
            bold = "**" if interval.low > 0 or interval.high < 0 else ""
            rows.append([name, a, b, f"{bold}{text}{bold}", _p(p)])
    least = 2.0 ** (1 - patients)
    limit = ""
    if len(rows) // 2 * least >= LEVEL:
        limit = f" With {patients} patients p is at least {least:.3f}, so that with {len(rows) // 2} rows no arm can be told apart."
    return [
        "\n".join(said),
        "B - A by patient and seed, intervals and p as for scores; Holm: adjusted for the rows of one figure. A place error is better where it is "
        f"lower. {FEW}{limit}",
        _table(["", "A", "B", "B - A", "Holm"], rows),
    ]


def _paired(plan: Plan, probed: Rows, network: str, a: str, b: str, key: str) -> np.ndarray | None:
    """Differences B - A (seeds, patients) of a figure; None if a seed is missing, or there are too few patients."""
    of = {(row["arm"], row["seed"]): row["by_patient"][key] for row in probed if row["network"] == network}
    if not all((arm, seed) in of for arm in (a, b) for seed in plan.seeds):
        return None
    patients = sorted(of[a, plan.seeds[0]])
    if len(patients) < MIN_CASES:
        return None
    return np.array([[of[b, s][p] - of[a, s][p] for p in patients] for s in plan.seeds])


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 3 if max(known) < 2 else 1
    ends = f" ({min(known):.{digits}f} to {max(known):.{digits}f})" if len(known) > 1 else ""
    return f"{math.fsum(known) / len(known):.{digits}f}{ends}"


def _costs(plan: Plan, costs: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, one in costs.items():
        network, arm = name.split("/")
        crops, flops = one["steps"] * one["crops a step"], one["flops a step"] / one["crops a step"] / 1e9
        rows.append(
            [network, arm, f"{one['steps']:,.0f}", f"{crops:,.0f}", f"{flops:.2f}", _spread(one["seconds"])]
            + [f"{one[key] / 1e6:.2f}" for key in ("parameters", "parameters trained")]
        )
    budget = "".join(f"Every arm spends {value:g} {unit}. " for unit, value in plan.budget.items())
    header = ["network", "arm", "steps", "crops seen", "GFLOP a crop", "seconds", "encoder, M", "trained, M"]
    return [
        "## Costs of a pre-training",
        f"{budget or 'The configs say how many steps. '}Seconds of this machine by the speeds in the log, with the first probe and without the start; "
        "FLOPs of matrix products, convolutions and attention, backward included; parameters in millions.",
        _table(header, rows),
    ]


def _rates(chosen: Mapping[str, Any]) -> list[str]:
    rates = list(dict.fromkeys(rate for one in chosen.values() for rate in one["tried"]))
    rows = []
    for name, one in chosen.items():
        tried = {rate: one["tried"].get(rate, math.nan) for rate in rates}
        cells = ["diverged" if v is None else "-" if math.isnan(v) else f"{v:.4g}" for v in tried.values()]
        taken = "none" if one["rate"] is None else f"{one['rate']:g}"
        edge = len(rates) > 1 and taken in (min(rates, key=float), max(rates, key=float))
        rows.append([*name.split("/"), *cells, f"{taken} (at the edge)" if edge else taken])
    on = next(iter(chosen.values()))["by"]
    return [
        "## Learning rates that were tried",
        f"The probe's {on} on scans that are not reported, one seed. A rate at the edge of those that were tried may not be the best one.",
        _table(["network", "arm", *rates, "taken"], rows),
    ]


def _name(plan: Plan, cell: Cell) -> str:
    """Only what differs between the plan's cells."""
    network, way, labelled = cell
    parts = [network] * (len(plan.networks) > 1) + [way] * (len(plan.ways) > 1)
    return ", ".join([*parts, f"{labelled_name(labelled)} labelled"])


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _difference(line: Comparison) -> str:
    text = f"{line.difference:+.3f} [{line.interval.low:+.3f}, {line.interval.high:+.3f}]"
    return f"**{text}**" if excludes_zero(line) else text


def excludes_zero(line: Comparison) -> bool:
    """Whether the interval of a difference excludes 0."""
    return line.interval.low > 0 or line.interval.high < 0


def _overall(lines: Sequence[Any]) -> Any:
    (found,) = (line for line in lines if line.organ == OVERALL)
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(plan: Plan, results: Mapping[tuple[Cell, str], Rows]) -> Figure:
    """Means with a dot per seed; paired differences with their intervals."""
    cells = list(dict.fromkeys(cell for cell, _ in results))
    drawn = Figure(figsize=(9.0, max(3.6, 0.25 * len(cells) * len(plan.pairs) + 1)), layout="constrained")
    left, right = drawn.subplots(1, 2)
    _draw_means(left, plan, results, cells)
    _draw_differences(right, plan, results, cells)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_means(
    axes: Axes, plan: Plan, results: Mapping[tuple[Cell, str], Rows], cells: Sequence[Cell]
) -> None:
    for number, arm in enumerate(plan.arms):
        colour, shift = COLOURS[number % len(COLOURS)], 0.09 * (number - (len(plan.arms) - 1) / 2)
        places, means = [], []
        for place, cell in enumerate(cells):
            rows = results.get((cell, arm), [])
            seeds = sorted({row["seed"] for row in rows})
            of_seed = [
                _overall(summarise([r for r in rows if r["seed"] == seed], draws=1)).mean for seed in seeds
            ]
            axes.plot([place + shift] * len(seeds), of_seed, ".", color=colour, alpha=0.6)
            if of_seed:
                places.append(place + shift)
                means.append(math.fsum(of_seed) / len(of_seed))
        axes.plot(places, means, "D-", color=colour, label=arm)
    axes.set_xticks(range(len(cells)), [_name(plan, cell).replace(", ", "\n") for cell in cells])
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_ylabel("DSC, a dot per seed")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_differences(
    axes: Axes, plan: Plan, results: Mapping[tuple[Cell, str], Rows], cells: Sequence[Cell]
) -> None:
    names: list[str] = []
    axes.axvline(0, color="#8a94a3", linewidth=1)
    for cell in cells if len(plan.seeds) >= FEWEST_SEEDS else []:
        for a, b in plan.pairs:
            if found := _compared(plan, results, cell, a, b):
                line, y = _overall(found[0]), len(names)
                colour = COLOURS[list(plan.arms).index(b) % len(COLOURS)]
                axes.plot(line.interval, (y, y), color=colour, linewidth=2.5, solid_capstyle="butt")
                axes.plot(line.difference, y, "D", color=colour)
                names.append(f"{b} - {a}, {_name(plan, cell)}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_xlabel("paired difference in DSC, 95 % interval")
