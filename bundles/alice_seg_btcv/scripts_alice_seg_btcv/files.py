"""Files: text of any system, folders, DICOM, files that are cut short, and whether a place can be written to."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel

from .layouts import is_passed_over


def read_json(path: str | Path) -> Any:
    """Read a JSON file of any system: UTF-8, or UTF-16 as Windows PowerShell writes it; with or without a byte-order mark.

    Raises:
        ValueError: naming the file, if it cannot be read or is no JSON.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return json.loads(content.decode("utf-16" if utf_16 else "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def files_below(folder: str | Path) -> list[Path]:
    """All files of a folder and those in it, sorted, each folder once; hidden ones and ``__MACOSX`` are passed over."""
    found: list[Path] = []
    visited: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_passed_over(name))
        found += [Path(here, name) for name in names if not is_passed_over(name)]
    return sorted(found)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix, or by the mark in its content where the name has no other suffix."""
    suffix = path.suffix.lower()
    if suffix in (".dcm", ".dicom", ".ima"):
        return True
    if suffix and not suffix[1:].isdigit():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_folders(files: Iterable[Path]) -> list[Path]:
    """The folders whose first or last file is DICOM; a series has hundreds."""
    by_folder: dict[Path, list[Path]] = {}
    for path in files:
        by_folder.setdefault(path.parent, []).append(path)
    return [folder for folder, inside in by_folder.items() if any(map(is_dicom, (inside[0], inside[-1])))]


def holds_dicom(path: str) -> bool:
    """Whether a file or a folder is DICOM."""
    place = Path(path)
    if place.is_dir():
        return bool(dicom_folders(sorted(p for p in place.iterdir() if p.is_file())))
    return place.is_file() and is_dicom(place)


def output_problems(**folders: str) -> list[str]:
    """Say which folders cannot be written to. Nothing is left behind.

    Args:
        folders: name of the setting -> folder; it may not exist yet.
    """
    told = []
    for name, folder in folders.items():
        place = Path(folder).absolute()
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            why = "it is a file" if place.is_file() else error.strerror
            where = "" if place == Path(folder).absolute() else f" ({place})"
            told.append(f"{name}: {folder}{where} cannot be written to: {why}. Give another folder.")
    return told


def is_damaged(path: str) -> bool:
    """Whether a NIfTI file is cut short or no NIfTI at all. Files of other formats are not looked at."""
    if not re.search("[.]nii([.]gz)?$", path) or not os.path.isfile(path):
        return False
    try:
        return not _is_whole(path)
    except Exception:  # a damaged file makes readers raise almost anything
        return True


def _is_whole(path: str) -> bool:
    voxels = nibabel.load(path).dataobj
    end = voxels.offset + math.prod(int(side) for side in voxels.shape) * voxels.dtype.itemsize
    if path.endswith(".nii"):
        return os.path.getsize(path) >= end
    # the last four bytes of a .gz give the size of its content; only where that differs, all of it is read
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        told = int.from_bytes(file.read(), "little")
    return told == end % 2**32 or _unpacked_size(path) >= end


def _unpacked_size(path: str) -> int:
    with gzip.open(path) as file:
        return sum(map(len, iter(lambda: file.read(2**24), b"")))
