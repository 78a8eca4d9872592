"""The training engine of SAM: one optimizer step on a batch of view pairs, on MONAI's (ignite's) engine."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from custom.errors import AliceError
from custom.landmarks.sam.network import SAM
from custom.landmarks.sam.weights import load_sam_weights, save_sam
from custom.landmarks.training.loss import SAMLoss
from custom.processes import mean_over_processes, rank

logger = logging.getLogger(__name__)


class NonFiniteLoss(AliceError):
    """A loss term became NaN or infinite; the message gives all of them."""


class SAMTrainer(Trainer):
    """Train SAM on pairs of views (spec 2.3); one ignite iteration is one optimizer step.

    Args:
        device: where to train.
        network: SAM; DDP-wrapped or not.
        loss: its terms.
        optimizer: over the network's parameters.
        loader: of ``ViewPairs``, with a ``batch_sampler`` that has a ``start`` (``pair_loader``).
        steps: of the whole run.
        lr_scheduler: stepped after every step; None keeps the rate.
        steps_per_epoch: how many steps ignite calls an epoch.
        amp: autocast to bfloat16; both maps are normalised, and compared, in float32.
        clip: largest global gradient norm, None for no clipping (ours).
        freeze_norm_from: step from which batch norm uses, and keeps, its running statistics (ours): the
            last part of training sees the network as it will be used. None for never.
        train_handlers: ignite or MONAI handlers.

    Raises:
        ValueError: for a run without steps.

    Attributes:
        steps: of the whole run.
    """

    def __init__(
        self,
        device: torch.device | str,
        network: nn.Module,
        loss: SAMLoss,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        steps: int,
        lr_scheduler: Any = None,
        steps_per_epoch: int = 1000,
        amp: bool = False,
        clip: float | None = 5.0,
        freeze_norm_from: int | None = None,
        train_handlers: Iterable[Any] | None = None,
    ) -> None:
        if steps < 1:
            raise AliceError(f"iterations must be at least 1, got {steps}.")
        steps_per_epoch = min(steps_per_epoch, steps)
        super().__init__(
            device=torch.device(device),
            max_epochs=math.ceil(steps / steps_per_epoch),
            data_loader=loader,
            epoch_length=steps_per_epoch,
            handlers=list(train_handlers or []),
            decollate=False,
        )
        self.network, self.loss, self.optimizer, self.lr_scheduler = network, loss, optimizer, lr_scheduler
        self.steps, self.bf16, self.clip, self.freeze_norm_from = steps, amp, clip, freeze_norm_from
        self.device = torch.device(device)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._stop_at_last)

    def run(self) -> None:
        """Train to the last step, from the step that a loaded state says.

        Raises:
            NonFiniteLoss: giving the terms; the last checkpoint stays.
        """
        if self.state.iteration >= self.steps:
            logger.info("All of the run's %d iterations are done.", self.steps)
            return
        self.data_loader.batch_sampler.start = self.state.iteration
        super().run()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved step; the lengths of run and epoch are this run's own."""
        lengths = {"epoch_length": self.state.epoch_length, "max_epochs": self.state.max_epochs}
        super().load_state_dict({"iteration": state_dict["iteration"], **lengths})

    def _iteration(self, engine: Any, batch: dict[str, Any]) -> dict[str, float]:
        step = self.state.iteration - 1  # ignite counts from 1
        self._set_mode(step)
        batch = {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        crop = (
            batch["crop"].flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)
        )  # (2B, 1, Z, Y, X)

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            maps = self.network(crop, unit_fine=False)  # the loss normalises the cells it compares
        terms = self.loss(maps, batch)
        terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip or math.inf)

        names = list(terms)
        values = mean_over_processes(torch.stack([terms[name].detach() for name in names])).tolist()
        if not all(math.isfinite(v) for v in (*values, float(norm))):
            raise NonFiniteLoss(
                f"Step {step + 1}: {dict(zip(names, values, strict=True))}, gradient norm {float(norm):g}, is not finite. "
                "The last checkpoint is good; lower learning_rate, or set amp to false."
            )
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return {"loss": values[0], **dict(zip(names, values, strict=True)), "grad_norm": float(norm)}

    def _set_mode(self, step: int) -> None:
        self.network.train()
        if self.freeze_norm_from is not None and step >= self.freeze_norm_from:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _stop_at_last(self) -> None:
        if self.state.iteration >= self.steps:
            self.terminate()


class RunSettings:
    """What may not change when a run goes on: kept in its checkpoints, compared before anything else is loaded.

    Args:
        settings: plain values by name.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        """Kept as text, for lists may come back as tuples."""
        return {name: json.dumps(value) for name, value in self.settings.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError naming what differs."""
        own = self.state_dict()
        differ = [
            f"{name} was {state_dict.get(name, 'not there')}, now {own.get(name, 'is not there')}"
            for name in sorted({*own, *state_dict})
            if own.get(name) != state_dict.get(name)
        ]
        if differ:
            raise AliceError(
                f"output_dir holds a run with other settings: {'; '.join(differ)}. Choose another output_dir, and "
                "init_weights to start from that run's model.safetensors."
            )


class SaveWeights:
    """When the run is at its last step, by the first process: the network as ``load_sam_weights`` reads it.

    A run that was asked to leave before writes none: they would pass for finished.

    Args:
        path: ``.safetensors``.
        summary: plain values that say what was trained, kept with the weights.
    """

    def __init__(self, path: str | Path, summary: Mapping[str, Any]) -> None:
        self.path, self.summary = Path(path), dict(summary)

    def attach(self, engine: SAMTrainer) -> None:
        """Hook into a trainer."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: SAMTrainer) -> None:
        if engine.state.iteration < engine.steps:
            logger.warning(
                "Left at step %d of %d; the same command goes on.", engine.state.iteration, engine.steps
            )
        elif rank() == 0:
            save_sam(self.path, engine.network, {**self.summary, "steps": engine.state.iteration})
            logger.info("Saved %s", self.path)


def newest_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of a run with most iterations, as MONAI's ``CheckpointSaver`` names them; None without one."""
    found = [
        (int(m.group(1)), str(p))
        for p in Path(folder).glob("*.pt")
        if (m := re.search(r"iteration=(\d+)\.pt$", p.name))
    ]
    return max(found)[1] if found else None


def start_from(network: SAM, path: str | Path | None, *, needed: bool = False) -> SAM:
    """The network with the weights of a file of ours, or as it is if ``path`` is None.

    Raises:
        ValueError: if the file cannot be used or holds another network, or is ``needed`` (for a run that keeps batch
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
