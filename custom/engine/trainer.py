"""The training engine: one optimizer step of student, teacher and losses, on MONAI's (ignite's) engine."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from custom.engine.schedules import cosine_ramp, linear_ramp, warmup_cosine
from custom.errors import AliceError
from custom.methods.alice.branch import StudentBranch, StudentOutput, TeacherBranch
from custom.methods.alice.losses import AliceLoss
from custom.processes import (
    first_process_says,
    mean_over_processes,
    names_of_all,
    rank,
    wait_for_all,
    world_size,
)

logger = logging.getLogger(__name__)

TERMS = ("total", "l_r", "l_dv", "l_st")
# what of a run's summary may differ when it goes on: everything else would make it another run
MAY_CHANGE = {"iterations", "store_dir", "monai_version", "torch_version"}


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
        similarity_start, similarity_ramp: l_dv and l_st are off before the first and full after start + ramp (ours).
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    final_learning_rate: float = 0.0
    momentum: float = 0.996
    final_momentum: float = 1.0
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    similarity_start: int = 0
    similarity_ramp: int = 0

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
        return warmup_cosine(step, self.steps, self.learning_rate, self.warmup, self.final_learning_rate)

    def decay(self, step: int) -> float:
        """The weight decay at a step."""
        end = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        return cosine_ramp(step, self.steps, self.weight_decay, end)

    def ema(self, step: int) -> float:
        """The teacher's momentum at a step."""
        return cosine_ramp(step, self.steps, self.momentum, self.final_momentum)

    def similarity(self, step: int) -> float:
        """The factor on l_dv and l_st at a step."""
        return linear_ramp(step, self.similarity_start, self.similarity_ramp)


class NonFiniteLoss(AliceError):
    """A loss term became NaN or infinite; the message names the term and the scans."""


