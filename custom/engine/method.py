"""What a pre-training method is to the engine: its networks, its views and its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder


class Student(nn.Module):
    """A network to train. It contains an encoder; after training only the encoder is kept.

    Attributes:
        encoder: gives tokens of a crop.
        settings: the arguments but the encoder, as plain values, so that a checkpoint can be built again.
    """

    encoder: TokenEncoder
    settings: dict[str, Any]


class Vectors(NamedTuple):
    """One pooled vector per crop of a step, for the meters."""

    student: Tensor  # (n, D)
    teacher: Tensor  # (n, D)
    owners: list[str]  # whose crop each row shows


class Method:
    """One way to pre-train. The engine owns the rest: steps, schedules, EMA, log, meters and checkpoints.

    A subclass sets the attributes and writes four hooks: ``views``, ``target``, ``online`` and ``losses``. Three rules
    keep a run repeatable and fit for many processes: a step calls the student once; random numbers come from
    ``batch["seed"]`` alone; what a later step needs of an earlier one is a buffer of ``loss``.

    Attributes:
        name: of the method, as ``custom.methods.registry`` and every checkpoint call it.
        terms: names of the loss terms in the log's order, without ``total``.
        meters: further numbers that ``losses`` returns; they are logged, and may be NaN where there is nothing to measure.
        student: the network that is trained; a :class:`Student`, where it is an encoder that is pre-trained.
        teacher: it follows the student by EMA and holds modules of the same names. None for a method without one.
        loss: a module whose buffers belong in a checkpoint (centres, memories). It is not trained.
        compiles: whether ``torch.compile`` may run the encoders; not where hooks change what they compute.
        exported: which network's encoder ``alice export`` takes, ``student`` or ``teacher``.
    """

    name: str
    terms: tuple[str, ...] = ()
    meters: tuple[str, ...] = ()
    exported: str = "student"
    compiles: bool = True
    student: nn.Module
    teacher: nn.Module | None = None
    loss: nn.Module

    def views(self, batch: dict[str, Any], device: torch.device) -> Any:
        """What the networks will see, on the device; called without gradient.

        Args:
            batch: of the loader. Tensors whose name begins with ``crop`` lie on the device already.
            device: where the networks are.
        """
        raise NotImplementedError

    def target(self, views: Any) -> Any:
        """What the teacher says of the views; called without gradient."""
        return None

    def online(self, student: nn.Module, views: Any, target: Any) -> Any:
        """What the student says: exactly one call of ``student``, which may be wrapped in DDP."""
        raise NotImplementedError

    def losses(self, output: Any, views: Any, target: Any, step: int) -> dict[str, Tensor]:
        """Scalars in fp32: ``total``, every one of ``terms`` (unweighted), every one of ``meters``."""
        raise NotImplementedError

    def vectors(self, output: Any, target: Any, batch: dict[str, Any]) -> Vectors | None:
        """Pooled vectors for the meters, without gradient; None for a method that pools none."""
        return None

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """What a user should be warned of, one sentence each.

        Args:
            latest: the run's newest numbers: terms, meters, and what handlers reported (``probe/retrieval``).
            untrained: what the probe said before training; empty without a probe.
        """
        return []

    def start_step(self, step: int) -> None:
        """Called before every step, for what changes with it (a batch norm that is frozen late)."""

    def timed(self) -> dict[str, list[nn.Module]]:
        """Modules that ``alice profile`` times, by section."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Settings that make the run what it is, as plain values; a run goes on only with the same ones."""
        return {}

    def to(self, device: torch.device | str) -> Method:
        """Move everything to a device; returns itself, so that a config can chain it."""
        for module in (self.student, self.teacher, self.loss):
            if module is not None:
                module.to(device)
        return self

    def wrapped(self, device: torch.device) -> nn.Module:
        """The student for a run of several processes."""
        return nn.parallel.DistributedDataParallel(self.student, broadcast_buffers=False)
