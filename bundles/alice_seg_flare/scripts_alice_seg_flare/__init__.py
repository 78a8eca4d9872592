"""Functions of this bundle's configs, for what takes more than one small expression. They need MONAI and nothing of ours.

The configs reach this package through their key ``scripts``. So it is found from any folder, and by programs that do not
put the bundle on Python's path. Its name holds the bundle's name, so that several bundles can share one process. Its
files are the same in both segmentation bundles.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from . import (
    agreement,
    averaging,
    body,
    cases,
    chance,
    checks,
    examine,
    files,
    labels,
    layouts,
    locks,
    losses,
    pickled,
    progress,
    published,
    refusals,
    resume,
    scans,
    scores,
    settings,
    state_dicts,
    training,
    weights,
)

__all__ = [
    "agreement", "averaging", "body", "cases", "chance", "checks", "examine", "files", "labels", "layouts", "locks",
    "losses", "of", "pickled", "progress", "published", "refusals", "resume", "scans", "scores", "settings", "state_dicts",
    "stop", "training", "weights",
]  # fmt: skip


def of(bundle_root: str) -> ModuleType:
    """Return this package as it lies in ``bundle_root``.

    One process may hold two copies of a bundle, such as two versions of it. Python imports the first one only, and
    would hand its functions to the configs of both.

    Args:
        bundle_root: folder of the bundle whose config asks.
    """
    here = Path(__file__).resolve().parent
    wanted = Path(bundle_root).resolve() / here.name
    if wanted == here or not (wanted / "__init__.py").is_file():
        return sys.modules[__name__]
    for name in [name for name in sys.modules if name == __name__ or name.startswith(f"{__name__}.")]:
        del sys.modules[name]
    if str(wanted.parent) in sys.path:
        sys.path.remove(str(wanted.parent))
    sys.path.insert(0, str(wanted.parent))  # in front, as workers that are spawned search the path from there
    importlib.invalidate_caches()
    return importlib.import_module(__name__)


def stop(problems: Iterable[str]) -> None:
    """End the program with a message that names all problems; do nothing if there are none.

    Names come from disks and headers. What steers a terminal or breaks a line in them is spelt out, such as ``\\x1b``. A
    line break before an indented line is ours, and stays.
    """
    if told := " ".join(filter(None, problems)):
        spelt = [
            c
            if c.isprintable() or (c == "\n" and told.startswith("  ", i + 1))
            else c.encode("unicode_escape").decode()
            for i, c in enumerate(told)
        ]
        sys.exit(f"alice_seg: {''.join(spelt)}")
