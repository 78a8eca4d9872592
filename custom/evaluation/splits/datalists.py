"""Make a datalist: check pairs of image and label, deal patients into folds, rank them for few-shot subsets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.errors import ScanError
from custom.data.scans import Scan, list_scans
from custom.evaluation.scores.case_files import read_case_file, refuse_other_grid
from custom.evaluation.splits.folds import few_shot_order, split_folds
from custom.files import write_text


@dataclass(frozen=True)
class Datalist:
    """What :func:`make_datalist` found: the content of the JSON, and the problems to report."""

    content: dict[str, Any]
    problems: list[str]


def make_datalist(
    source: str | Path,
    beside: Path,
    *,
    classes: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    patient_pattern: str | None = None,
    allow_empty: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Datalist:
    """Pair images with labels, check them, and deal the patients into folds.

    Args:
        source: folder (FLARE22, BTCV, MSD, ``*_seg`` beside its image, ...) or a datalist, see
            ``list_scans``.
        beside: folder the JSON will lie in; paths in it are relative to that.
        classes: names of the label values 1, 2, ...
        folds: number of folds; with 0 no patient gets a fold.
        seed: of the deal and of the few-shot order.
        patient_pattern: regular expression on the path; its first group is the patient.
        allow_empty: accept labels without any organ.
        progress: called with cases done and in all.

    Returns:
        An MSD datalist, ``training`` with ``image``, ``label``, ``patient``, ``fold`` and ``order`` (rank in
        the few-shot order: the n lowest of any training set are its n-patient subset); and every problem by
        file name.

    Raises:
        ValueError: for a source without pairs, or folds that cannot be dealt.
    """
    scans = list_scans(source, patient_pattern)
    pairs = [scan for scan in scans if scan.label]
    if not pairs:
        raise ScanError(f"{source}: no image has a label (images/ beside labels/, or CASE_seg beside CASE).")
    problems = [f"{scan.image}: has no label." for scan in scans if not scan.label]
    for done, scan in enumerate(pairs, 1):
        problems += _faults(scan, len(classes), allow_empty)
        progress(done, len(pairs))
    records = [
        {
            "image": _relative(scan.image, beside),
            "label": _relative(scan.label or scan.image, beside),
            "patient": patient,
        }
        for scan, patient in zip(pairs, _patients(pairs), strict=True)
    ]
    return Datalist(_dealt(records, classes, folds, seed), problems)


def write_datalist(path: str | Path, content: dict[str, Any]) -> None:
    """Write the JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def case_name(path: str | Path) -> str:
    """The case of an image or label in the published layouts, as in ``train.yaml`` of the segmentation bundles.

    ``FLARE22_Tr_0001_0000.nii.gz`` is FLARE22_Tr_0001, ``img0001.nii.gz`` and ``label0001.nii.gz`` are 0001.
    """
    return re.sub(r"^(img|label)(?=[0-9])|(_avg)?(_seg)?(_0000)?[.]nii([.]gz)?$", "", Path(path).name)


def _dealt(records: list[dict[str, Any]], classes: Sequence[str], folds: int, seed: int) -> dict[str, Any]:
    order = {patient: rank for rank, patient in enumerate(few_shot_order(records, seed))}
    dealt = split_folds(records, folds, seed) if folds else []
    home = {record["patient"]: {"fold": number} for number, fold in enumerate(dealt) for record in fold}
    training = [r | {"order": order[r["patient"]]} | home.get(r["patient"], {}) for r in records]
    return {
        "labels": {"0": "background", **{str(value): name for value, name in enumerate(classes, 1)}},
        "modality": {"0": "CT"},
        "folds": folds,
        "seed": seed,
        "numTraining": len(training),
        "training": training,
    }


def _patients(scans: Sequence[Scan]) -> list[str]:
    """The patient of each scan; its case if only file names tell patients apart."""
    cases = [case_name(scan.image) for scan in scans]
    if len(set(cases)) == len(cases) and all(scan.patient == scan.name for scan in scans):
        return cases
    return [scan.patient for scan in scans]


def _faults(scan: Scan, num_classes: int, allow_empty: bool) -> Iterator[str]:
    assert scan.label is not None
    try:
        image, label = read_case_file(scan.image), read_case_file(scan.label)
        refuse_other_grid(label, image)
    except ValueError as error:
        yield str(error)
        return
    if not np.isfinite(image.voxels).all():
        yield f"{scan.image}: holds values that are not numbers."
    elif image.voxels.min() >= 0:
        yield f"{scan.image}: has no value below 0: it is not a CT, or not in Hounsfield units."
    values = np.unique(label.voxels)
    strange = [float(v) for v in values if v not in range(num_classes + 1)][:5]
    if strange:
        yield f"{scan.label}: holds the values {strange}; labels are 0 to {num_classes}."
    elif not values.any() and not allow_empty:
        yield f"{scan.label}: is empty. Leave the case out, or pass --allow_empty."


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
