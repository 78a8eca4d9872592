"""Where a step's time goes: loader, transfer, views, online, decoder, heads, target, losses, backward, optimizer, EMA."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Events
from torch import nn

from custom.engine.trainer import PretrainTrainer

SECTIONS = (
    "loader", "transfer", "views", "target", "online", "decoder", "heads", "losses", "backward", "optimizer", "ema", "rest",
)  # fmt: skip


class StepProfile:
    """Times the sections of a trainer's steps; attach it as a handler and let the trainer run.

    On a GPU every section waits for the device, so a profiled step is slower than a real one.

    Args:
        skip: first steps that are not counted (warm-up).
    """

    def __init__(self, skip: int = 2) -> None:
        self.skip, self.steps = skip, 0
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: dict[str, float] = defaultdict(float)
        self._device = torch.device("cpu")
        self._mark = 0.0

    def attach(self, engine: PretrainTrainer) -> None:
        """Hook into a trainer."""
        self._device = engine.device
        engine.section = self.section
        for name, modules in engine.method.timed().items():
            for module in modules:
                self._time_module(module, name)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._tick)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._loaded)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the time of a block to a section."""
        started = self._now()
        yield
        self._running[name] += self._now() - started

    def shares(self) -> dict[str, tuple[float, float]]:
        """Section -> (milliseconds a step, share of the step)."""
        whole = sum(self.seconds.values()) or 1.0
        names = (*SECTIONS, *(n for n in self.seconds if n not in SECTIONS))
        return {n: (1e3 * self.seconds[n] / max(self.steps, 1), self.seconds[n] / whole) for n in names}

    def _time_module(self, module: nn.Module, name: str) -> None:
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(self._now()))

        def stop(*_: Any) -> None:
            self._running[name] += self._now() - started.pop()

        module.register_forward_hook(stop)

    def _tick(self) -> None:
        self._mark = self._now()

    def _loaded(self) -> None:
        self._running["loader"] += self._now() - self._mark
        self._mark = self._now()

    def _finish(self, engine: Any) -> None:
        inside = sum(seconds for name, seconds in self._running.items() if name != "loader")
        self._running["rest"] += max(self._now() - self._mark - inside, 0.0)
        if engine.state.iteration > self.skip:
            self.steps += 1
            for name, seconds in self._running.items():
                self.seconds[name] += seconds
        self._running.clear()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
