"""Which scans SAM is trained on, and how often."""

from __future__ import annotations

import re
from collections.abc import Mapping

from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError


def training_names(
    store: VolumeStore, held_back: str | None = None, repeats: Mapping[str, int] | None = None
) -> list[str]:
    """The scans to train on, some of them more often than once a round.

    Args:
        store: all scans.
        held_back: regular expression; a scan whose name it is found in is never trained on.
        repeats: regular expression -> how often a scan whose name it is found in is listed; the first match counts.

    Raises:
        AliceError: if an expression is invalid, or no scan is left.
    """
    try:
        rules = [(re.compile(pattern), int(times)) for pattern, times in (repeats or {}).items()]
        barred = re.compile(held_back) if held_back else None
    except re.error as error:
        raise AliceError(
            f"held_back = {held_back!r}, repeats = {repeats}: no regular expression ({error})."
        ) from error
    names: list[str] = []
    for name in store.names:
        if barred is None or not barred.search(name):
            names += [name] * next((times for rule, times in rules if rule.search(name)), 1)
    if not names:
        raise AliceError(f"{store.path}: held_back = {held_back!r} leaves no scan to train on.")
    return names