class AliceTrainer(Trainer):
    """Pre-train a student and its EMA teacher on pairs of crops (Alice, Sec. 3).

    One ignite iteration is one optimizer step. Everything random in it is a function of the seed, the pair and
    the step, so a run that is resumed goes on exactly as it would have.

    Args:
        device: where to train.
        student: the online branch; DDP-wrapped or not.
        teacher: as ``student.make_teacher()`` gives it.
        loss: the terms and their weights.
        optimizer: over ``decay_groups`` of the student.
        loader: of batches with ``crop_q``, ``crop_k``, ``hidden_q``, ``hidden_k`` and bookkeeping, see ``pair_loader``
            and ``MaskedBatch``.
        schedule: rates over the run; its ``steps`` is the run's length.
        view: ``(crop, seeds) -> crop``, the teacher's augmented view; None gives it the crop itself.
        run_dir: checkpoints go to ``run_dir/checkpoints``.
        steps_per_epoch: how many steps ignite calls an epoch (a run has no natural ones).
        accumulate: a batch is worked on in this many parts, one optimizer step for all.
        clip: largest global gradient norm, None for no clipping (ours: 3.0).
        clip_each: clip every tensor by itself, as the authors' code does.
        amp: autocast to bfloat16 (on GPUs).
        compile_encoders: run both encoders through ``torch.compile``; see docs/performance.md before you do.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: how many stay.
        resume: go on from the newest checkpoint in ``run_dir``.
        seed: for dropout and stochastic depth.
        summary: plain values that say what is trained, kept in every checkpoint for the export.
        train_handlers: ignite or MONAI handlers.
    """

    def __init__(
        self,
        device: torch.device | str,
        student: nn.Module,
        teacher: TeacherBranch,
        loss: AliceLoss,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        schedule: Schedule,
        run_dir: str | Path,
        view: Callable[[Tensor, Tensor], Tensor] | None = None,
        steps_per_epoch: int = 100,
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
        steps_per_epoch = min(steps_per_epoch, schedule.steps)
        super().__init__(
            device=device,
            max_epochs=max_epochs or math.ceil(schedule.steps / steps_per_epoch),
            data_loader=loader,
            epoch_length=steps_per_epoch,
            handlers=list(train_handlers or []),
            decollate=False,
        )
        sampler: Any = loader.batch_sampler
        self.sampler = sampler
        if accumulate < 1 or sampler.batch_size % accumulate:
            raise AliceError(
                f"accumulate = {accumulate} must divide the batch of {sampler.batch_size} pairs."
            )
        self.student, self.teacher, self.loss, self.optimizer = student, teacher, loss, optimizer
        self.online: StudentBranch = student.module if hasattr(student, "module") else student  # type: ignore[assignment]
        self.ema = EMA(teacher, self.online)
        self.schedule, self.view = schedule, view
        self.accumulate, self.clip, self.clip_each, self.bf16, self.seed = (
            accumulate,
            clip,
            clip_each,
            amp,
            seed,
        )
        self.run_dir, self.summary = Path(run_dir), summary or {}
        self.checkpoint_every, self.keep_checkpoints, self.resume = checkpoint_every, keep_checkpoints, resume
        self.pairs: dict[str, float] = {"seen": 0, "fallback": 0, "redraws": 0, "rejected": 0}
        self.scores: deque[float] = deque(maxlen=1024)  # of the latest pairs
        self.device = torch.device(device)
        if compile_encoders:  # in place: names in state dicts stay
            self.online.encoder.compile()
            teacher.get_submodule("encoder").compile()
        self.section: Callable[[str], Any] = _untimed  # replaced by a profile, see custom.engine.profile
        self.news: dict[str, float] = {}
        self.distributions: dict[str, list[float]] = {}  # what meters reported since the log last looked
        self.pooled: list[
            tuple[Tensor, Tensor, list[str]]
        ] = []  # student's, teacher's, whose; of this step's parts
        self._pending: tuple[int, Tensor, Any, list[str]] | None = None
        self._values: dict[str, float] = dict.fromkeys((*TERMS, "grad_norm"), math.nan)
        self._saved_at = -1
        self.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        self.add_event_handler(Events.COMPLETED, self._at_end)

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the newest checkpoint (if ``resume``) to the last step, and save.

        Raises:
            NonFiniteLoss: naming the term and the scans; the last good checkpoint stays.
            CheckpointError: if a checkpoint does not fit this run, or cannot be written.
        """
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
        self.teacher.eval()  # a teacher answers without dropout or stochastic depth
        self.loss.train()
        super().run()

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.run_dir / "checkpoints"

    def _iteration(self, engine: Any, batch: dict[str, Any]) -> dict[str, float]:
        step = self.state.iteration - 1  # ignite counts from 1
        torch.manual_seed(_mix(self.seed, step, rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
            group["weight_decay"] = self.schedule.decay(step) if group["decays"] else 0.0
        self.optimizer.zero_grad(set_to_none=True)

        sums: Tensor | None = None
        self.pooled = []
        for part in range(self.accumulate):
            last = part == self.accumulate - 1
            with nullcontext() if last or not hasattr(self.student, "no_sync") else self.student.no_sync():  # type: ignore[operator]
                part_batch = self.part(batch, part)
                output, terms = self.losses_of(part_batch, step)
                owners = [*part_batch["patient_q"], *part_batch["patient_k"]]
                self.pooled.append((output.student_pooled.detach(), output.teacher_pooled, owners))
                with self.section("backward"):
                    (terms["total"] / self.accumulate).backward()
            values = torch.stack([terms[name].detach() for name in TERMS]) / self.accumulate
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
        with self.section("ema"):
            self.ema.update(self.schedule.ema(step))
        self.pairs["seen"] += len(batch["score"])
        self.pairs["fallback"] += int(batch["fallback"].sum())
        self.pairs["redraws"] += int(batch["redraws"].sum())
        self.pairs["rejected"] += int(batch["rejected"].sum())
        self.scores.extend(batch["score"].tolist())
        return {"loss": self._values["total"], **self._values}

    def losses_of(
        self, batch: dict[str, Any], step: int, student: nn.Module | None = None
    ) -> tuple[StudentOutput, dict[str, Tensor]]:
        """One forward pass of both branches over Q and K stacked: the student's output, and the loss terms.

        A meter passes the bare student, so that DDP does not wait for a backward pass that never comes.
        """
        with self.section("transfer"):
            # each moved by itself: joined on the host, they would no longer be in pinned memory
            halves = [batch[key].to(self.device, non_blocking=True) for key in ("crop_q", "crop_k")]
            crop = torch.cat(halves)  # (2B, 1, X, Y, Z)
        seeds = torch.cat([batch["seed"], batch["seed"] + 1])
        hidden = torch.cat([batch["hidden_q"], batch["hidden_k"]])  # on the CPU, where it is counted
        plan = batch["plans"][0] if len(batch.get("plans", ())) == 1 else None
        with torch.no_grad(), self.section("views"):
            intact = crop if self.view is None else self.view(crop, seeds)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            with self.section("target"):
                target = self.teacher(intact)
            output = (student or self.student)(crop, hidden, target, self.teacher.casa, plan)
        with self.section("losses"):
            return output, self.loss(output, crop, hidden, step, self.schedule.similarity(step))

    def report(self, values: dict[str, float]) -> None:
        """Take a meter's numbers into ``state.metrics`` and the next line of the log."""
        self.state.metrics.update(values)
        self.news.update(values)

    def report_distribution(self, name: str, values: Sequence[float]) -> None:
        """Take many numbers of one kind into the next line of the log: as a histogram."""
        self.distributions[name] = list(values)

    def part(self, batch: dict[str, Any], part: int) -> dict[str, Any]:
        """One of ``accumulate`` equal parts of a batch, with its own plan."""
        size = len(batch["seed"]) // self.accumulate
        rows = slice(part * size, (part + 1) * size)
        split = {k: v[rows] for k, v in batch.items() if k != "plans"}
        return split | ({"plans": [batch["plans"][part]]} if "plans" in batch else {})

    def _clip_gradients(self) -> Tensor:
        parameters = [p for p in self.online.parameters() if p.grad is not None]
        if self.clip is None:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_each:
            return torch.stack([nn.utils.clip_grad_norm_([p], self.clip) for p in parameters]).norm()
        return nn.utils.clip_grad_norm_(parameters, self.clip)

    def flush(self) -> dict[str, float]:
        """Fetch the last step's values and judge them; in the loop a step late on a GPU, so that it is not waited for.

        Raises:
            NonFiniteLoss: naming the terms and the scans.
        """
        if self._pending is None:
            return dict(self._values)
        step, values, copied, scans = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        self._values = dict(zip((*TERMS, "grad_norm"), values.tolist(), strict=True))
        bad = [name for name, value in self._values.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLoss(
                f"Step {step + 1}: {', '.join(bad)} not finite, on {', '.join(names_of_all(scans))}. "
                "The last good checkpoint is "
                f"{latest_checkpoint(self.folder) or 'none yet'}. Look at these scans; lower learning_rate; or set amp to false."
            )
        return dict(self._values)

    # -- saving and resuming ---------------------------------------------------------------------------------

    def _after_step(self) -> None:
        done = self.state.iteration
        if done >= self.schedule.steps:
            self.terminate()
        elif self.checkpoint_every and done % self.checkpoint_every == 0:
            self.save()

    def _at_end(self) -> None:
        self.flush()
        if self._saved_at != self.state.iteration:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, by the first process."""
        self.flush()  # a broken step must not become a checkpoint
        self._saved_at = self.state.iteration
        if rank() == 0:
            content = {
                "student": self.online.state_dict(),
                "teacher": self.teacher.state_dict(),
                "loss": self.loss.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "pairs": dict(self.pairs),
                "world_size": world_size(),
                "batch_size": self.sampler.batch_size,
                "summary": self.summary,
            }
            path = save_checkpoint(self.folder, self.state.iteration, content, self.keep_checkpoints)
            logger.info("Saved %s", path)
        wait_for_all()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: weights, EMA, optimizer, loss, and the place in the sequence of pairs.

        Raises:
            CheckpointError: if it was made with other networks, or another number of pairs a step.
        """
        content = load_checkpoint(path, self.device)
        pairs_then = content["world_size"] * content["batch_size"]
        pairs_now = world_size() * self.sampler.batch_size
        if pairs_then != pairs_now:
            raise CheckpointError(
                f"{path}: was trained with {pairs_then} pairs a step, now {pairs_now}. Set batch_size so that "
                "batch_size x processes is the same, or choose another output_dir."
            )
        try:
            self.online.load_state_dict(content["student"])
            self.teacher.load_state_dict(content["teacher"])
            self.loss.load_state_dict(content["loss"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: was made with other settings ({str(error).splitlines()[0]}). Choose another output_dir."
            ) from error
        # runs from before profiles were all of CT
        then = ({"profile": "ct"} if "profile" in self.summary else {}) | content["summary"]
        changed = [k for k in sorted({*then, *self.summary} - MAY_CHANGE)
                   if then.get(k) != self.summary.get(k)]  # fmt: skip
        if changed:
            listed = "; ".join(f"{k} was {then.get(k)!r}, now {self.summary.get(k)!r}" for k in changed)
            raise CheckpointError(
                f"{path}: {listed}. Set it back, or choose another output_dir for the new run."
            )
        self.pairs = content["pairs"]
        self._saved_at = content["iteration"]
        self.load_state_dict(
            {
                "iteration": content["iteration"],
                "epoch_length": self.state.epoch_length,
                "max_epochs": self.state.max_epochs,
            }
        )
        self.sampler.start = content["iteration"]
        logger.info("Resumed from %s at iteration %d.", path, content["iteration"])


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
    return sorted({*batch["scan_q"], *batch["scan_k"]})
