"""Numbers as a user may type them, refused by name when they are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from custom.errors import AliceError


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise AliceError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")
    return float(value)


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AliceError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def voxel_size(spacing: Sequence[float]) -> list[float]:
    """Millimetres along x, y, z.

    Raises:
        ValueError: if they are not three numbers between 0.1 and 20.
    """
    given: list[Any] = list(spacing) if isinstance(spacing, list | tuple) else [spacing]
    numeric = all(isinstance(s, int | float) and not isinstance(s, bool) for s in given)
    if len(given) != 3 or not numeric or not all(0.1 <= s <= 20 for s in given):
        raise AliceError(f"spacing must be three numbers of mm between 0.1 and 20, got {given}.")
    return [float(s) for s in given]
