"""Make a datalist: check pairs of image and label, deal patients into folds, rank them for few-shot subsets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.errors import ScanError
from custom.data.label_names import refuse_other_names
from custom.data.layouts import case_name, is_image_folder
from custom.data.scans import Scan, list_scans
from custom.evaluation.scores.case_files import on_grid_of, read_case_file
from custom.evaluation.splits.folds import few_shot_order, split_folds
from custom.files import write_text


@dataclass(frozen=True)
class Datalist:
    """What :func:`make_datalist` found: the content of the JSON, the problems to report, and the images it left out."""

    content: dict[str, Any]
    problems: list[str]
    left_out: list[Path] = field(default_factory=list)


def make_datalist(
    source: str | Path,
    beside: Path,
    *,
    classes: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    patient_pattern: str | None = None,
    allow_empty: bool = False,
    labelled_only: bool = False,
    leave_out: Sequence[str] = (),
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
        labelled_only: leave out images that have no label.
        leave_out: names of cases to leave out.
        progress: called with cases done and in all.

    Returns:
        An MSD datalist, ``training`` with ``image``, ``label``, ``patient``, ``fold`` and ``order`` (rank in
        the few-shot order: the n lowest of any training set are its n-patient subset); every problem by file name; and
        the images that were left out for want of a label: all, or those of folders such as ``imagesTs``.

    Raises:
        AliceError: for a source without pairs, a case to leave out that is not there, folds that cannot be dealt, or a
            source whose ``dataset.json`` names its label values otherwise.
    """
    scans = _without(list_scans(source, patient_pattern), leave_out, source)
    pairs = [scan for scan in scans if scan.label]
    if not pairs:
        raise ScanError(f"{source}: no image has a label (images/ beside labels/, or CASE_seg beside CASE).")
    refuse_other_names(
        source,
        (scan.image for scan in pairs),
        classes,
        "Give the data's own names, --classes {names}; a bundle reads such a datalist with its setting label_map.",
    )
    labelled = {scan.image.parent for scan in pairs}
    problems, left_out = [], []
    for image in (scan.image for scan in scans if not scan.label):
        if labelled_only or (is_image_folder(image.parent.name) and image.parent not in labelled):
            left_out.append(image)
        else:
            problems.append(f"{image}: has no label. Leave such images out: --labelled_only.")
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
    return Datalist(_dealt(records, classes, folds, seed), problems, left_out)


def write_datalist(path: str | Path, content: dict[str, Any]) -> None:
    """Write the JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def _without(scans: list[Scan], leave_out: Sequence[str], source: str | Path) -> list[Scan]:
    names = [{scan.name, case_name(scan.image)} for scan in scans]
    if strange := [name for name in leave_out if not any(name in known for known in names)]:
        raise ScanError(f"{source}: holds no case {', '.join(strange)} to leave out.")
    return [scan for scan, known in zip(scans, names, strict=True) if not known & set(leave_out)]


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
        on_grid_of(label, image)
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
        yield f"{scan.label}: is empty. Leave the case out (--leave_out), or pass --allow_empty."


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
