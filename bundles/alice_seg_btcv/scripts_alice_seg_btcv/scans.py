"""Files: which scans to segment, and which files are cut short."""

from __future__ import annotations

import glob
import gzip
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import nibabel

_SUFFIX = re.compile(r"[.](nii|nii[.]gz|nrrd|mha)$")
_PARTS = ("training", "validation", "testing", "test")


def find_scans(dataset_dir: str, label_folders: Sequence[str]) -> list[dict[str, str]]:
    """List the scans to segment.

    Args:
        dataset_dir: a folder (searched at any depth), one scan, or a datalist JSON with paths relative to itself.
        label_folders: names of folders that hold labels. They are left out, and so are ``*_label``, ``*_seg`` and
            ``*_mask``.

    Returns:
        One ``{"image": path}`` for each scan.
    """
    root = str(dataset_dir)
    if root.endswith(".json"):
        with open(root, encoding="utf-8") as file:
            content = json.load(file)
        entries = [entry for part, entries in content.items() if part in _PARTS for entry in entries]
        names = [entry["image"] if isinstance(entry, dict) else entry for entry in entries]
        return [{"image": os.path.join(os.path.dirname(root), name)} for name in names]
    if os.path.isfile(root):
        return [{"image": root}]
    found = glob.glob(os.path.join(root, "**", "*.*"), recursive=True)
    return [{"image": path} for path in sorted(found) if _is_scan(path, label_folders)]


def _is_scan(path: str, label_folders: Sequence[str]) -> bool:
    folder = os.path.basename(os.path.dirname(path))
    return (
        bool(_SUFFIX.search(path))
        and not re.search("_(label|seg|mask)[.]", path)
        and folder not in label_folders
    )


def inference_problems(data: Sequence[dict[str, Any]], dataset_dir: str) -> list[str]:
    """Say what keeps the scans from being segmented: none found, files cut short, two results of one name.

    Args:
        data: ``{"image": path}`` of each scan.
        dataset_dir: where they were looked for.

    Returns:
        At most one sentence.
    """
    paths = [str(record["image"]) for record in data]
    if not paths:
        return [f"dataset_dir: no scan found in {dataset_dir}."]
    if damaged := damaged_files(paths):
        return damaged
    by_name = sorted(paths, key=_without_suffix)
    same = [f"{a} and {b}" for a, b in pairwise(by_name) if _without_suffix(a) == _without_suffix(b)]
    return [f"dataset_dir: scans whose segmentations would have one name: {', '.join(same)}."] if same else []


def _without_suffix(path: str) -> str:
    return _SUFFIX.sub("", path)


def common_folder(data: Sequence[dict[str, Any]]) -> str:
    """The deepest folder that holds all images; results keep their folders below it."""
    folders = [os.path.dirname(os.path.abspath(str(record["image"]))) for record in data]
    return os.path.commonpath(folders) if folders else ""


def damaged_files(paths: Iterable[str]) -> list[str]:
    """Name the damaged files among ``paths`` in at most one sentence."""
    damaged = [path for path in paths if is_damaged(path)]
    return [f"dataset_dir: cut short or damaged, copy again: {', '.join(damaged)}."] if damaged else []


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
