"""Which scans to segment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .files import dicom_folders, files_below, output_problems, read_json
from .layouts import IMAGE_SUFFIXES, entries_of, is_label, path_beside, stem


def find_scans(dataset_dir: str, label_folders: Sequence[str]) -> list[dict[str, str]]:
    """List the scans to segment.

    Args:
        dataset_dir: a folder (searched at any depth), one scan, or a datalist JSON with paths relative to itself.
        label_folders: more names of folders that hold labels. Labels are left out: see ``layouts.py``.

    Returns:
        One ``{"image": path}`` for each scan, and for each folder of DICOM, which is refused later with a way out.
    """
    root = Path(dataset_dir)
    if root.suffix.lower() == ".json":
        if _unreadable(root):
            return []
        listed = entries_of(read_json(root))
        if listed:
            return [{"image": str(path_beside(root.parent, entry["image"]))} for entry in listed]
        root = root.parent  # nnU-Net v2's dataset.json lists no case
    if root.is_file():
        return [{"image": str(root)}]
    files = files_below(root)
    scans = [p for p in files if p.name.lower().endswith(IMAGE_SUFFIXES) and not is_label(p, label_folders)]
    return [{"image": str(path)} for path in sorted([*scans, *dicom_folders(files)])]


def inference_problems(
    data: Sequence[dict[str, Any]], dataset_dir: str, output_dir: str | None = None
) -> list[str]:
    """Say what keeps all scans from being segmented: none found, two results of one name, nowhere to write.

    Args:
        data: ``{"image": path}`` of each scan.
        dataset_dir: where they were looked for.
        output_dir: where the results go.

    Returns:
        At most one sentence for each.
    """
    paths = [str(record["image"]) for record in data]
    if not paths and (why := _unreadable(Path(dataset_dir))):
        return [f"dataset_dir: {why}."]
    if not paths:
        return [f"dataset_dir: no scan found in {dataset_dir}."]
    by_name = sorted(paths, key=_without_suffix)
    same = [f"{a} and {b}" for a, b in pairwise(by_name) if _without_suffix(a) == _without_suffix(b)]
    told = [f"dataset_dir: scans whose segmentations would have one name: {', '.join(same)}."] if same else []
    return told + (output_problems(output_dir=output_dir) if output_dir else [])


def _unreadable(datalist: Path) -> str:
    """Why a datalist cannot be read; "" if it can, or is none."""
    try:
        if datalist.suffix.lower() == ".json":
            read_json(datalist)
    except ValueError as error:
        return str(error)
    return ""


def _without_suffix(path: str) -> str:
    return str(Path(path).with_name(stem(Path(path))))


def common_folder(data: Sequence[dict[str, Any]]) -> str:
    """The deepest folder that holds all images; results keep their folders below it."""
    folders = [os.path.dirname(os.path.abspath(str(record["image"]))) for record in data]
    return os.path.commonpath(folders) if folders else ""
