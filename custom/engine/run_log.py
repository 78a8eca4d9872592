"""What a run leaves to look at: a progress bar, TensorBoard, and one line of JSON per logged step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from custom.errors import AliceError
from custom.processes import any_process, rank, world_size

logger = logging.getLogger(__name__)

BINS = 20  # of a histogram of similarities, from -1 to 1


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard events into a folder, by the first process.

    A resumed run drops the lines past its checkpoint, so that the file always tells one story.

    Args:
        folder: of the run.
        every: steps between lines; the last step has one, too.
    """

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        self.folder, self.every = Path(folder), max(every, 1)
        self.path = self.folder / "log.jsonl"
        self._writer: SummaryWriter | None = None
        self._clock, self._seen = 0.0, 0

    def attach(self, engine: Any) -> None:
        """Hook into a trainer; attach it last, after what measures."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._line)
            engine.add_event_handler(Events.COMPLETED, self._stop)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            raise AliceError(
                f"{self.folder}: the log cannot be written ({failure.strerror or failure}). Make room on the disk; "
                "the run goes on from its newest checkpoint."
            ) from failure

    def _start(self, engine: Any) -> None:
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(self.folder) if line["step"] <= engine.state.iteration]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            folder = self.folder / "tensorboard"
            self._writer = SummaryWriter(str(folder), purge_step=engine.state.iteration + 1)
        self._clock, self._seen = time.monotonic(), engine.state.iteration
        baseline = _take_news(engine)
        if baseline and engine.state.iteration == 0:
            with self._disk():
                self._write(0, baseline)  # the untrained network

    def _line(self, engine: Any) -> None:
        step, now = engine.state.iteration, time.monotonic()
        fetched = engine.flush()  # on a GPU this waits for the step, once in `every`
        values = {"loss": fetched["total"], **fetched}
        values["learning_rate"] = engine.optimizer.param_groups[0]["lr"]
        samples = engine.sampler.batch_size * world_size() * (step - self._seen)
        speed = samples / max(now - self._clock, 1e-9)
        speeds = {"samples_per_second": speed, "crops_per_second": speed * engine.crops}
        self._clock, self._seen = now, step
        with self._disk():
            self._write(
                step, values | _take_news(engine), speeds, _take_news(engine, "distributions"), engine.alarms
            )
        engine.alarms = []

    def _write(
        self,
        step: int,
        values: dict[str, float],
        speeds: Mapping[str, float] | None = None,
        distributions: Mapping[str, Sequence[float]] | None = None,
        alarms: Sequence[str] = (),
    ) -> None:
        line: dict[str, Any] = {"step": step} | {
            k: v if math.isfinite(v) else None for k, v in values.items()
        }
        line |= {name: round(speed, 3) for name, speed in (speeds or {}).items()}
        assert self._writer is not None
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
        for name, many in (distributions or {}).items():
            counts, edges = np.histogram(many, BINS, (-1.0, 1.0))
            line[f"{name}_histogram"] = {"counts": counts.tolist(), "from": edges[0], "to": edges[-1]}
            self._writer.add_histogram(name, np.asarray(many), step)
        if alarms:
            line["alarms"] = list(alarms)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _stop(self, engine: Any) -> None:
        if self._writer is not None:
            if self._seen < engine.state.iteration == engine.schedule.steps:
                self._line(engine)  # the last step, with what the last probe found
            with self._disk():
                self._writer.close()


def _take_news(engine: Any, kind: str = "news") -> dict[str, Any]:
    """What meters reported since the last look."""
    news = dict(getattr(engine, kind))
    setattr(engine, kind, {})
    return news


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            break
    return lines


class Progress:
    """One bar over the whole run: loss terms, speed, time left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def attach(self, engine: Any) -> None:
        """Hook into a trainer."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
            engine.add_event_handler(Events.COMPLETED, self._stop)
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Any) -> None:
        self._bar = tqdm(
            total=engine.schedule.steps,
            initial=engine.state.iteration,
            desc="pre-train",
            unit="step",
            mininterval=1.0,
        )

    def _step(self, engine: Any) -> None:
        assert self._bar is not None
        output = engine.state.output[0]
        self._bar.set_postfix({k: f"{output[k]:.3f}" for k in engine.method.terms}, refresh=False)
        self._bar.update()

    def _stop(self, engine: Any) -> None:
        assert self._bar is not None
        self._bar.close()

    def _fail(self, engine: Any, error: BaseException) -> None:
        self._stop(engine)
        raise error


class LeaveOnSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint after the current step and end the run cleanly.

    The signals are listened to until that checkpoint is written, so a repeated SIGTERM does not harm it. A second Ctrl-C
    ends the run at once.

    Args:
        every: with several processes, steps between asking whether one of them was told to leave.
    """

    def __init__(self, every: int = 10) -> None:
        self.every, self.asked = max(every, 1), False
        self._before: dict[int, Any] = {}

    def attach(self, engine: Any) -> None:
        """Hook into a trainer; handlers are put in place when it starts, and taken away when its run ends."""
        engine.add_event_handler(Events.STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._leave_if_asked)
        engine.at_exit.append(self._stop_listening)

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._hear)

    def _stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        self.asked = True
        if number == signal.SIGINT:  # a second Ctrl-C does not wait for the step's end
            signal.signal(number, self._before[number])

    def _leave_if_asked(self, engine: Any) -> None:
        together = world_size() == 1 or engine.state.iteration % self.every == 0
        if together and any_process(self.asked, engine.device):
            logger.warning("Asked to leave: saving at step %d.", engine.state.iteration)
            engine.terminate()  # its end saves
