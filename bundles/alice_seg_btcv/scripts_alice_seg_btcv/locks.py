"""One training in a folder at a time."""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
from typing import Any

_BEAT_S, _GONE_S = 60.0, 600.0  # a lock of another machine that is not touched so long is nobody's


def take(folder: str) -> list[str]:
    """Take the folder until this process ends. Of several processes of a run, the first one does.

    A lock whose holder is gone is taken over.

    Args:
        folder: ``output_dir`` of a training.

    Returns:
        One sentence if another process trains there.
    """
    path, me = os.path.join(folder, "training.lock"), _process(os.getpid())
    if os.environ.get("RANK", "0") != "0":
        return []
    try:
        os.makedirs(folder, exist_ok=True)
        while not _written(path, me):
            holder = _holder(path)
            if holder and _lives(holder, path):
                return [
                    f"output_dir: process {holder.get('pid')} on {holder.get('host')} trains in {folder}. Wait until it has "
                    f"ended, delete {path} if it has, or choose another output_dir."
                ]
            _put_aside(path, holder)
    except OSError as error:
        return [
            f"output_dir: {folder} cannot be written ({error.strerror or error}). Choose another output_dir."
        ]
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    atexit.register(_release, path, me, ended)
    return []


def _process(pid: int) -> dict[str, Any]:
    """A process: its machine, its container, its number, and when it started, since numbers are given anew."""
    about: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "container": "", "start": None}
    try:
        about["container"] = os.readlink("/proc/self/ns/pid")
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            about["start"] = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass  # no Linux, or the process has ended
    return about


def _written(path: str, me: dict[str, Any]) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(me, file)
    except FileExistsError:
        return False
    return True


def _holder(path: str) -> dict[str, Any]:
    """Who holds a lock; of a file that is just being written, somebody."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {"pid": "?"}
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return {"pid": "?"}


def _put_aside(path: str, holder: dict[str, Any]) -> None:
    """Remove a lock whose holder is gone; give it back if another process took it over a moment ago."""
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        os.replace(path, aside)
        if _holder(aside) != holder:
            os.link(aside, path)
    except (FileNotFoundError, FileExistsError):
        pass
    finally:
        if os.path.exists(aside):
            os.unlink(aside)


def _lives(holder: dict[str, Any], path: str) -> bool:
    pid, mine = holder.get("pid"), _process(os.getpid())
    same = os.name == "posix" and all(holder.get(key) == mine[key] for key in ("host", "container"))
    if same and isinstance(pid, int):
        if pid == mine["pid"]:
            return False  # an earlier training of this process
        now = _process(pid)
        if mine["start"] is not None:  # Linux knows when a process started
            return now["start"] is not None and now["start"] == holder.get("start")
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True
    try:
        return time.time() - os.path.getmtime(path) < _GONE_S
    except OSError:
        return False


def _beat(path: str, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def _release(path: str, me: dict[str, Any], ended: threading.Event) -> None:
    ended.set()
    if _holder(path) == me:
        os.unlink(path)
