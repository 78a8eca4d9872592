"""A build shared by several machines: which scans each part takes, and which ones it could not use."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom.data.errors import StoreError
from custom.data.scans import Scan
from custom.data.store.volume_store import store_text
from custom.errors import AliceError
from custom.files import read_json


def share(scans: Sequence[Scan], part: str | None) -> list[Scan]:
    """The scans of part ``i/n``: every n-th one in the order of names. Without a part: all of them.

    Raises:
        AliceError: if ``part`` is not of the form ``i/n``.
    """
    if part is None:
        return list(scans)
    number, parts = parse(part)
    return sorted(scans, key=lambda scan: scan.name)[number - 1 :: parts]


def parse(part: str) -> tuple[int, int]:
    """``"2/8"`` as two numbers.

    Raises:
        AliceError: if it is not of the form ``i/n`` with ``1 <= i <= n``.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", str(part).strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise AliceError(f"part must be i/n with i from 1 to n, such as 2/8; got {part!r}.")
    return int(found[1]), int(found[2])


def save_faults(store: Path, part: str, faults: dict[str, dict[str, Any]]) -> None:
    """Save a part's unusable scans for the part that will write the index."""
    number, parts = parse(part)
    store_text(store / "parts" / f"{number}-of-{parts}.json", json.dumps(faults, indent=1))


def faults_of_parts(store: Path) -> dict[str, dict[str, Any]]:
    """Unusable scans of all parts: name -> the reason, and the size and time of its file then."""
    faults: dict[str, dict[str, Any]] = {}
    for path in sorted((store / "parts").glob("[0-9]*-of-*.json")):
        faults |= read_json(path, error=StoreError, advice="Delete it, and build this part again.")
    return faults
