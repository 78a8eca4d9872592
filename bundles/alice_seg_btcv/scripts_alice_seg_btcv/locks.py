"""One training in a folder at a time."""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time

_BEAT_S, _GONE_S = 60.0, 600.0  # a lock of another machine that is not touched so long is nobody's


def take(folder: str) -> list[str]:
    """Take the folder until this process ends. Of several processes of a run, the first one does.

    A lock whose holder is gone is taken over.

    Args:
        folder: ``output_dir`` of a training.

    Returns:
        One sentence if another process trains there.
    """
    path, me = os.path.join(folder, "training.lock"), {"host": socket.gethostname(), "pid": os.getpid()}
    if os.environ.get("RANK", "0") != "0":
        return []
    os.makedirs(folder, exist_ok=True)
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(me, file)
            break
        except FileExistsError:
            holder = _holder(path)
            if holder and _lives(holder, path):
                return [
                    f"output_dir: process {holder.get('pid')} on {holder.get('host')} trains in {folder}. Wait until it has "
                    f"ended, delete {path} if it has, or choose another output_dir."
                ]
            if os.path.exists(path):
                os.unlink(path)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    atexit.register(_release, path, me, ended)
    return []


def _holder(path: str) -> dict:
    """Who holds a lock; of a file that is just being written, somebody."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {"pid": "?"}
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return {"pid": "?"}


def _lives(holder: dict, path: str) -> bool:
    pid = holder.get("pid")
    if os.name == "posix" and isinstance(pid, int) and holder.get("host") == socket.gethostname():
        if pid == os.getpid():
            return False  # an earlier training of this process, or of a container that was started anew
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
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


def _release(path: str, me: dict, ended: threading.Event) -> None:
    ended.set()
    if _holder(path) == me:
        os.unlink(path)
