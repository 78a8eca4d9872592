"""Walk a folder of scans: the one rule for which files are looked at, and what their names say."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from custom.data.formats.dicom_header import is_dicom
from custom.data.formats.reasons import Reason
from custom.data.layouts import IMAGE_SUFFIXES, is_passed_over

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAYBE_DICOM = re.compile(r"^(\.\d*|)$")  # a UID ends in digits
_OTHER_SUFFIXES = {".npz", ".npy", ".h5", ".hdf5", ".mat", ".mgz", ".mgh", ".mnc", ".hdr", ".zip", ".tar", ".tgz",
                   ".7z", ".rar", ".bz2", ".xz", ".zst", ".gz", ".gipl", ".vtk", ".b2nd", ".zarr"}  # fmt: skip


@dataclass
class Folder:
    """What lies in one folder, without what is passed over.

    Attributes:
        path: of the folder.
        files: in the order of their names.
        problems: files and folders that cannot be used, and why.
    """

    path: Path
    files: list[os.DirEntry] = field(default_factory=list)
    problems: list[tuple[Path, Reason]] = field(default_factory=list)


def walk(root: Path, others: Counter[str] | None = None, leave: bool = True) -> Iterator[Folder]:
    """Visit a folder and those in it, each once, whatever links there are.

    Args:
        root: the folder.
        others: counts what was passed over: ``hidden``, and ``linked folder`` for a link to a folder of this one.
        leave: follow links that lead out of ``root``; else each is a problem (``leaves_folder``).
    """
    others = Counter() if others is None else others
    top = root.resolve()
    open_folders: deque[tuple[Path, tuple[Path, ...]]] = deque([(root, (top,))])
    visited = {top}
    while open_folders:
        here, above = open_folders.popleft()
        found = Folder(here)
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            found.problems.append((here, Reason.UNREADABLE))
            listed = []
        for entry in listed:
            path = Path(entry.path)
            if is_passed_over(entry.name):
                others["hidden"] += 1
                continue
            try:
                if entry.is_symlink() and not (path.resolve(strict=True).is_relative_to(top) or leave):
                    found.problems.append((path, Reason.LEAVES_FOLDER))
                elif entry.is_dir():
                    real = path.resolve()
                    if real in above:
                        found.problems.append((path, Reason.SYMLINK_LOOP))
                    elif real in visited:
                        others["linked folder"] += 1
                    else:
                        visited.add(real)
                        open_folders.append((path, (*above, real)))
                elif entry.is_file():
                    found.files.append(entry)
                else:
                    found.problems.append((path, Reason.UNREADABLE))
            except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
                loop = isinstance(error, RuntimeError) or getattr(error, "errno", 0) == errno.ELOOP
                found.problems.append((path, Reason.SYMLINK_LOOP if loop else Reason.UNREADABLE))
        yield found


def scan_files(root: Path) -> list[Path]:
    """Every file under a folder whose name is that of a scan or label, sorted."""
    return sorted(Path(f.path) for folder in walk(root) for f in folder.files if kind_of(f.name) == "scan")


def kind_of(name: str) -> str:
    """What a file's name says that it holds: scan, dicom, maybe dicom, unsupported (images of other formats), or other."""
    name = name.lower()
    suffix = Path(name).suffix
    if name.endswith(IMAGE_SUFFIXES):
        return "scan"
    if suffix in _DICOM_SUFFIXES:
        return "dicom"
    if _MAYBE_DICOM.match(suffix) or re.search(r"\.\d+$", name):
        return "maybe dicom"
    return "unsupported" if suffix in _OTHER_SUFFIXES else "other"


def passed_over(root: Path) -> list[str]:
    """Sentences about files under a folder that may be scans, but are read in another way or not at all."""
    dicom: list[Path] = []
    folders, unsupported, problems = 0, [], []
    for folder in walk(root):
        here = [entry for entry in folder.files if kind_of(entry.name) in ("dicom", "maybe dicom")]
        if any(holds_dicom(entry.path) for entry in here[:1] + here[-1:]):  # a series has hundreds of files
            dicom += [Path(entry.path) for entry in here]
            folders += 1
        unsupported += [Path(entry.path) for entry in folder.files if kind_of(entry.name) == "unsupported"]
        problems += folder.problems
    said = []
    if dicom:
        said.append(
            f"{len(dicom)} DICOM file(s) in {folders} folder(s), {_some(root, dicom)}. Series are read through a "
            f"manifest: alice scan {root} -o manifest.json, then give manifest.json in place of the folder"
        )
    if unsupported:
        said.append(f"{len(unsupported)} file(s) of formats that are not read, {_some(root, unsupported)}")
    if problems:
        said.append(
            f"{len(problems)} file(s) that cannot be opened, {_some(root, [path for path, _ in problems])}"
        )
    return said


def _some(root: Path, paths: list[Path]) -> str:
    return ", ".join(str(path.relative_to(root)) for path in paths[:3]) + (", ..." if paths[3:] else "")


def holds_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file is DICOM, by its suffix, or else by the mark in its content."""
    kind = kind_of(Path(path).name)
    try:
        return kind == "dicom" or (kind == "maybe dicom" and is_dicom(Path(path)))
    except OSError:
        return False
