"""A finished (or running) pre-training on disk: its newest checkpoint as networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from torch import nn

from custom.data.store.volume_store import VolumeStore
from custom.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from custom.engine.method import Student
from custom.methods.registry import build_student, method_module
from custom.methods.split import digest_of_names
from custom.transfer.encoder_weights import build_encoder


class Run(NamedTuple):
    """What a run has learnt so far."""

    folder: Path
    iteration: int
    summary: dict[str, Any]
    student: Student  # in evaluation mode, on the CPU; its ``encoder`` is the one to export


def describe(
    network: nn.Module,
    store: VolumeStore,
    split: tuple[list[str], list[str]],
    crop_size: list[int],
    window_hu: list[float],
    masking: Any,
) -> dict[str, Any]:
    """What a run's summary says of the network and the data, for the export and for those who look at the run.

    Args:
        network: the encoder's; its ``settings`` build it again.
        store: of the scans.
        split: names to train on, names held back.
        crop_size: voxels along x, y, z.
        window_hu: stored values that become 0 and 1.
        masking: draws the masks; has ``settings``.
    """
    return {
        "network": network.settings,
        "network_type": type(network).__name__,
        "crop_size": crop_size,
        "spacing": list(store.spacing),
        "window_hu": window_hu,
        "profile": store.profile,
        "orientation": "RAS",
        "masking": masking.settings,
        "scans": len(split[0]),
        "trained_on": digest_of_names(split[0]),
        "held_back": split[1],
        "store_dir": str(store.path),
        "monai_version": monai.__version__,
        "torch_version": str(torch.__version__),
    }


def load_run(folder: str | Path, which: str | None = None) -> Run:
    """Rebuild the student of a run from its newest checkpoint.

    Where the method exports its teacher, the student holds the teacher's encoder.

    Args:
        folder: the run's ``output_dir``, or one checkpoint in it.
        which: whose encoder it holds, ``student`` or ``teacher``; None takes the one that the method exports.

    Raises:
        CheckpointError: if there is no checkpoint, or no such encoder in it.
    """
    if which not in (None, "student", "teacher"):
        raise CheckpointError(f"which must be student or teacher, got {which!r}.")
    folder = Path(folder)
    path = folder if folder.is_file() else latest_checkpoint(folder / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{folder}: no checkpoint of a run here (looked into {folder / 'checkpoints'})."
        )
    content = load_checkpoint(path)
    summary = content["summary"]
    method_module(summary["method"])  # before the network is built: a method may have none of ours
    if "student" not in summary:
        raise CheckpointError(f"{path}: its summary does not say how the student is built.")
    student = build_student(summary["method"], build_encoder(summary), summary["student"])
    weights = content["student"]
    summary = summary | {"exported": which or summary["exported"]}
    if summary["exported"] == "teacher":
        taught = {k: v for k, v in content.get("teacher", {}).items() if k.startswith("encoder.")}
        if not taught:
            raise CheckpointError(f"{path}: method {summary['method']!r} has no teacher; take the student.")
        weights = weights | taught
    student.load_state_dict(weights)
    return Run(folder, content["iteration"], summary, student.eval())
