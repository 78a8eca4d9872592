"""Rows of scores in a CSV file, with every digit."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from custom.errors import AliceError
from custom.files import read_text, write_text

# a spreadsheet computes what begins like this; an apostrophe before it says that it is text
_FORMULA = re.compile(r"'*[=+\-@\t]")
_NUMBERS: dict[str, type] = dict.fromkeys(("label", "fold", "seed"), int) | dict.fromkeys(
    ("dsc", "nsd", "hd95", "reference_ml", "prediction_ml"), float
)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with every digit, all or nothing. Text that a spreadsheet would compute gets an apostrophe.

    Raises:
        AliceError: if there are no rows, or their keys differ.
    """
    if not rows:
        raise AliceError(f"No rows to write to '{path}': score at least one case first.")
    for index, row in enumerate(rows):
        if set(row) != set(rows[0]):
            different = sorted(set(row) ^ set(rows[0]))
            raise AliceError(
                f"Row {index} and row 0 differ in the columns {different}; give all rows the same."
            )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _as_text(value) for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read what :func:`write_rows` wrote: text loses the apostrophe that protected it, scores are numbers again, unknown columns stay text.

    Raises:
        AliceError: naming file, line and column of a value that is not a number, or the line that has too few
            or too many values.
    """
    rows = []
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                raise AliceError(
                    f"'{path}', line {reader.line_num}: not as many values as the header has columns."
                )
            row = {key: _as_it_was(value) for key, value in row.items()}
            for column in set(row) & set(_NUMBERS):
                try:
                    row[column] = _NUMBERS[column](row[column])
                except ValueError:
                    raise AliceError(
                        f"'{path}', line {reader.line_num}: {column} is '{row[column]}', which is not a number."
                    ) from None
            rows.append(row)
    return rows


def _as_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\\r")  # it would end the row
    return f"'{value}" if _FORMULA.match(value) else value


def _as_it_was(value: str) -> str:
    return value[1:] if value.startswith("'") and _FORMULA.match(value) else value
