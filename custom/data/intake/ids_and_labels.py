"""Give every scan its id and patient, and every image its label."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from custom.data.formats.reasons import REJECTED, Reason
from custom.data.grid.orientation import is_same_grid
from custom.data.intake.scan_record import Rules, ScanRecord
from custom.data.layouts import pair, stem
from custom.data.scans import TCGA_BARCODE

_PLAIN_NAME = re.compile(
    r"^(ct|mr|mri|pet|image|imaging|img|scan|volume|vol|data|t[12]w?|flair|dwi|adc)([_\-. ]?\d{0,4})$",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")  # BIDS


def name_all(records: list[ScanRecord], rules: Rules, pattern: re.Pattern | None) -> None:
    """Set ids and patients. A patient named by a DICOM tag stays, unless a pattern was given that finds another."""
    taken: dict[str, ScanRecord] = {}
    folders: dict[str, set[Path]] = {}
    for record in records:
        folders.setdefault(stem(Path(record.path)), set()).add(Path(record.path).parent)
    repeated = {name for name, where in folders.items() if len(where) > 1}
    for record in sorted(records, key=lambda one: (one.path, one.files[:1], one.format)):
        name = _identity(record)
        named = record.format == "dicom" and record.patient  # by a DICOM tag
        if not named or (pattern and pattern.search(record.path)):
            record.patient = rules.hidden(_patient(record, pattern, repeated), "p")
        plain = rules.hidden(name, "s") if rules.hash_ids else re.sub(r"[^\w.\-]+", "_", name)
        record.id, number = plain, 1
        while record.id in taken:
            number += 1
            record.id = f"{plain}-{number}"
        if number > 1 and record.kind != "other" and record.kind == taken[plain].kind:
            for one in (record, taken[plain]):
                one.add(Reason.DUPLICATE_ID)
        taken[record.id] = record


def _identity(record: ScanRecord) -> str:
    """The relative path without suffix; for a DICOM series: its folder and the name of its first slice."""
    if record.kind == "other":
        return record.path
    if record.format == "dicom":
        return f"{record.path}/{Path(record.files[0]).name}" if record.files else record.path
    path = Path(record.path)
    return path.with_name(stem(path)).as_posix()


def _patient(record: ScanRecord, pattern: re.Pattern | None, repeated: set[str]) -> str:
    """The patient of a scan. ``repeated`` are the file names that occur in several folders."""
    found = (pattern.search(record.path) if pattern else None) or TCGA_BARCODE.search(record.path)
    found = found or _SUBJECT.search(record.path)
    if found:
        return found.group(1) if found.groups() else found.group(0)
    path = Path(record.path)
    if record.format == "dicom":
        return record.path
    name = re.sub(
        r"([_\-. ](ct|mri?|image|img|labels?|seg|segmentation|mask))+$", "", stem(path), flags=re.IGNORECASE
    )
    # nnU-Net's channel number follows the number of the case: it is in liver_12_0000, but not in amos_0012
    name = re.sub(r"(?<=\d)_\d{4}$", "", name)
    plain = _PLAIN_NAME.match(name)
    numbered = plain is not None and any(c.isdigit() for c in name) and stem(path) not in repeated
    return path.parent.as_posix() if plain and not numbered and path.parent.name else name


def pair_labels(records: list[ScanRecord]) -> None:
    """Join labels to images as ``list_scans`` does (:func:`custom.data.layouts.pair`)."""
    by_path = {
        Path(record.path): record
        for record in sorted(records, key=lambda record: record.path)
        if record.kind in ("image", "label") and record.format != "dicom"
    }
    found = pair(list(by_path))
    for image, label in found.pairs:
        _join(by_path[image], by_path[label])
    for label in (*found.alone, *(other for _, other in found.doubles)):
        by_path[label].add(Reason.ORPHAN_LABEL)


def _join(image: ScanRecord, label: ScanRecord) -> None:
    """Give an image its label, if their grids are the same."""
    label.patient = image.patient
    if image.status == REJECTED or not image.affine:
        return
    same = label.status == REJECTED or is_same_grid(
        label.shape, np.array(label.affine), image.shape, np.array(image.affine)
    )
    if not same:
        label.add(Reason.LABEL_MISMATCH, f"{label.shape} for {image.shape}")
    if label.status == REJECTED:
        image.add(Reason.LABEL_UNUSABLE)
    else:
        image.label = label.path
