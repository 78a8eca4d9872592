"""The training engine: one optimizer step of any method, on MONAI's (ignite's) engine."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from custom.engine.checkpoint import (
    CheckpointError,
    checkpoint_path,
    iteration_of,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from custom.engine.ema import EMA
from custom.engine.method import Method, Vectors
from custom.engine.schedules import cosine_ramp, warmup_cosine
from custom.errors import AliceError
from custom.processes import (
    first_process_says,
    locked,
    mean_over_processes,
    names_of_all,
    rank,
    wait_for_all,
    world_size,
)

logger = logging.getLogger(__name__)

# what of a run's summary may differ when it goes on: everything else would make it another run
MAY_CHANGE = {"iterations", "store_dir", "monai_version", "torch_version", "notice"}


@dataclass(frozen=True)
class Schedule:
    """What changes over the run, each a function of the step.

    Args:
        steps: optimizer steps in all (100,000: Alice, Sec. 4.1).
        learning_rate: after warm-up, for the run's whole batch.
        warmup: steps of linear warm-up (the paper's 100 epochs are 3 % of its steps).
        final_learning_rate: at the end of the cosine.
        momentum: EMA rate at the start; it rises to ``final_momentum`` on a cosine (the authors' code: 0.996 to 1).
        weight_decay, final_weight_decay: the authors' code moves it from 0.04 to 0.4 on a cosine; None keeps it.
        from_zero: let the warm-up begin at a rate of 0, as MONAI's ``WarmupCosineSchedule`` does.

    Raises:
        AliceError: for values out of range.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    final_learning_rate: float = 0.0
    momentum: float = 0.996
    final_momentum: float = 1.0
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    from_zero: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AliceError(f"iterations must be at least 1, got {self.steps}.")
        if not self.learning_rate > 0:
            raise AliceError(f"learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.warmup <= self.steps:
            raise AliceError(
                f"warmup must be between 0 and the run's {self.steps} iterations, got {self.warmup}."
            )

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if self.from_zero and step < self.warmup:
            return self.learning_rate * (step / self.warmup)
        return warmup_cosine(step, self.steps, self.learning_rate, self.warmup, self.final_learning_rate)

    def decay(self, step: int) -> float:
        """The weight decay at a step."""
        end = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        return cosine_ramp(step, self.steps, self.weight_decay, end)

    def ema(self, step: int) -> float:
        """The teacher's momentum at a step."""
        return cosine_ramp(step, self.steps, self.momentum, self.final_momentum)

    def summary(self) -> dict[str, Any]:
        """What may not change when a run goes on; its length, and the warm-up that follows from it, may."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "warmup")}


class NonFiniteLoss(AliceError):
    """A loss term became NaN or infinite; the message names the term and the scans."""


class PretrainTrainer(Trainer):
    """Pre-train by any :class:`Method`; one ignite iteration is one optimizer step.

    Everything random in it is a function of the seed, the sample and the step, so a run that is resumed goes on
    exactly as it would have. In a run of several processes the student is wrapped in DDP here.

    Args:
        device: where to train.
        method: networks, views and losses.
        optimizer: over the student's parameters. A parameter group with ``decays=False`` gets no weight decay.
        loader: of ``sample_loader``. Its dataset may have ``crops`` (crops a sample, 1 without it), ``summary()``, and
            ``count(batch)`` with ``rates(counts)`` for what it wants logged about its draws.
        schedule: rates over the run; its ``steps`` is the run's length.
        run_dir: checkpoints go to ``run_dir/checkpoints``.
        steps_per_epoch: how many steps ignite calls an epoch (a run has no natural ones).
        accumulate: a batch is worked on in this many parts, one optimizer step for all.
        clip: largest global gradient norm, None for no clipping (ours: 3.0).
        clip_each: clip every tensor by itself, as Alice's authors' code does.
        amp: autocast to bfloat16.
        compile_encoders: run both encoders through ``torch.compile``; see docs/performance.md before you do.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: how many stay.
        resume: go on from the newest checkpoint in ``run_dir``.
        seed: for dropout and stochastic depth.
        summary: plain values that say what is trained, besides what method, dataset and schedule tell themselves. Kept
            in every checkpoint for the export.
        train_handlers: ignite or MONAI handlers.
        max_epochs: what MONAI's tools ask a trainer for; follows from the schedule.
    """

    def __init__(
        self,
        device: torch.device | str,
        method: Method,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        schedule: Schedule,
        run_dir: str | Path,
        steps_per_epoch: int = 1000,
        accumulate: int = 1,
        clip: float | None = 3.0,
        clip_each: bool = False,
        amp: bool = False,
        compile_encoders: bool = False,
        checkpoint_every: int = 1000,
        keep_checkpoints: int = 2,
        resume: bool = True,
        seed: int = 0,
        summary: dict[str, Any] | None = None,
        train_handlers: Iterable[Any] | None = None,
        max_epochs: int | None = None,
    ) -> None:
        sampler: Any = loader.batch_sampler
        if accumulate < 1 or sampler.batch_size % accumulate:
            raise AliceError(
                f"accumulate = {accumulate} must divide the batch of {sampler.batch_size} samples."
            )
        self.device = torch.device(device)
        self.sampler, self.draws = sampler, loader.dataset
        self.method, self.optimizer, self.schedule = method, optimizer, schedule
        self.online, self.teacher, self.loss = method.student, method.teacher, method.loss
        self.student = method.wrapped(self.device) if world_size() > 1 else method.student
        self.ema = None if self.teacher is None else EMA(self.teacher, self.online)
        self.accumulate, self.clip, self.clip_each, self.bf16, self.seed = (
            accumulate,
            clip,
            clip_each,
            amp,
            seed,
        )
        self.run_dir, self.checkpoint_every, self.keep_checkpoints = (
            Path(run_dir),
            checkpoint_every,
            keep_checkpoints,
        )
        self.resume = resume
        self.summary = self._summary(summary or {})
        self.counts: dict[str, float] = {}  # what the dataset counted over the run
        self.scores: deque[float] = deque(maxlen=1024)  # of the latest samples, where they have one
        self.section: Callable[[str], Any] = _untimed  # replaced by a profile, see custom.engine.profile
        self.news: dict[str, float] = {}
        self.distributions: dict[str, list[float]] = {}  # what meters reported since the log last looked
        self.alarms: list[str] = []  # what monitors warned of since then
        self.pooled: list[Vectors] = []  # of this step's parts
        self.untrained: dict[str, float] = {}  # what the probe said before training
        self.kept: dict[str, Any] = {}  # handlers with a state_dict, kept in checkpoints by name
        self.at_exit: list[Callable[[], None]] = []  # called when run() ends, whatever the way
        self._terms = ("total", *method.terms, *method.meters)
        self._pending: tuple[int, Tensor, Any, list[str]] | None = None
        self._values: dict[str, float] = dict.fromkeys((*self._terms, "grad_norm"), math.nan)
        self.saved_at = -1
        if compile_encoders and not method.compiles:
            raise AliceError(
                f"{method.name} puts its mask into the encoder as it runs: set compile_encoders to false."
            )
        if compile_encoders:  # in place: names in state dicts stay
            for network in (self.online, self.teacher):
                if network is not None:
                    network.get_submodule("encoder").compile()
        steps_per_epoch = min(steps_per_epoch, schedule.steps)
        super().__init__(
            device=self.device,
            max_epochs=max_epochs or math.ceil(schedule.steps / steps_per_epoch),
            data_loader=loader,
            epoch_length=steps_per_epoch,
            handlers=list(train_handlers or []),
            decollate=False,
        )
        self.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        self.add_event_handler(Events.COMPLETED, self._at_end)

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the newest checkpoint (if ``resume``) to the last step, and save.

        Raises:
            NonFiniteLoss: naming the term and the scans; the last good checkpoint stays.
            CheckpointError: if a checkpoint does not fit this run, if output_dir cannot be written, or if another process
                trains in it.
        """
        lock = self.run_dir / "training.lock"
        free = locked(lock, "a training", error=CheckpointError, instead="another output_dir")
        with free if rank() == 0 else nullcontext():
            self._run()

    def _run(self) -> None:
        found = latest_checkpoint(self.folder)
        iteration = first_process_says(-1 if found is None else iteration_of(found), self.device)
        if iteration >= 0 and not self.resume:
            raise CheckpointError(
                f"{self.folder}: holds checkpoints, but resume is false. Choose another output_dir."
            )
        if iteration >= 0:  # a process that cannot see the first one's file says so
            self.load(checkpoint_path(self.folder, iteration))
        if self.state.iteration >= self.schedule.steps:
            logger.info("%s has all its %d iterations.", self.run_dir, self.schedule.steps)
            return
        self.student.train()
        if self.teacher is not None:
            self.teacher.eval()  # a teacher answers without dropout or stochastic depth
        self.loss.train()
        try:
            super().run()
        finally:
            for leave in self.at_exit:
                leave()

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.run_dir / "checkpoints"

    @property
    def crops(self) -> int:
        """Crops a sample."""
        return getattr(self.draws, "crops", 1)

    def _iteration(self, engine: Any, batch: dict[str, Any]) -> list[dict[str, float]]:
        step = self.state.iteration - 1  # ignite counts from 1
        torch.manual_seed(_mix(self.seed, step, rank()))
        self.method.start_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
            group["weight_decay"] = self.schedule.decay(step) if group.get("decays", True) else 0.0
        self.optimizer.zero_grad(set_to_none=True)

        sums: Tensor | None = None
        self.pooled = []
        for part in range(self.accumulate):
            last = part == self.accumulate - 1
            with nullcontext() if last or not hasattr(self.student, "no_sync") else self.student.no_sync():  # type: ignore[operator]
                vectors, terms = self.forward(self.part(batch, part), step)
                if vectors is not None:
                    self.pooled.append(vectors)
                with self.section("backward"):
                    (terms["total"] / self.accumulate).backward()
            values = torch.stack([terms[name].detach() for name in self._terms]) / self.accumulate
            sums = values if sums is None else sums + values
        assert sums is not None

        with self.section("optimizer"):
            norm = self._clip_gradients()
        self.flush()
        values = torch.cat([mean_over_processes(sums), norm.detach().view(1)])
        self._pending = step, *_to_host(values), _scans_of(batch)
        if self.device.type == "cpu":
            self.flush()  # nothing to wait for: stop before a bad step is taken
        with self.section("optimizer"):
            self.optimizer.step()
        if self.ema is not None:
            with self.section("ema"):
                self.ema.update(self.schedule.ema(step))
        self._count(batch)
        return [{"loss": self._values["total"], **self._values}]  # a list, as MONAI's own trainers leave it

    def forward(
        self, batch: dict[str, Any], step: int, student: nn.Module | None = None
    ) -> tuple[Vectors | None, dict[str, Tensor]]:
        """One forward pass of the method: pooled vectors for the meters, and the loss terms.

        A meter passes the bare student, so that DDP does not wait for a backward pass that never comes.
        """
        method = self.method
        with self.section("transfer"):
            # each crop is moved by itself: joined on the host, they would no longer be in pinned memory
            crops = {
                k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k.startswith("crop")
            }
        with torch.no_grad(), self.section("views"):
            views = method.views(batch | crops, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            with torch.no_grad(), self.section("target"):
                target = method.target(views)
            output = method.online(student or self.student, views, target)
        with self.section("losses"):
            terms = method.losses(output, views, target, step)
        return method.vectors(output, target, batch), terms

    def report(self, values: dict[str, float]) -> None:
        """Take a meter's numbers into ``state.metrics`` and the next line of the log."""
        self.state.metrics.update(values)
        self.news.update(values)

    def report_distribution(self, name: str, values: Sequence[float]) -> None:
        """Take many numbers of one kind into the next line of the log: as a histogram."""
        self.distributions[name] = list(values)

    def part(self, batch: dict[str, Any], part: int) -> dict[str, Any]:
        """One of ``accumulate`` equal parts of a batch, with its own plan."""
        size = self.sampler.batch_size // self.accumulate
        rows = slice(part * size, (part + 1) * size)
        split = {k: _rows(v, rows) for k, v in batch.items() if k != "plans"}
        return split | ({"plans": [batch["plans"][part]]} if "plans" in batch else {})

    def _count(self, batch: dict[str, Any]) -> None:
        if hasattr(self.draws, "count"):
            for name, number in self.draws.count(batch).items():
                self.counts[name] = self.counts.get(name, 0) + number
        if "score" in batch:
            self.scores.extend(batch["score"].tolist())

    def _clip_gradients(self) -> Tensor:
        parameters = [p for p in self.online.parameters() if p.grad is not None]
        if self.clip is None:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_each:
            return torch.stack([nn.utils.clip_grad_norm_([p], self.clip) for p in parameters]).norm()
        return nn.utils.clip_grad_norm_(parameters, self.clip)

    def flush(self) -> dict[str, float]:
        """Fetch the last step's values and check that they are finite. On a GPU the loop does this one step later, so it does not wait.

        Raises:
            NonFiniteLoss: naming the terms and the scans.
        """
        if self._pending is None:
            return dict(self._values)
        step, values, copied, scans = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        self._values = dict(zip((*self._terms, "grad_norm"), values.tolist(), strict=True))
        bad = [n for n, v in self._values.items() if not math.isfinite(v) and n not in self.method.meters]
        if bad:
            scans_of_all = names_of_all(scans)
            raise NonFiniteLoss(
                f"Step {step + 1}: {', '.join(bad)} not finite{', on ' if scans_of_all else ''}{', '.join(scans_of_all)}. "
                "The last good checkpoint is "
                f"{latest_checkpoint(self.folder) or 'none yet'}. Look at these scans; lower learning_rate; or set amp to false."
            )
        return dict(self._values)

    # -- saving and resuming ---------------------------------------------------------------------------------

    def _after_step(self) -> None:
        done = self.state.iteration
        if done >= self.schedule.steps:
            self.should_terminate = True  # as terminate(), which would log that a signal came
        elif self.checkpoint_every and done % self.checkpoint_every == 0:
            self.save()

    def _at_end(self) -> None:
        self.flush()
        if self.saved_at != self.state.iteration:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, by the first process."""
        self.flush()  # a broken step must not become a checkpoint
        self.saved_at = self.state.iteration
        if rank() == 0:
            content = {
                **{name: module.state_dict() for name, module in self._modules().items()},
                "optimizer": self.optimizer.state_dict(),
                "counts": dict(self.counts),
                "scores": list(self.scores),
                "untrained": dict(self.untrained),
                "kept": {name: handler.state_dict() for name, handler in self.kept.items()},
                "world_size": world_size(),
                "batch_size": self.sampler.batch_size,
                "summary": self.summary,
            }
            path = save_checkpoint(self.folder, self.state.iteration, content, self.keep_checkpoints)
            logger.info("Saved %s", path)
        wait_for_all()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: weights, EMA, optimizer, loss, and the place in the sequence of samples.

        Raises:
            CheckpointError: if it was made with other networks or settings, or another number of samples a step.
        """
        content = load_checkpoint(path, self.device)
        then, now = content["world_size"] * content["batch_size"], world_size() * self.sampler.batch_size
        if then != now:
            raise CheckpointError(
                f"{path}: was trained with {then} samples a step, now {now}. Set batch_size so that "
                "batch_size x processes is the same, or choose another output_dir."
            )
        self._refuse_changes(path, content["summary"])
        try:
            for name, module in self._modules().items():
                module.load_state_dict(content[name])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: was made with other settings ({str(error).splitlines()[0]}). Choose another output_dir."
            ) from error
        self.counts = dict(content["counts"])
        self.scores.extend(content["scores"])
        self.untrained = dict(content["untrained"])
        for name, handler in self.kept.items():
            if name in content["kept"]:
                handler.load_state_dict(content["kept"][name])
        self.saved_at = content["iteration"]
        self.load_state_dict(
            {
                "iteration": content["iteration"],
                "epoch_length": self.state.epoch_length,
                "max_epochs": self.state.max_epochs,
            }
        )
        self.sampler.start = content["iteration"]
        logger.info("Resumed from %s at iteration %d.", path, content["iteration"])

    def _modules(self) -> dict[str, nn.Module]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {"student": self.online, **teacher, "loss": self.loss}

    def _summary(self, given: dict[str, Any]) -> dict[str, Any]:
        """Everything that says what is trained, as plain values."""
        own: dict[str, Any] = {
            "method": self.method.name,
            "terms": list(self.method.terms),
            "exported": self.method.exported,
        }
        own |= self.method.summary()
        if hasattr(self.draws, "summary"):
            own["draws"] = self.draws.summary()
        own["schedule"] = self.schedule.summary()
        own |= {"iterations": self.schedule.steps, "clip": self.clip, "clip_each": self.clip_each}
        own |= {"samples_per_step": self.sampler.batch_size * world_size(), "seed": self.seed}
        return json.loads(json.dumps(own | given, default=str))

    def _refuse_changes(self, path: Path, summary: dict[str, Any]) -> None:
        then, now = _flat(summary), _flat(self.summary)
        changed = [k for k in sorted({*then, *now}) if k not in MAY_CHANGE and then.get(k) != now.get(k)]
        if changed:
            listed = "; ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in changed)
            raise CheckpointError(
                f"{path}: {listed}. Set it back, or choose another output_dir for the new run."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their path, as an override would name them: ``draws::max_offset``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}::") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _rows(value: Any, rows: slice) -> Any:
    return {k: _rows(v, rows) for k, v in value.items()} if isinstance(value, dict) else value[rows]


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Start copying values to the host: the copy, and the event that says it is there (None where it already is)."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _untimed(name: str) -> Any:
    return nullcontext()


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    return seed


def _scans_of(batch: dict[str, Any]) -> list[str]:
    return sorted({name for key in batch if key.startswith("scan") for name in batch[key]})
