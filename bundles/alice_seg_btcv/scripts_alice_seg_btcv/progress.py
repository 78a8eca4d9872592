"""How far a run is, and how long it still takes."""

from __future__ import annotations

import os
import time
from typing import Any

_EVERY_S = 10.0  # between two lines


class Progress:
    """Handler that prints epochs (of a training) or cases (of an evaluator) done, of how many, and the time left.

    Args:
        unit: ``epoch``, or ``case`` where a batch is one.
    """

    def __init__(self, unit: str) -> None:
        self.unit, self.first, self.started, self.told = unit, 0, 0.0, 0.0

    def attach(self, engine: Any) -> None:
        """Called by MONAI's engines."""
        from ignite.engine import Events  # programs that read the preprocessing alone do without ignite

        if os.environ.get("RANK", "0") == "0":
            engine.add_event_handler(Events.STARTED, self._start)
            after = Events.EPOCH_COMPLETED if self.unit == "epoch" else Events.ITERATION_COMPLETED
            engine.add_event_handler(after, self._step)

    def _start(self, engine: Any) -> None:
        self.first, self.started, self.told = self._done(engine), time.monotonic(), 0.0

    def _done(self, engine: Any) -> int:
        return int(engine.state.epoch if self.unit == "epoch" else engine.state.iteration)

    def _step(self, engine: Any) -> None:
        done, now = self._done(engine), time.monotonic()
        total = int(engine.state.max_epochs if self.unit == "epoch" else engine.state.epoch_length)
        if done >= total or now - self.told >= _EVERY_S:
            each = (now - self.started) / max(done - self.first, 1)
            left = f", {_span(each * (total - done))} left" if done < total else ""
            print(f"alice_seg: {self.unit} {done} of {total}, {each:.3g} s each{left}", flush=True)
            self.told = now


def _span(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
