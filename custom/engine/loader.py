"""The loader: numbered samples in batches, shared out over processes."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # registers what must run after ours
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from custom import processes
from custom.errors import AliceError


class RankedBatches(Sampler[list[int]]):
    """Batches of consecutive sample numbers, of which every process takes its own stretch.

    Global batch ``g`` is samples ``g * B * W`` to ``(g + 1) * B * W``; process ``r`` of ``W`` takes the ``r``-th ``B``
    of them. To resume, start at the batch after the last one trained on.

    Args:
        batch_size: samples a batch and process, B.
        batches: how many batches in all, counted from 0.
        start: first batch to give.
        rank, world_size: this process, of how many.
    """

    def __init__(
        self, batch_size: int, batches: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise AliceError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.batches, self.start = batch_size, batches, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return max(self.batches - self.start, 0)


def sample_loader(
    dataset: Dataset,
    batch_size: int,
    batches: int,
    workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader:
    """A loader whose ``batch_sampler.start`` may be set before it is first iterated, to resume.

    ``rank`` and ``world_size`` are those of the run, unless given. ``collate`` is best a ``MaskedBatch``, which draws masks
    and plans in the workers.
    """
    here = processes.rank() if rank is None else rank
    of = processes.world_size() if world_size is None else world_size
    return DataLoader(
        dataset,
        batch_sampler=RankedBatches(batch_size, batches, 0, here, of),
        num_workers=workers,
        persistent_workers=False,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=_start_worker,
    )


@atexit.register
def _end_workers() -> None:
    """Kill loader workers that are still alive at exit. They ignore SIGTERM, so Python would wait for them forever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int) -> None:
    """A signal to the whole group (torchrun, timeout, Slurm) must not kill workers before the trainer has saved."""
    processes.end_with_parent()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
