"""Read the rows of a run from one or several files, and check that two runs have the same cases."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from custom.errors import AliceError
from custom.evaluation.scores.csv_rows import read_rows
from custom.evaluation.statistics.paired_rows import Pair, Row, key_of
from custom.evaluation.statistics.per_organ import merge_folds
from custom.files import read_text

_NAMED = {
    key: re.compile(rf"(?:^|[/\\_\-.]){key}[_\-]?(\d+)(?!\d)", re.IGNORECASE) for key in ("fold", "seed")
}


def read_run(source: str | Path) -> list[dict[str, Any]]:
    """The rows of a run: one CSV, or a folder of them, one per fold (and seed).

    Rows without a ``fold`` take the number after ``fold`` in their file's path, or else the file's place in
    the sorted list. Rows without a ``seed`` take the number after ``seed``, if all paths have one.

    Raises:
        AliceError: if there is no such file, it holds no rows of scores, or two folds hold a case.
    """
    source = Path(source).expanduser()
    if source.is_file():
        files = [source]
    elif source.is_dir():
        files = sorted((p for p in source.rglob("*.csv") if _is_score_file(p)), key=_natural)
    else:
        raise AliceError(
            f"{source}: no such file or folder. Give a rows.csv of alice score, or a folder of them."
        )
    if not files:
        raise AliceError(f"{source}: no CSV with the columns case and organ in it. Run alice score first.")
    parts = [read_rows(path) for path in files]
    for path, rows in zip(files, parts, strict=True):
        if not rows or not {"case", "organ"} <= set(rows[0]):
            raise AliceError(f"{path}: holds no rows of scores; it needs the columns case and organ.")
    if len(files) == 1:
        return parts[0]
    seeds = [_number_in_path(path, source, "seed") for path in files]
    for path, rows, seed in zip(files, parts, seeds, strict=True):
        named = {"fold": _number_in_path(path, source, "fold"), "seed": None if None in seeds else seed}
        for row in rows:
            row |= {key: value for key, value in named.items() if value is not None and key not in row}
    return merge_folds(parts)


def refuse_other_cases(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> None:
    """Raise AliceError if only one of the runs has a case, or an organ of a case; the message names them."""
    keys_a, keys_b = ({key_of(row) for row in rows} for rows in (rows_a, rows_b))
    alone = {"A": keys_a - keys_b, "B": keys_b - keys_a}
    said = [f"only in {run}: {_listed(keys)}" for run, keys in alone.items() if keys]
    if not said:
        organs_a, organs_b = ({str(row["organ"]) for row in rows} for rows in (rows_a, rows_b))
        scored_a, scored_b = ({(*key_of(r), r["organ"]) for r in rows} for rows in (rows_a, rows_b))
        if organs_a != organs_b:
            said = [f"organs in one run only: {', '.join(sorted(organs_a ^ organs_b))}"]
        elif odd := sorted(scored_a ^ scored_b):
            said = [f"scored in one run only: {', '.join(f'{organ} of {case}' for _, case, organ in odd)}"]
    if said:
        raise AliceError(
            f"The runs differ; {'; '.join(said)}. Score both on the same cases, or compare what they share "
            "with --common."
        )


def cases_in_words(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[str]:
    """Sentences about the cases of two runs: how many cases, folds and seeds, and which failed or are left out."""
    keys_a, keys_b = ({key_of(row) for row in rows} for rows in (rows_a, rows_b))
    shared = [row for row in rows_a if key_of(row) in keys_b]
    over = [f"{len({row['case'] for row in shared})} cases in both runs"]
    for what in ("fold", "seed"):
        if numbers := {row[what] for row in shared if what in row}:
            over.append(f"{len(numbers)} {what}{'s' * (len(numbers) > 1)}")
    said = [f"{', '.join(over)}."]
    for run, rows, mine, other in (("A", rows_a, keys_a, keys_b), ("B", rows_b, keys_b, keys_a)):
        failed = {key_of(row) for row in rows if row.get("status") == "failed"}
        if failed:
            said.append(f"Without a prediction in {run}, counted as 0: {_listed(failed)}.")
        if mine - other:
            said.append(f"Left out, as only {run} scored them: {_listed(mine - other)}.")
    return said


def _listed(keys: Iterable[Pair]) -> str:
    return ", ".join(f"{case} (seed {seed})" if seed else case for seed, case in sorted(keys))


def _is_score_file(path: Path) -> bool:
    try:
        return {"case", "organ"} <= set(next(csv.reader(read_text(path).splitlines()), []))
    except (AliceError, csv.Error):
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts fold2 before fold10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", str(path))]


def _number_in_path(path: Path, source: Path, key: str) -> int | None:
    found = _NAMED[key].findall(path.relative_to(source).as_posix())
    return int(found[-1]) if found else None
