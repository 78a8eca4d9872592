"""A finished (or running) pre-training on disk: its newest checkpoint as networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from custom.encoders.tokens import token_encoder
from custom.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.official import OfficialStudent
from custom.transfer.encoder_weights import build_encoder


class Run(NamedTuple):
    """What a run has learnt so far."""

    folder: Path
    iteration: int
    summary: dict[str, Any]
    student: StudentBranch | OfficialStudent  # in evaluation mode, on the CPU


def load_run(folder: str | Path) -> Run:
    """Rebuild the student of a run from its newest checkpoint.

    Args:
        folder: the run's ``output_dir``, or one checkpoint in it.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else latest_checkpoint(folder / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{folder}: no checkpoint of a run here (looked into {folder / 'checkpoints'})."
        )
    content = load_checkpoint(path)
    summary = content["summary"]
    if "student" not in summary:
        raise CheckpointError(f"{path}: its summary does not say how the student is built.")
    network, settings = build_encoder(summary), dict(summary["student"])
    student: StudentBranch | OfficialStudent
    if settings.pop("official", False):
        student = OfficialStudent(network, **settings)  # type: ignore[arg-type]
    else:
        student = StudentBranch(token_encoder(network), **settings)
    student.load_state_dict(content["student"])
    return Run(folder, content["iteration"], summary, student.eval())
