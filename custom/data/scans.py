"""List the scans of a folder or datalist; read and check one scan."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from custom.data.errors import ScanError
from custom.data.folder_walk import passed_over, scan_files
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import Fault, Reason
from custom.data.layouts import IMAGE_SUFFIXES, entries_of, pair, path_beside, stem
from custom.errors import shown
from custom.files import is_plain_name, read_json

logger = logging.getLogger(__name__)

NO_AIR_HU = -200  # a scan with no value below this shows no air (ours)
# TCGA patient barcodes: the first three fields name the patient (https://docs.gdc.cancer.gov/Encyclopedia)
TCGA_BARCODE = re.compile(r"TCGA-\w{2}-\w{4}", re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """One scan of a datalist.

    Raises:
        ScanError: if its name cannot be that of a file.
    """

    name: str  # unique in its list, and usable as a file name
    image: Path
    patient: str
    label: Path | None = None
    extra: dict = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not is_plain_name(self.name):
            raise ScanError(
                f"{self.image}: the scan is called {self.name!r}, which cannot name a file. Rename it."
            )


def list_scans(source: str | Path, patient_pattern: str | None = None) -> list[Scan]:
    """Scans of a folder (searched recursively) or of a datalist JSON, in a fixed order.

    Hidden files and ``__MACOSX`` are passed over. DICOM and images of other formats are passed over with a warning.

    A file is a label, and is paired with its image, if its name ends in ``_label``, ``_seg`` or ``_mask``, or if its
    folder is called ``labels``, ``labelsTr`` and the like (:mod:`custom.data.layouts`). A datalist is in MONAI's, the MSD's
    or nnU-Net's format: a list of ``{"image": ..., "label": ..., "patient": ...}`` (or of paths), or an object with such
    lists under ``training`` or other keys. Its paths are relative to the JSON.

    Args:
        source: folder or JSON.
        patient_pattern: regular expression that finds the patient in the path of an image, as its first group or as
            the whole match. None takes TCGA barcodes; else the folder, if several folders have files of the same names;
            else every scan is a patient of its own.

    Raises:
        ScanError: if the source is missing, empty or unreadable, or lists a file twice.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        records, others = _folder_records(source), passed_over(source)
        if not records:
            seen = f" There are {'; '.join(others)}." if others else ""
            raise ScanError(
                f"{source}: no scan found ({', '.join(IMAGE_SUFFIXES)}). Point dataset_dir at your scans.{seen}"
            )
        for sentence in others:
            logger.warning("%s: passed over %s.", shown(source), shown(sentence))
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
    found = pair(scan_files(folder))
    label_of = dict(found.pairs)
    if found.alone:
        listed = ", ".join(shown(p.relative_to(folder)) for p in found.alone[:3])
        logger.warning("%s: %d label file(s) pair with no image, %s ...", folder, len(found.alone), listed)
    for kept, other in found.doubles:
        logger.warning("%s: not read, since %s is a label of the same image.", shown(other), shown(kept))
    images = sorted([*label_of, *found.unlabelled, *found.left_out])
    return [{"image": image, "label": label_of.get(image)} for image in images]


def _datalist_records(path: Path) -> list[dict]:
    content = read_json(path, error=ScanError, advice="A datalist is a JSON list of images.")
    if not isinstance(content, list | dict):
        raise ScanError(f"{path}: holds {str(content)[:20]!r}. A datalist is a JSON list of images.")
    records = entries_of(content)
    if not records and isinstance(content, dict) and "file_ending" in content:  # nnU-Net v2's dataset.json
        return _folder_records(path.parent)
    for record in records:
        for key in ("image", "label"):
            if isinstance(record.get(key), str):
                record[key] = path_beside(path.parent, record[key])
    return records


def _to_scans(source: Path, records: Iterable[dict], pattern: str | None) -> list[Scan]:
    try:
        compiled = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ScanError(f"patient_pattern {pattern!r} is not a regular expression: {error}.") from error
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
        short = stem(image).replace("\\", "_")
        name = short if short not in names else re.sub(r"[^\w.\-]+", "_", str(relative.with_name(short)))
        while name in names:
            name += "_"
        names.add(name)
        # if several folders have files of the same names, each folder is a patient; else each scan is one
        alone = relative.parent.as_posix() if repeated and relative.parent.name else short
        patient = record.get("patient") or _patient_of(str(relative), alone, compiled)
        label = record.get("label")
        extra = {k: v for k, v in record.items() if k not in ("image", "label", "patient")}
        scans.append(Scan(name, image, str(patient), Path(label) if label else None, extra))
    if source.is_dir() and not pattern:
        hint = hint_at_phases((scan.image.relative_to(source).as_posix(), scan.patient) for scan in scans)
        if hint:
            logger.warning("%s: %s", source, hint)
    return scans


def _patient_of(path: str, short: str, pattern: re.Pattern | None) -> str:
    found = (pattern or TCGA_BARCODE).search(path)
    if found is None:
        return short
    return found.group(1) if found.groups() else found.group(0)


def hint_at_phases(images: Iterable[tuple[str, str]]) -> str:
    """A sentence if each folder of a patient's folder counts as a patient, as ``p1/arterial/ct.nii.gz`` beside ``p1/venous``.

    Args:
        images: relative path and patient of each image.
    """
    below: dict[str, dict[str, set[str]]] = {}
    for path, patient in images:
        *above, folder, _ = ["", "", *Path(path).parts]
        if parent := "/".join(above).strip("/"):
            below.setdefault(parent, {}).setdefault(folder, set()).add(patient)
    split = {
        parent: sorted(folders)
        for parent, folders in below.items()
        if len(folders) > 1
        and len(set.union(*folders.values())) == sum(map(len, folders.values())) == len(folders)
    }
    names = [name for folders in split.values() for name in folders]
    if len(split) < 2 or len(set(names)) == len(names):
        return ""
    parent, folders = next(iter(sorted(split.items())))
    pattern = "/".join(["[^/]+"] * len(Path(parent).parts))
    return (
        f"{len(names)} folders below {len(split)} others, such as {parent}/{folders[0]} and {parent}/{folders[1]}, are taken "
        f"for a patient each. If {parent} is one patient, say so: --patient_pattern '^({pattern})/'"
    )


def read_volume(path: Path, any_grid: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a scan.

    Args:
        path: NIfTI, NRRD or MetaImage. Checksums and sizes are checked, as ``alice scan`` does.
        any_grid: see :func:`custom.data.formats.open_scan.open_scan`.

    Returns:
        Array (X, Y, Z) as stored (float32 if the header scales it), and the affine (4, 4), voxel to RAS mm.

    Raises:
        ScanError: naming the file and what is wrong with it, in one line.
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
    """What is wrong with a file, and the way out, to follow its name."""
    if fault.reason is Reason.EMPTY_FILE:
        return "the file is empty (0 bytes). Copy it again."
    if fault.reason in (Reason.TRUNCATED, Reason.BAD_CHECKSUM):
        return f"truncated or damaged ({fault.detail or fault.reason.value}). Copy it again."
    if fault.reason in (Reason.TWO_D, Reason.FOUR_D) or (fault.reason is Reason.COLOUR and fault.detail):
        shape = fault.detail.replace("[", "(").replace("]", ")")
        return f"has {shape}; a 3D volume is needed. Split it, or leave it out."
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
            f"{path}: values run from {low:g} to {high:g}, without air: these are not Hounsfield units "
            "(MR, or CT without its intercept?). Convert it to HU, give its profile (mr), or leave it out."
        )
