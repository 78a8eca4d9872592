"""Checkpoints of a training, and going on from them: the same run, or a refusal that names what was changed."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

Settings = Mapping[str, Any]


class StoppedRun:
    """A training that may go on: what its last checkpoint says.

    Args:
        output_dir: of the run.
        resume: whether it shall go on; if not, there is nothing to go on from.
    """

    def __init__(self, output_dir: str, resume: bool) -> None:
        self.output_dir, self.resume = str(output_dir), bool(resume)
        self.path = os.path.join(self.output_dir, "checkpoints", "last.pt")

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.resume and os.path.isfile(self.path)

    @cached_property
    def content(self) -> dict[str, Any]:
        """The checkpoint; empty if it cannot be read, or is none of ours."""
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError, pickle.UnpicklingError):
            return {}
        return content if isinstance(content, dict) and "settings" in content else {}

    @property
    def iteration(self) -> int:
        """Steps that were done."""
        return int(self.content["trainer"]["iteration"])

    def problems(self, settings: Settings, best_file: str) -> list[str]:
        """Say why the run cannot go on: a damaged checkpoint, or settings that were changed.

        Args:
            settings: that a run keeps from its beginning to its end.
            best_file: where the best network is kept.

        Returns:
            At most one sentence.
        """
        if not self.exists:
            return []
        if not self.content:
            return [
                f"resume: {self.path} is damaged, or no checkpoint of this version. Begin anew: resume false, or another "
                "output_dir."
            ]
        kept, now = self.content["settings"], plain(settings)
        changed = [
            _told(name, kept.get(name), now.get(name))
            for name in {**kept, **now}
            if kept.get(name) != now.get(name)
        ]
        if changed:
            return [
                f"resume: {'; '.join(changed)}. The run in {self.output_dir} keeps its settings; give them again, or another "
                "output_dir for a new run."
            ]
        if self.content["best"].get("_saved") and not os.path.isfile(best_file):
            return [
                f"resume: {best_file}, the best network of {self.output_dir}, is gone. Copy it back, or give the run's ckpt_dir."
            ]
        return []

    def stop_if_done(self, epochs: int) -> None:
        """End the program in good order if the run has all its epochs."""
        if self.exists and self.iteration >= epochs * self.content["trainer"]["epoch_length"]:
            print(f"alice_seg: {self.output_dir} has all its {epochs} epochs.")
            sys.exit(0)

    def told_start(self, otherwise: str) -> str:
        """Where training starts, in words; ``otherwise`` if it does not go on."""
        if self.exists:
            length = self.content["trainer"]["epoch_length"]
            return f"goes on from {self.path}, {self.iteration / length:g} epochs done"
        nothing = f"resume: no checkpoint in {os.path.dirname(self.path)}; " if self.resume else ""
        return nothing + otherwise


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON knows them, so that they can be compared with those that were read from a file."""
    return json.loads(json.dumps(dict(settings), default=str))


def _told(name: str, kept: Any, now: Any) -> str:
    if isinstance(kept, list) and isinstance(now, list) and name == "cases":
        gone, new = sorted(set(kept) - set(now)), sorted(set(now) - set(kept))
        parts = [
            f"{word} {', '.join(names[:5])}" for word, names in (("without", gone), ("with", new)) if names
        ]
        return f"the cases are others ({' and '.join(parts)})"
    return f"{name} was {json.dumps(kept)}, now {json.dumps(now)}"


class Saver:
    """Handler that keeps a training in ``last.pt``: after epochs, and when it ends. It is written whole or not at all.

    Args:
        folder: of the checkpoint; made if missing.
        state: ``model``, ``optimizer``, ``lr_scheduler``, ``trainer`` and ``best`` (the handler that keeps the best network).
        settings: that the run keeps; saved with it.
        save_interval: epochs from one checkpoint to the next; 0 for the one at the end only.
        writes: whether this process writes; all of them read.
    """

    def __init__(
        self,
        folder: str,
        state: Mapping[str, Any],
        settings: Settings,
        save_interval: int = 1,
        writes: bool = True,
    ) -> None:
        self.folder, self.state, self.settings = str(folder), dict(state), plain(settings)
        self.save_interval, self.writes, self.saved_at = save_interval, writes, -1

    def attach(self, trainer: Any) -> None:
        """Called once, after all that changes the state at an epoch's end."""
        from ignite.engine import Events

        if self.writes and self.save_interval:
            trainer.add_event_handler(Events.EPOCH_COMPLETED(every=self.save_interval), self.save)
        if self.writes:
            trainer.add_event_handler(Events.COMPLETED, self.save)

    def save(self) -> None:
        """Write the state of now, beside the old file, which stays until the new one is complete."""
        trainer, path = self.state["trainer"], os.path.join(self.folder, "last.pt")
        if self.saved_at == trainer.state.iteration:
            return
        content = {name: item.state_dict() for name, item in self.state.items() if name != "trainer"}
        content["trainer"] = {
            key: getattr(trainer.state, key) for key in ("iteration", "epoch_length", "max_epochs")
        }
        content["scaler"] = trainer.scaler.state_dict() if trainer.scaler else {}
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(f"{path}.tmp", "wb") as file:
                torch.save({**content, "settings": self.settings}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
            self.saved_at = trainer.state.iteration
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            told = str(error).splitlines()[0]
            sys.exit(
                f"alice_seg: {path}: cannot be written ({told}). Make room; the checkpoint before it is untouched. Then go on "
                "with resume true."
            )

    def load(self, run: StoppedRun) -> None:
        """Go on from a run, if there is one. The learning rate follows the schedule of now, at the step of then."""
        if not run.exists:
            return
        content, trainer = run.content, self.state["trainer"]
        _refuse_other_groups(self.state["optimizer"], content["optimizer"], run.path)
        for name in ("model", "optimizer", "best"):
            self.state[name].load_state_dict(content[name])
        _wind(self.state["lr_scheduler"], run.iteration)
        if trainer.scaler and content["scaler"]:
            trainer.scaler.load_state_dict(content["scaler"])
        trainer.state.iteration = run.iteration
        trainer.state.epoch = run.iteration // trainer.state.epoch_length


def _wind(schedule: Any, steps: int) -> None:
    """Bring a new schedule to a step: one schedule over the whole, also where a run became longer."""
    if not steps:
        return
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate  # of its first step
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # its rate is a function of the step
        schedule.last_epoch, schedule._step_count = steps - 1, steps + 1
        schedule.step()
        return
    schedule._step_count = 2  # no warning that the optimizer has not made a step yet
    for _ in range(steps):
        schedule.step()


def _refuse_other_groups(optimizer: Any, saved: Mapping[str, Any], path: str) -> None:
    """Stop at an optimizer whose groups of parameters are others, as with ``layer_decay.yaml`` or ``sawtooth.yaml``."""
    fixed = [
        [
            {k: v for k, v in plain(group).items() if k not in ("lr", "params")}
            | {"params": len(group["params"])}
            for group in groups
        ]
        for groups in (saved["param_groups"], optimizer.state_dict()["param_groups"])
    ]
    if fixed[0] == fixed[1]:
        return
    names = sorted(
        {key for old, new in zip(*fixed, strict=False) for key in old if old[key] != new.get(key)}
        - {"params"}
    )
    why = (
        f"its {', '.join(names)} changed"
        if names
        else "its parameters are grouped otherwise (layer_decay.yaml, sawtooth.yaml?)"
    )
    sys.exit(
        f"alice_seg: resume: the optimizer of {path} is another one: {why}. Give the run's configs and settings again."
    )
