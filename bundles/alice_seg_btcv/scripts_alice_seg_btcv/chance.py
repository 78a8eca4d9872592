"""Chance as a function of what it is for, so that workers, processes and restarts change nothing.

The order of the cases is drawn from the seed and the epoch; a case's crops from the seed, the epoch and the case; what a
network draws (dropout) from the seed, the step and the process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from monai.data.utils import set_rnd
from torch.utils.data import Dataset, Sampler


def number(*parts: int | str) -> int:
    """A number in [0, 2**32) that the parts decide."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "little")


class Order(Sampler):
    """The cases of an epoch in a random order, as pairs (epoch, case).

    Args:
        cases: as many as it is long.
        seed: of the order.
        rank: this process, of several that share the cases.
        processes: how many they are. The first cases come twice where the number of cases cannot be divided.
    """

    def __init__(self, cases: Sized, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.cases, self.seed, self.rank, self.processes = cases, seed, rank, processes
        self.epoch, self.skipped = 1, 0

    def start(self, epoch: int, skipped: int = 0) -> None:
        """Choose the epoch, counted from 1, and how many of its cases were seen before a stop."""
        self.epoch, self.skipped = epoch, skipped

    def __len__(self) -> int:
        return math.ceil(len(self.cases) / self.processes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = torch.Generator().manual_seed(number("order", self.seed, self.epoch))
        order = torch.randperm(len(self.cases), generator=draw).tolist()
        padded = [order[i % len(order)] for i in range(len(self) * self.processes)]
        mine = padded[self.rank :: self.processes][self.skipped :]
        return iter([(self.epoch, case) for case in mine])


class Drawn(Dataset):
    """A dataset whose random transforms are drawn from the seed, the epoch and the case.

    Args:
        dataset: of MONAI, with an attribute ``transform``.
        seed: of the draws.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: tuple[int, int]) -> Any:
        """The crops of a pair (epoch, case) of :class:`Order`."""
        epoch, case = at
        set_rnd(self.dataset.transform, number("crops", self.seed, epoch, case))
        return self.dataset[case]


def attach(trainer: Any, order: Order, batch_size: int, seed: int) -> None:
    """Let a trainer tell the order its epoch, and draw anew before each step.

    Args:
        trainer: of MONAI. Where it starts within an epoch, the batches that were seen are left out.
        order: of its data.
        batch_size: cases a step.
        seed: of what the network draws.
    """
    from ignite.engine import Events  # programs that read the preprocessing alone do without ignite

    def start_epoch() -> None:
        seen = trainer.state.iteration % trainer.state.epoch_length
        order.start(trainer.state.epoch, seen * batch_size)

    def start_step() -> None:
        torch.manual_seed(number("step", seed, trainer.state.iteration, order.rank))

    trainer.add_event_handler(Events.EPOCH_STARTED, start_epoch)
    trainer.add_event_handler(Events.ITERATION_STARTED, start_step)
