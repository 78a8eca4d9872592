"""Walk a folder and list the files to examine, the ones that cannot be read, and the ones to ignore."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from custom.data.formats.reasons import Reason
from custom.data.intake.scan_record import Job, ScanRecord
from custom.data.scans import IMAGE_SUFFIXES, is_label

_OTHER_SUFFIXES = {".npz", ".npy", ".h5", ".hdf5", ".mat", ".mgz", ".mgh", ".mnc", ".hdr", ".zip", ".tar", ".tgz",
                   ".7z", ".rar", ".bz2", ".xz", ".zst", ".gz", ".gipl", ".vtk", ".b2nd", ".zarr"}  # fmt: skip
_DICOM_SUFFIX = re.compile(r"^(\.dcm|\.dicom|\.ima|\.\d*|)$", re.IGNORECASE)  # a UID ends in digits


def find_files(root: Path, ours: Iterable[Path] = ()) -> tuple[list[Job], list[ScanRecord], dict[str, int]]:
    """Find everything under a folder that may be a scan.

    Args:
        root: folder to walk.
        ours: files that the scan writes itself; they are left out.

    Returns:
        Jobs; records of files and folders that cannot be read; how many files of which suffix were ignored.
    """
    jobs: list[Job] = []
    problems: list[ScanRecord] = []
    others: Counter[str] = Counter()
    skipped = {path.resolve() for path in ours}

    def problem(path: Path, reason: Reason, kind: str = "other") -> None:
        record = ScanRecord(path.relative_to(root).as_posix(), "other", kind)
        record.add(reason)
        problems.append(record)

    open_folders: deque[tuple[Path, tuple[Path, ...]]] = deque([(root, (root.resolve(),))])
    visited = {root.resolve()}
    while open_folders:
        here, above = open_folders.popleft()
        slices: list[os.DirEntry] = []
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            problem(here, Reason.UNREADABLE)
            continue
        for entry in listed:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                others["hidden"] += 1
                continue
            try:
                if entry.is_symlink():
                    target = path.resolve(strict=True)
                    if not target.is_relative_to(root.resolve()):
                        problem(path, Reason.LEAVES_FOLDER)
                        continue
                if entry.is_dir():
                    real = path.resolve()
                    if real in above:
                        problem(path, Reason.SYMLINK_LOOP)
                    elif real in visited:
                        others["linked folder"] += 1
                    else:
                        visited.add(real)
                        open_folders.append((path, (*above, real)))
                    continue
                if not entry.is_file():
                    problem(path, Reason.UNREADABLE)
                    continue
                if path.resolve() in skipped:
                    continue
                name, suffix = entry.name.lower(), path.suffix.lower()
                if name.endswith(IMAGE_SUFFIXES):
                    relative = path.relative_to(root)
                    kind = "label" if is_label(relative) else "file"
                    jobs.append(Job(root, relative.as_posix(), kind, _key([entry])))
                elif _DICOM_SUFFIX.match(suffix) or re.search(r"\.\d+$", name):
                    slices.append(entry)
                elif suffix in _OTHER_SUFFIXES:
                    problem(path, Reason.UNSUPPORTED)
                else:
                    others[suffix or "no suffix"] += 1
            except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
                loop = isinstance(error, RuntimeError) or getattr(error, "errno", 0) == errno.ELOOP
                problem(path, Reason.SYMLINK_LOOP if loop else Reason.UNREADABLE)
        if slices:
            files = tuple(Path(entry.path).relative_to(root).as_posix() for entry in slices)
            where = here.relative_to(root).as_posix()
            jobs.append(Job(root, where, "folder", _key(slices), files))
    return jobs, problems, dict(others)


def _key(entries: Sequence[os.DirEntry]) -> str:
    """A hash that changes when a file is added, removed or written to."""
    digest = hashlib.sha256()
    for entry in entries:
        status = entry.stat()
        digest.update(repr((os.fsencode(entry.name), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]
