"""Tables and figure of a comparison of methods, from its rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from custom.engine.run_log import read_log
from custom.errors import AliceError
from custom.evaluation.scores.csv_rows import read_rows, write_rows
from custom.evaluation.statistics.per_organ import OVERALL, Comparison, compare, summarise
from custom.evaluation.statistics.significance import holm
from custom.files import write_text
from custom.study.plan import FIGURES, Labelled, Plan, labelled_name, runs_of, trained_arms

Rows = list[dict[str, Any]]
Cell = tuple[str, str, Labelled]  # network, way, number of labelled patients
FEWEST_SEEDS = 3  # of an interval (ours)
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
            if not (path / "encoder.safetensors").is_file():
                missing.append(run.folder.as_posix())
                continue
            probed += _probes(path, {"network": run.network, "arm": run.arm, "seed": run.seed})
            spent = json.loads((path / "spent.json").read_text(encoding="utf-8"))
            examined = json.loads(
                (work / "examined" / run.network / f"{run.arm}.json").read_text(encoding="utf-8")
            )
            one = costs.setdefault(f"{run.network}/{run.arm}", examined | {"cpu_seconds": [], "seconds": []})
            for unit, value in spent.items():
                one[unit].append(round(value, 1))
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


def _probes(run: Path, about: dict[str, Any]) -> Rows:
    """The first probe of a run, which is of the untrained encoder, and the last."""
    found = [line for line in read_log(run) if "probe/retrieval" in line]
    rows = []
    for state, line in zip(("untrained", "trained"), [found[0], found[-1]] if found else [], strict=False):
        rows.append(
            about | {"state": state, "step": line["step"]} | {k: line.get(f"probe/{k}") for k in FIGURES}
        )
    return rows


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
    lines = {(cell, a, b): _compared(plan, results, cell, a, b) for cell in cells for a, b in plan.pairs}
    known = {key: found for key, found in lines.items() if found}
    parts = (
        ["\n".join(verdict(plan, known, a, b) for a, b in plan.pairs)]
        if len(plan.seeds) >= FEWEST_SEEDS
        else []
    )
    parts += [
        "![Mean DSC of the arms, and paired differences with 95 % intervals](figure.svg)",
        "## Means",
        "DSC, mean over patients of each patient's mean over organs, and its 95 % interval over seeds and patients. "
        "Missed: organs that a network did not find at all; they count as 0.",
        _table(
            ["", *plan.arms],
            [
                [_name(plan, cell), *(_mean(plan, results.get((cell, arm))) for arm in plan.arms)]
                for cell in cells
            ],
        ),
    ]
    if known and len(plan.seeds) >= FEWEST_SEEDS:
        overall = {key: (_overall(dsc), _overall(nsd)) for key, (dsc, nsd) in known.items()}
        adjusted = holm([dsc.p_value for dsc, _ in overall.values()])
        rows = [
            [_name(plan, cell), a, b, _difference(dsc), _p(dsc.p_value), _p(p), _difference(nsd)]
            for ((cell, a, b), (dsc, nsd)), p in zip(overall.items(), adjusted, strict=True)
        ]
        parts += [
            "## Paired differences",
            "B - A by patient and seed, overall; 95 % intervals from a bootstrap over seeds and patients, those that exclude 0 in bold. "
            "p: Wilcoxon's signed-rank test on patients, seeds averaged; Holm: adjusted for the number of rows.",
            _table(["", "A", "B", "DSC, B - A", "p", "Holm", "NSD at 2 mm, B - A"], rows),
            "## By organ, DSC",
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


def verdict(plan: Plan, compared: Mapping[tuple[Cell, str, str], Any], a: str, b: str) -> str:
    """In words, where the interval of the overall DSC's difference excludes 0, and where it does not."""
    found: dict[str, list[str]] = {}
    for (cell, x, y), (dsc, _) in compared.items():
        if (x, y) == (a, b):
            line = _overall(dsc)
            told = ("better" if line.difference > 0 else "worse") if excludes_zero(line) else "not told apart"
            found.setdefault(told, []).append(f"{_name(plan, cell)} ({line.difference:+.3f})")
    said = "; ".join(f"{told} at {' and '.join(where)}" for told, where in found.items())
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
        states = [("untrained", [row for row in of_network if row["state"] == "untrained"])]
        for arm in trained_arms(plan):
            states.append((arm, [r for r in of_network if r["state"] == "trained" and r["arm"] == arm]))
        rows += [
            [network, name, *(_spread([r[key] for r in found]) for key in titles)]
            for name, found in states
            if found
        ]
    return [
        "## Probe of the frozen encoders",
        "Scans held back; mean over seeds, and the lowest and highest seed. Retrieval: how often the same region of another patient is "
        "the nearest one. Place: how far the most similar token of another patient lies from the right place. Linear: how well "
        "organs are read off single tokens (mean r). `alice probe --help` says more.",
        _table(["network", "encoder", *titles.values()], rows),
    ]


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
        crops = one["iterations"] * one["crops a step"]
        flops = one["flops a step"] / one["crops a step"] / 1e9
        rows.append(
            [
                network,
                arm,
                f"{one['iterations']:,.0f}",
                f"{crops:,.0f}",
                f"{flops:.2f}",
                _spread(one["seconds"]),
                _spread(one["cpu_seconds"]),
            ]
            + [f"{one[key] / 1e6:.2f}" for key in ("parameters", "parameters trained")]
        )
    budget = "".join(f"Every arm spends {value:g} {unit}. " for unit, value in plan.budget.items())
    header = [
        "network",
        "arm",
        "steps",
        "crops seen",
        "GFLOP a crop",
        "seconds",
        "CPU seconds",
        "encoder, M",
        "trained, M",
    ]
    return [
        "## Costs of a pre-training",
        f"{budget or 'The configs say how many steps. '}Seconds of this machine, with all probes and the start; FLOPs of matrix products, "
        "convolutions and attention, backward included; parameters in millions.",
        _table(header, rows),
    ]


def _rates(chosen: Mapping[str, Any]) -> list[str]:
    rates = list(dict.fromkeys(rate for one in chosen.values() for rate in one["tried"]))
    rows = []
    for name, one in chosen.items():
        cells = ["failed" if one["tried"][rate] is None else f"{one['tried'][rate]:.4g}" for rate in rates]
        rows.append([*name.split("/"), *cells, "none" if one["rate"] is None else f"{one['rate']:g}"])
    on = next(iter(chosen.values()))["by"]
    return [
        "## Learning rates that were tried",
        f"The probe's {on} on scans that are not reported, one seed. `failed`: the run diverged or ended with an error.",
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
