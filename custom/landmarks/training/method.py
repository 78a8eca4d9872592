"""SAM's training as a method of the engine: matched cells of two views are told from all others (Yan et al., TMI 2022)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from custom.engine.method import Method
from custom.errors import AliceError
from custom.landmarks.sam.network import SAM, SAMMaps
from custom.landmarks.sam.weights import load_sam_weights, save_sam
from custom.landmarks.training.loss import SAMLoss
from custom.processes import rank

logger = logging.getLogger(__name__)


class SamTraining(Method):
    """Train SAM on pairs of views of one scan, or of two subjects that share a space.

    Args:
        student: SAM, or a copy of it with batch norm over all processes.
        loss: its terms.
        freeze_norm_from: step from which batch norm uses, and keeps, its running statistics (ours): the
            last part of training sees the network as it will be used. None for never.
    """

    name = "sam"
    terms = ("fine", "coarse", "joint")
    meters = ("error_mm",)

    def __init__(self, student: SAM, loss: SAMLoss, freeze_norm_from: int | None = None) -> None:
        self.student, self.loss, self.freeze_norm_from = student, loss, freeze_norm_from

    def start_step(self, step: int) -> None:
        """Batch norm learns its statistics before ``freeze_norm_from``, and keeps them from there on."""
        self.student.train()
        if self.freeze_norm_from is not None and step >= self.freeze_norm_from:
            for module in self.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def views(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The batch on the device, with both views of every pair side by side in ``crop``, (2B, 1, Z, Y, X)."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        crop = moved["crop"].flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)
        return moved | {"crop": crop}

    def online(self, student: nn.Module, views: dict[str, Any], target: None) -> SAMMaps:
        """Both maps; the loss normalises the cells it compares."""
        return student(views["crop"], unit_fine=False)

    def losses(self, output: SAMMaps, views: dict[str, Any], target: None, step: int) -> dict[str, Tensor]:
        """``fine``, ``coarse``, ``joint`` and their weighted sum; how far the best matches lie off, mm."""
        return self.loss(output, views)

    def timed(self) -> dict[str, list[nn.Module]]:
        """The network."""
        return {"online": [self.student]}

    def summary(self) -> dict[str, Any]:
        """Settings of network and loss."""
        return {"student": self.student.settings, "loss": self.loss.settings}

    def to(self, device: torch.device | str) -> SamTraining:
        """Move network and loss; the network's weights are laid out channels last."""
        self.student.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.loss.to(device)
        return self

    def wrapped(self, device: torch.device) -> nn.Module:
        """Wrap the network in DDP. Buffers are broadcast, because on CPUs every process has batch-norm statistics of its own."""
        places = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.student, device_ids=places)


class SaveWeights:
    """Save the network when the run ends (first process only). ``load_sam_weights`` reads the file.

    A run that was asked to leave before writes none: they would pass for finished.

    Args:
        path: ``.safetensors``.
        summary: plain values that say what was trained, kept with the weights.
    """

    def __init__(self, path: str | Path, summary: Mapping[str, Any]) -> None:
        self.path, self.summary = Path(path), dict(summary)

    def attach(self, engine: Any) -> None:
        """Hook into a trainer."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: Any) -> None:
        done, steps = engine.state.iteration, engine.schedule.steps
        if done < steps:
            logger.warning("Left at step %d of %d; the same command goes on.", done, steps)
        elif rank() == 0:
            save_sam(self.path, engine.online, {**self.summary, "steps": done})
            logger.info("Saved %s", self.path)


def start_from(network: SAM, path: str | Path | None, *, needed: bool = False) -> SAM:
    """The network with the weights of a file of ours, or as it is if ``path`` is None.

    Raises:
        AliceError: if the file cannot be used or holds another network, or is ``needed`` (for a run that keeps batch
            norm's statistics from its first step on) and not given.
    """
    if path is None:
        if needed:
            raise AliceError(
                "freeze_norm 0 keeps batch norm's statistics throughout, and an untrained network has none: give "
                "init_weights, a model.safetensors of an earlier run."
            )
        return network
    found = load_sam_weights(path)
    if found.settings != network.settings:
        raise AliceError(f"{path}: holds SAM with {found.settings}; the config asks for {network.settings}.")
    network.load_state_dict(found.state_dict())
    return network
