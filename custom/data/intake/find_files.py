"""List the files of a folder to examine, the ones that cannot be read, and the ones to ignore."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from custom.data.folder_walk import kind_of, walk
from custom.data.formats.reasons import Reason
from custom.data.intake.scan_record import Job, ScanRecord
from custom.data.layouts import is_label


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

    def problem(path: Path, reason: Reason) -> None:
        record = ScanRecord(path.relative_to(root).as_posix(), "other", "other")
        record.add(reason)
        problems.append(record)

    for folder in walk(root, others, leave=False):
        slices: list[os.DirEntry] = []
        for path, reason in folder.problems:
            problem(path, reason)
        for entry in folder.files:
            path = Path(entry.path)
            kind, relative = kind_of(entry.name), path.relative_to(root)
            try:
                if path.resolve() in skipped:
                    continue
                if kind == "scan":
                    job = "label" if is_label(relative) else "file"
                    jobs.append(Job(root, relative.as_posix(), job, _key([entry])))
                elif kind in ("dicom", "maybe dicom"):
                    entry.stat()
                    slices.append(entry)
                elif kind == "unsupported":
                    problem(path, Reason.UNSUPPORTED)
                else:
                    others[path.suffix.lower() or "no suffix"] += 1
            except OSError:
                problem(path, Reason.UNREADABLE)
        if slices:
            files = tuple(Path(entry.path).relative_to(root).as_posix() for entry in slices)
            where = folder.path.relative_to(root).as_posix()
            jobs.append(Job(root, where, "folder", _key(slices), files))
    return jobs, problems, dict(others)


def _key(entries: Sequence[os.DirEntry]) -> str:
    """A hash that changes when a file is added, removed or written to."""
    digest = hashlib.sha256()
    for entry in entries:
        status = entry.stat()
        digest.update(repr((os.fsencode(entry.name), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]
