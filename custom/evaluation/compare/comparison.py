"""Compare two runs: the tables as Markdown, and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from custom.errors import AliceError
from custom.evaluation.compare.page import comparison_page
from custom.evaluation.compare.run_files import cases_in_words, read_run, refuse_other_cases
from custom.evaluation.compare.worst_cases import Pictures, worst_overlays
from custom.evaluation.statistics.markdown import HOW, markdown_text, to_markdown
from custom.evaluation.statistics.paired_rows import Row
from custom.evaluation.statistics.per_organ import compare
from custom.files import write_text

METRICS = ("dsc", "nsd", "hd95")


@dataclass(frozen=True)
class Compared:
    """What :func:`compare_runs` made: the Markdown, and the files written."""

    markdown: str
    written: list[Path]


def compare_runs(
    a: str | Path,
    b: str | Path,
    output: str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    name_a: str | None = None,
    name_b: str | None = None,
    common: bool = False,
    pictures: Pictures | None = None,
    worst: int = 6,
    seed: int = 0,
    draws: int = 10_000,
) -> Compared:
    """Compare run B with run A.

    Args:
        a: CSV of :func:`custom.evaluation.scores.csv_rows.write_rows`, or a folder holding one per fold.
        b: the same of the other run.
        output: folder for comparison.md and index.html; None writes nothing.
        metrics: columns to compare; by default those of :data:`METRICS` that both runs measured.
        name_a: name of A; by default the part of its path that differs from B's.
        name_b: name of B.
        common: leave out (and count) what only one run scored; otherwise that is refused.
        pictures: shows the worst cases.
        worst: number of worst cases to show.
        seed: of the bootstrap.
        draws: number of the bootstrap's draws.

    Raises:
        AliceError: as :func:`read_run` and :func:`custom.evaluation.statistics.per_organ.compare`; if the
            runs differ in cases and ``common`` is False; or a picture is missing.
    """
    rows_a, rows_b = read_run(a), read_run(b)
    if not common:
        refuse_other_cases(rows_a, rows_b)
    for metric in metrics or ():
        for rows, source in ((rows_a, a), (rows_b, b)):
            if metric not in rows[0] or not isinstance(rows[0][metric], (int, float)):
                raise AliceError(f"{source}: no numbers '{metric}' in it; its columns are {sorted(rows[0])}.")
    asked = metrics or [m for m in METRICS if _measured(rows_a, m) and _measured(rows_b, m)]
    if not asked:
        raise AliceError(f"{a} and {b} share no measured metric among {', '.join(METRICS)}.")
    tables = {metric: compare(rows_a, rows_b, metric, seed=seed, draws=draws) for metric in asked}

    names = _run_names(Path(a), Path(b))
    name_a, name_b = name_a or names[0], name_b or names[1]
    title = f"# {markdown_text(name_b)} against {markdown_text(name_a)}\n"
    cases = f"{markdown_text(' '.join(cases_in_words(rows_a, rows_b)))}\n"
    texts = [
        to_markdown(lines, name_a=name_a, name_b=name_b, metric=m, how=False) for m, lines in tables.items()
    ]
    markdown = "\n".join([title, cases, *texts, HOW, ""])
    if output is None:
        return Compared(markdown, [])
    overlays = worst_overlays(rows_a, rows_b, pictures, worst) if pictures else []
    page = comparison_page(tables, rows_a, rows_b, name_a=name_a, name_b=name_b, overlays=overlays)
    folder = Path(output)
    write_text(folder / "comparison.md", markdown)
    return Compared(markdown, [folder / "comparison.md", page.write(folder / "index.html")])


def _measured(rows: Sequence[Row], metric: str) -> bool:
    return any(isinstance(row.get(metric), (int, float)) and not math.isnan(row[metric]) for row in rows)


def _run_names(a: Path, b: Path) -> tuple[str, str]:
    """The last parts of the paths that tell the runs apart."""
    parts = [list(path.with_suffix("").parts if path.suffix == ".csv" else path.parts) for path in (a, b)]
    while len(parts[0]) > 1 and len(parts[1]) > 1 and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    if parts[0][-1] == parts[1][-1]:
        return "A", "B"
    return parts[0][-1], parts[1][-1]
