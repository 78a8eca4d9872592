"""A build split over machines: which scans are whose, and what each part found wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom.data.scans import Scan
from custom.data.store.volume_store import store_text
from custom.errors import AliceError


def share(scans: Sequence[Scan], part: str | None) -> list[Scan]:
    """The scans of part ``i/n``: every n-th of all in order of their names, so that parts need not talk.

    Raises:
        ValueError: for a part that is none.
    """
    if part is None:
        return list(scans)
    number, parts = parse(part)
    return sorted(scans, key=lambda scan: scan.name)[number - 1 :: parts]


def parse(part: str) -> tuple[int, int]:
    """``"2/8"`` as numbers.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", str(part).strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise AliceError(f"part must be i/n with i from 1 to n, such as 2/8; got {part!r}.")
    return int(found[1]), int(found[2])


def save_faults(store: Path, part: str, faults: dict[str, dict[str, Any]]) -> None:
    """Leave what a part found wrong for whoever writes the index."""
    number, parts = parse(part)
    store_text(store / "parts" / f"{number}-of-{parts}.json", json.dumps(faults, indent=1))


def faults_of_parts(store: Path) -> dict[str, dict[str, Any]]:
    """Refused scans of all parts: name -> why, and the file's size and time then."""
    faults: dict[str, dict[str, Any]] = {}
    for path in sorted((store / "parts").glob("*-of-*.json")):
        faults |= json.loads(path.read_text(encoding="utf-8"))
    return faults
