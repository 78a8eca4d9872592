"""Small helpers for distributed runs; they do nothing in a single process."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

LEAVE_PAUSE_S = 1.0


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if _many() else 0


def world_size() -> int:
    """How many processes share the run, 1 when alone."""
    return dist.get_world_size() if _many() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The average of a tensor over all processes, without gradient."""
    value = value.detach().clone()
    if _many():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process if the flag is set on one of them."""
    if not _many():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return bool(votes > 0)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, ...) of all processes in order of rank, (W * B, ...), without gradient."""
    rows = rows.detach().contiguous()
    if not _many():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def first_process_says(number: int, device: torch.device) -> int:
    """Give every process the number of the first one."""
    if not _many():
        return number
    value = torch.tensor(number, device=device)
    dist.broadcast(value, 0)
    return int(value)


def names_of_all(names: list[str]) -> list[str]:
    """The names that all processes hold together, each once, sorted."""
    if not _many():
        return sorted(set(names))
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    return sorted({name for part in gathered for name in part})


def wait_for_all() -> None:
    """Wait until every process has come this far (a barrier)."""
    if _many():
        dist.barrier()


def leave() -> None:
    """Leave the group of processes; the last call before a process exits.

    Gloo's threads release the tensors of an exchange after they have reported it as done, and they need
    Python for that. If Python is already shutting down, the process aborts (pytorch issue 190489), and
    torchrun fails the whole run. This happens on busy machines. A pause of one second lets the threads
    finish.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if gloo:
        time.sleep(LEAVE_PAUSE_S)
