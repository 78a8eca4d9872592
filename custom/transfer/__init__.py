"""Load and save weights, completely or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom.transfer.hub import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    """``from_pretrained``, imported when it is asked for: torch takes seconds."""
    if name == "from_pretrained":
        from custom.transfer.hub import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
