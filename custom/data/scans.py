"""A list of scans from a folder or a datalist, and one scan read and checked."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from custom.data.errors import ScanError
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import Fault, Reason

logger = logging.getLogger(__name__)

NO_AIR_HU = -200  # the least value of a scan that shows no air (ours)
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_LABEL_NAME = re.compile(r"(^|[_\-. ])(labels?|seg|segmentation|mask)$|^label\d+$", re.IGNORECASE)
_LABEL_FOLDER = re.compile(r"^(labels?|masks?|seg(mentation)?s?)(tr|ts|va)?$", re.IGNORECASE)
_IMAGE_TAIL = re.compile(r"([_\-](ct|image|img|\d{4}))$", re.IGNORECASE)
# TCGA patient barcodes (GDC's naming): several scans of one patient carry the same first three fields
_TCGA = re.compile(r"TCGA-\w{2}-\w{4}", re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """One scan of a datalist."""

    name: str  # unique in its list, fit for a file name
    image: Path
    patient: str
    label: Path | None = None
    extra: dict = field(default_factory=dict, compare=False)


def list_scans(source: str | Path, patient_pattern: str | None = None) -> list[Scan]:
    """Scans of a folder (searched recursively) or of a datalist JSON, in a fixed order.

    A file is taken for a label, and paired with its image, if its name ends in ``_label``, ``_seg``, ``_mask``
    or its folder is called ``labels``, ``labelsTr`` and the like. A datalist is MONAI's or the MSD's: a list of
    ``{"image": ..., "label": ..., "patient": ...}`` (or paths), or an object with such lists under ``training``
    or other keys; paths are relative to the JSON.

    Args:
        source: folder or JSON.
        patient_pattern: regular expression found in an image's path; its first group (or the whole match)
            is the patient. None takes TCGA barcodes where there are any; else the folder, if file names repeat
            from folder to folder; else one patient per scan.

    Raises:
        ScanError: for a missing, empty or unreadable source, or a file listed twice.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        records = _folder_records(source)
        if not records:
            raise ScanError(
                f"{source}: no scan found ({', '.join(IMAGE_SUFFIXES)}). Point dataset_dir at your scans."
            )
    elif source.is_file():
        records = _datalist_records(source)
        if not records:
            raise ScanError(f"{source}: the datalist names no image.")
    else:
        raise ScanError(
            f"{source}: no such folder or datalist. Set dataset_dir to a folder of scans or a JSON."
        )
    return _to_scans(source, records, patient_pattern)


def _folder_records(folder: Path) -> list[dict]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(IMAGE_SUFFIXES))
    labels = {_pair_key(p): p for p in files if _is_label(p)}
    records = []
    for image in (p for p in files if not _is_label(p)):
        # a case number may look like nnU-Net's channel number: the whole name first, then without its tail
        whole, cut = _pair_key(image), _pair_key(image, cut_tail=True)
        records.append({"image": image, "label": labels.pop(whole, None) or labels.pop(cut, None)})
    if labels:
        listed = ", ".join(str(p.relative_to(folder)) for p in list(labels.values())[:3])
        logger.warning("%s: %d label file(s) pair with no image, %s ...", folder, len(labels), listed)
    return records


def _is_label(path: Path) -> bool:
    return bool(_LABEL_NAME.search(stem(path)) or _LABEL_FOLDER.match(path.parent.name))


def _pair_key(path: Path, cut_tail: bool = False) -> tuple[str, str]:
    """What an image and its label share: the case's name, and the folder above ``images``/``labels``."""
    name = re.sub(r"[_\-. ]?(labels?|seg|segmentation|mask)$", "", stem(path), flags=re.IGNORECASE)
    name = re.sub(r"^(label|img|image)(?=\d)", "", name, flags=re.IGNORECASE)
    name = _IMAGE_TAIL.sub("", name) if cut_tail else name
    sub = re.match(
        r"^(images?|labels?|masks?|segs?|segmentations?)(tr|ts|va)?$", path.parent.name, re.IGNORECASE
    )
    folder = path.parent.parent if sub else path.parent
    return str(folder), name.lower()


