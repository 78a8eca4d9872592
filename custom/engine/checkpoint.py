"""Checkpoints of a run: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from custom.errors import AliceError
from custom.files import read_torch, replacing

logger = logging.getLogger(__name__)

FORMAT = "alice-run-2"
_NAME = re.compile(r"^iteration_(\d+)\.pt$")


class CheckpointError(AliceError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


def save_checkpoint(folder: Path, iteration: int, content: dict[str, Any], keep: int = 2) -> Path:
    """Write ``iteration_<n>.pt`` and remove all but the newest ``keep``.

    The file is written beside its place and moved there when it is complete and on disk, so a kill or a full
    disk leaves the older checkpoints as they were.

    Args:
        folder: of the run's checkpoints; made if missing.
        iteration: number of optimizer steps done.
        content: tensors and plain Python values only.
        keep: how many checkpoints stay; at least 1.

    Raises:
        CheckpointError: if the disk is full or cannot be written.
    """
    path = checkpoint_path(folder, iteration)
    for leftover in folder.glob("iteration_*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    with (
        replacing(
            path,
            sync=True,
            error=CheckpointError,
            advice="Make room; older checkpoints are untouched.",
            failures=(OSError, RuntimeError),  # torch reports a full disk as RuntimeError
        ) as draft,
        open(draft, "wb") as file,
    ):
        torch.save({"format": FORMAT, "iteration": iteration, **content}, file)
    for old in list(checkpoints_of(folder))[: -max(keep, 1)]:
        old.unlink(missing_ok=True)
    return path


def checkpoints_of(folder: Path) -> Iterator[Path]:
    """A run's checkpoints, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("iteration_*.pt")
        if (match := _NAME.match(path.name))
    ]
    yield from (path for _, path in sorted(found))


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"iteration_{iteration:08d}.pt"


def iteration_of(path: Path) -> int:
    """The iteration that a checkpoint's name tells."""
    match = _NAME.match(path.name)
    assert match is not None
    return int(match.group(1))


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        CheckpointError: if the file is missing, damaged, or no checkpoint of ours.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint here. Every process of a run must see the same output_dir."
        )
    ours = _NAME.match(path.name)
    advice = "Delete it to go on from the one before." if ours else "Name a run's iteration_<n>.pt."
    content = read_torch(path, map_location=map_location, error=CheckpointError, advice=advice)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        kind = (
            f"its format is {found!r}, this version reads {FORMAT!r}"
            if found
            else f"format {FORMAT!r} is missing"
        )
        raise CheckpointError(
            f"{path}: no checkpoint that this version can go on with ({kind}). Choose another output_dir."
        )
    return content


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, None if it has none.

    Raises:
        CheckpointError: if the folder holds other checkpoints than ours, which would be passed over.
    """
    strange = [p for p in sorted(folder.glob("*.pt")) if not _NAME.match(p.name)]
    if strange:
        raise CheckpointError(
            f"{strange[0]}: no checkpoint of ours. Choose another output_dir, or move it away."
        )
    return next(iter(reversed(list(checkpoints_of(folder)))), None)
