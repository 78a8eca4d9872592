"""Processes that share work: helpers for distributed runs, locks on folders, workers that end with their parent."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom.errors import AliceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

LEAVE_PAUSE_S = 1.0
BEAT_S = 30.0  # a holder touches its lock so often
GONE_S = 600.0  # a holder on another machine that has been silent for so long counts as gone (ours)


# -- the processes of one run; in a single process these do nothing ------------------------------------------


def _dist() -> Any:
    """``torch.distributed``, imported late: torch takes seconds, and a worker that examines files needs none of it."""
    import torch.distributed

    return torch.distributed


def _many() -> bool:
    dist = _dist()
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 when alone."""
    return _dist().get_rank() if _many() else 0


def world_size() -> int:
    """How many processes share the run, 1 when alone."""
    return _dist().get_world_size() if _many() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The average of a tensor over all processes, without gradient."""
    value = value.detach().clone()
    if _many():
        _dist().all_reduce(value)
        value /= world_size()
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process if the flag is set on one of them."""
    if not _many():
        return flag
    import torch

    votes = torch.tensor(float(flag), device=device)
    _dist().all_reduce(votes)
    return bool(votes > 0)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, ...) of all processes in order of rank, (W * B, ...), without gradient."""
    rows = rows.detach().contiguous()
    if not _many():
        return rows
    import torch

    parts = [torch.empty_like(rows) for _ in range(world_size())]
    _dist().all_gather(parts, rows)
    return torch.cat(parts)


def first_process_says(number: int, device: torch.device) -> int:
    """Give every process the number of the first one."""
    if not _many():
        return number
    import torch

    value = torch.tensor(number, device=device)
    _dist().broadcast(value, 0)
    return int(value)


def names_of_all(names: list[str]) -> list[str]:
    """The names that all processes hold together, each once, sorted."""
    if not _many():
        return sorted(set(names))
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    _dist().all_gather_object(gathered, names)
    return sorted({name for part in gathered for name in part})


def wait_for_all() -> None:
    """Wait until every process has come this far (a barrier)."""
    if _many():
        _dist().barrier()


def leave() -> None:
    """Leave the group of processes; the last call before a process exits.

    Gloo's threads release the tensors of an exchange after they have reported it as done, and they need
    Python for that. If Python is already shutting down, the process aborts (pytorch issue 190489), and
    torchrun fails the whole run. This happens on busy machines. A pause of one second lets the threads
    finish.
    """
    dist = _dist()
    if not (dist.is_available() and dist.is_initialized()):
        return
    gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if gloo:
        time.sleep(LEAVE_PAUSE_S)


# -- workers -------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Let this worker end when the process that started it has ended, however that happened (``kill -9``, too).

    Call it first in a worker of ``multiprocessing``: as the initializer of a pool, or in the ``worker_init_fn`` of a loader.
    It does nothing in a process that is no worker.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel, os.getppid()), daemon=True).start()


def _end_after(sentinel: Any, parent: int) -> None:
    # a forked worker's brothers may hold the sentinel open, so the parent's number is looked at as well
    while not wait_for([sentinel], timeout=1.0) and os.getppid() == parent:
        pass
    os._exit(1)


# -- locks ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(
    path: str | os.PathLike[str],
    doing: str,
    *,
    excludes: str | None = None,
    wait: bool = False,
    error: type[AliceError] = AliceError,
    instead: str = "another folder",
) -> Iterator[None]:
    """Keep other processes from the same work in a folder, while the block runs.

    The lock is a file that says who holds it: machine, process, and when the process started. A lock whose holder is gone
    is taken over. On this machine, a holder is gone if its process has ended. On another machine, it is gone if it has not
    touched the file for ten minutes.

    Args:
        path: of the lock file. Its folder is made if it is missing.
        doing: what is done there, such as "alice build".
        excludes: pattern of other lock files in the folder; while one of them is held, this one cannot be.
        wait: wait until the lock is free; else a held lock is refused.
        error: what is raised.
        instead: what the message tells the user to choose.

    Raises:
        AliceError: (or ``error``) naming the folder and who is at work there; or if the lock cannot be written.
    """
    path, told = Path(path), False
    mine = json.dumps({"doing": doing, "since": time.strftime("%Y-%m-%d %H:%M:%S"), **_process(os.getpid())})
    new_folder = not path.parent.exists()
    try:
        while (holder := _take(path, mine, excludes)) is not None:
            if not wait:
                raise error(
                    f"{path.parent}: {holder} is at work here. Wait until it has ended, delete {path} if it has, or choose {instead}."
                )
            if not told:
                logger.warning("%s: waiting until %s has ended.", path.parent, holder)
            told = True
            time.sleep(1.0)
    except OSError as failure:
        why = failure.strerror or type(failure).__name__
        raise error(f"{path.parent}: cannot be written ({why}). Choose {instead}.") from failure
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == mine:
                path.unlink()
            if new_folder:
                path.parent.rmdir()  # if nothing else is in it


def _take(path: Path, mine: str, excludes: str | None) -> str | None:
    """Take a lock: None if it is ours now, else who holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(mine)
            break
        except FileExistsError:
            if (holder := _holder(path)) is not None:
                return holder
    for other in sorted(path.parent.glob(excludes)) if excludes else []:
        if other != path and (holder := _holder(other)) is not None:
            path.unlink()
            return holder
    return None


def _holder(path: Path) -> str | None:
    """Who holds a lock, in words. None if nobody does any more; then the file is gone."""
    try:
        content, touched = path.read_text(encoding="utf-8", errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        lock = dict(json.loads(content))
        here = _process(int(lock["pid"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        lock, here = {}, {}  # just being written, or cut short
    who = f"{lock.get('doing')} (process {lock.get('pid')} on {lock.get('host')}, since {lock.get('since')})"
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if os.name == "posix" and lock and all(lock.get(key) == here[key] for key in ("host", "container")):
            if here["start"] == lock.get("start") is not None:
                return who
        else:
            aside.touch()  # the disk's clock, which may be another machine's
            if aside.stat().st_mtime - touched < GONE_S:
                return who
        os.replace(path, aside)
        if aside.read_text(encoding="utf-8", errors="replace") != content:
            os.link(aside, path)  # another process was faster; this is its new lock
        else:
            logger.warning("%s: taken over from %s, which is gone.", path, who)
    except (FileNotFoundError, FileExistsError):
        pass
    finally:
        aside.unlink(missing_ok=True)
    return None


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch a lock from time to time, so that other machines see that its holder is alive."""
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from all others. ``start`` is None if there is no such process (any more)."""
    about: dict[str, Any] = {"host": platform.node(), "container": None, "pid": pid, "start": None}
    with contextlib.suppress(OSError):  # a container has its own numbers of processes
        about["container"] = os.stat("/proc/self/ns/pid").st_ino
    try:  # Linux: behind the command's name in brackets come the state and, as 20th, the start in clock ticks
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        about["start"] = None if fields[0] in "ZX" else fields[19]
    except OSError:
        if os.name == "posix" and not Path("/proc/self/stat").exists():  # macOS
            with contextlib.suppress(ProcessLookupError, OverflowError):
                with contextlib.suppress(PermissionError):
                    os.kill(pid, 0)
                about["start"] = "alive"
    return about