def _datalist_records(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScanError(
            f"{path}: no readable JSON ({error}). A datalist is a JSON list of images."
        ) from error
    groups = [content] if isinstance(content, list) else [v for v in content.values() if isinstance(v, list)]
    records = []
    for entry in (e for group in groups for e in group):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            continue
        record = dict(entry)
        for key in ("image", "label"):
            if isinstance(record.get(key), str):
                record[key] = path.parent / record[key]
        records.append(record)
    return records


def _to_scans(source: Path, records: Iterable[dict], pattern: str | None) -> list[Scan]:
    try:
        compiled = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ScanError(f"patient_pattern {pattern!r} is no regular expression: {error}.") from error
    scans: list[Scan] = []
    seen: dict[Path, str] = {}
    names: set[str] = set()
    records = list(records)
    stems = [stem(Path(record["image"])) for record in records]
    repeated = source.is_dir() and len(set(stems)) < len(stems)
    for record in records:
        image = Path(record["image"])
        if (real := image.resolve()) in seen:
            raise ScanError(f"{image}: listed twice (also as {seen[real]}). Remove one from {source}.")
        seen[real] = str(image)
        relative = image.relative_to(source) if source.is_dir() else image
        short = stem(image)
        name = short if short not in names else re.sub(r"[^\w.\-]+", "_", str(relative.with_name(short)))
        while name in names:
            name += "_"
        names.add(name)
        # one folder a patient, where names repeat from folder to folder; else one scan a patient
        alone = relative.parent.as_posix() if repeated and relative.parent.name else short
        patient = record.get("patient") or _patient_of(str(relative), alone, compiled)
        label = record.get("label")
        extra = {k: v for k, v in record.items() if k not in ("image", "label", "patient")}
        scans.append(Scan(name, image, str(patient), Path(label) if label else None, extra))
    return scans


def _patient_of(path: str, short: str, pattern: re.Pattern | None) -> str:
    found = (pattern or _TCGA).search(path)
    if found is None:
        return short
    return found.group(1) if found.groups() else found.group(0)


def stem(path: Path) -> str:
    """A scan's file name without its suffix, ``.nii.gz`` counted as one."""
    for suffix in IMAGE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_volume(path: Path, any_grid: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a scan, whatever is wrong with the file said in one line.

    Args:
        path: NIfTI, NRRD or MetaImage; read as ``alice scan`` reads it, checksums and promised sizes included.
        any_grid: see :func:`custom.data.formats.open_scan.open_scan`.

    Returns:
        Array (X, Y, Z) as stored (float32, if the header scales), and the voxel-to-world affine (4, 4) in RAS mm.

    Raises:
        ScanError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError(f"{path}: no such file.")
    try:
        voxels = open_scan(path, any_grid=any_grid)
    except Fault as fault:
        raise ScanError(f"{path}: {_plainly(fault)}") from fault
    volume, affine = voxels.scaled(voxels.raw), voxels.affine
    if min(volume.shape) < 2:
        raise ScanError(
            f"{path}: has shape {volume.shape}; a volume needs at least 2 slices along every axis."
        )
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(f"{path}: its affine cannot be inverted. Convert the scan again from its source.")
    return volume.astype(volume.dtype.newbyteorder("="), copy=False), affine


def _plainly(fault: Fault) -> str:
    """A reason as the end of an error's line."""
    if fault.reason is Reason.EMPTY_FILE:
        return "the file is empty (0 bytes). Copy it again."
    if fault.reason in (Reason.TRUNCATED, Reason.BAD_CHECKSUM):
        return f"truncated or damaged ({fault.detail or fault.reason.value}). Copy it again."
    if fault.reason in (Reason.TWO_D, Reason.FOUR_D) or (fault.reason is Reason.COLOUR and fault.detail):
        shape = fault.detail.replace("[", "(").replace("]", ")")
        return f"has {shape}; a 3D volume is wanted. Split it, or leave it out."
    if fault.reason is Reason.SINGULAR_AFFINE:
        return "its affine cannot be inverted. Convert the scan again from its source."
    return f"not a readable image ({fault.reason.value}). {fault}"


def check_hu(path: Path, volume: np.ndarray) -> np.ndarray:
    """CT values as int16 HU, clipped to [-1024, 3071].

    Raises:
        ScanError: for NaN or infinite voxels, an empty scan, or values that cannot be Hounsfield units.
    """
    if np.issubdtype(volume.dtype, np.floating):
        bad = int(volume.size - np.isfinite(volume).sum())
        if bad:
            raise ScanError(f"{path}: {bad} voxels are NaN or infinite. Repair the scan or leave it out.")
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise ScanError(f"{path}: every voxel is {low:g}. The scan is empty.")
    refuse_hu(path, low, high)
    return np.clip(np.rint(volume), -1024, 3071).astype(np.int16)


def refuse_hu(path: Path, low: float, high: float) -> None:
    """Refuse values from ``low`` to ``high`` that cannot be Hounsfield units.

    Raises:
        ScanError: naming the file and the values.
    """
    if high < -500:
        raise ScanError(f"{path}: all air (largest value {high:g} HU). Leave it out.")
    if low > NO_AIR_HU:
        raise ScanError(
            f"{path}: values run from {low:g} to {high:g}, without air: these are no Hounsfield units "
            "(MR, or CT without its intercept?). Convert it to HU, give its profile (mr), or leave it out."
        )
