"""Check numbers that a user gave; the error names the argument and the value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from custom.errors import AliceError


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``.

    Raises:
        AliceError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise AliceError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")
    return float(value)


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``.

    Raises:
        AliceError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AliceError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def worker_count(workers: int | None) -> int:
    """A number of worker processes; None takes :func:`default_workers`, 0 and 1 mean that there are none.

    Raises:
        AliceError: if it is not a whole number of at least 0.
    """
    return default_workers() if workers is None else whole_number("workers", workers, 0)


def default_workers() -> int:
    """One worker process for each core that this process may use, but at least two and at most four (ours).

    At least two, because a single one is no process of its own: a file that crashes its reader would end the command.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(4, cores))


def voxel_size(spacing: Sequence[float]) -> list[float]:
    """Millimetres along x, y, z.

    Raises:
        AliceError: if they are not three numbers between 0.1 and 20.
    """
    given: list[Any] = list(spacing) if isinstance(spacing, list | tuple) else [spacing]
    numeric = all(isinstance(s, int | float) and not isinstance(s, bool) for s in given)
    if len(given) != 3 or not numeric or not all(0.1 <= s <= 20 for s in given):
        raise AliceError(f"spacing must be three numbers of mm between 0.1 and 20, got {given}.")
    return [float(s) for s in given]
