"""Read files of torch.save without running what is in them, and say what a file was refused for.

It needs torch alone, since each segmentation bundle carries a copy of this file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch


@contextmanager
def plain_values() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` take values that run no code: argparse's Namespace, numpy's numbers."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1, numpy 2
    allowed: list[Any] = [argparse.Namespace, np.dtype, *names, *numbers]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about files that it then refuses
        yield


def told_pickled(path: object, error: BaseException) -> str:
    """If torch refused a file for the objects in it: which, and what to do; "" if it refused for another reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    names = set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    with suppress(Exception):  # reads only the zip format; the message names at least the first class
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    names = {n for n in names if n != "argparse.Namespace" and not n.startswith("numpy.")} or names
    if not names:
        return ""
    code = (
        f'import torch; c = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        'w = {k: c[k] for k in ("state_dict", "model", "net", "network_weights", "student", "teacher") if k in c} or c; '
        'torch.save(w, "weights.pth")'
    )
    return (
        f"holds more than weights: {', '.join(sorted(names))}. Loading them would run code from the file, so pickled "
        "objects are never run and the file is refused. If you trust it, save only its weights with this command, and "
        f"load weights.pth:\n  python -c {shlex.quote(code)}"
    )
