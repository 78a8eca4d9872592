"""One scan examined: what it holds, its two hashes, and what is wrong with it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from custom.data.body import body_mask
from custom.data.dicom import MIN_SLICES, Series, SliceHeader, is_dicom, read_header, sort_series, stack
from custom.data.intake import MOST_BYTES, Voxels, check_grid, open_scan
from custom.data.reasons import REJECTED, Fault, Reason, status_of

PROFILES = {
    "ct": ("CT",),
    "mr": ("MR",),
    "zscore": ("CT", "MR", "PT"),
}  # intensity profile -> modalities it takes
HISTOGRAM_HU = (-1024, 3072, 64)  # first and last edge, bins
_CELLS, _SOFT_HU = 8, (-300, 200)  # of the body hash: cells along each axis, and what is told apart (ours)
_FEW_VALUES = 1_000_000  # voxels that statistics are taken from
_NOBODY = re.compile(r"^(|anon.*|unknown|none|n/?a|[0x\-]+|patient)$", re.IGNORECASE)  # ids that name no one
_MR_NAME = re.compile(r"(^|[_\-. /])(mri?|t1w?|t2w?|flair|dwi|adc|lge)([_\-. /]|$)", re.IGNORECASE)


@dataclass
class ScanRecord:
    """What a manifest says of one scan, label or refused file. Paths are relative to the scanned folder."""

    path: str  # the file, or the folder of a DICOM series
    format: str  # nifti, nrrd, metaimage, dicom, or other
    kind: str  # image, label, or other (what is no volume)
    id: str = ""
    patient: str = ""  # salted hash, unless asked otherwise
    files: list[str] = field(default_factory=list)  # a DICOM series' slices, in order
    modality: str = ""
    profile: str = ""  # intensity profile that fits: ct, mr, zscore
    shape: list[int] = field(default_factory=list)
    spacing_mm: list[float] = field(default_factory=list)
    orientation: str = ""  # of the axes as stored, such as LPS
    affine: list[list[float]] = field(default_factory=list)  # voxel to world, RAS mm
    values: dict[str, float] = field(default_factory=dict)  # min, max, mean, std, p01, p50, p99 of a sample
    histogram: list[float] = field(default_factory=list)  # shares in HISTOGRAM_HU's bins, of CT
    padding: float | None = None  # the value outside the reconstruction
    body_mm: list[float] = field(default_factory=list)  # extent of the body along R, A, S
    content_hash: str = ""  # of the values turned to RAS: equal across formats
    body_hash: str = ""  # of the body's coarse look: close across resampling
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    label: str | None = None
    duplicate_of: str | None = None  # the id of the scan that it repeats
    leaks: list[str] = field(default_factory=list)  # "list: id" of scans elsewhere that it repeats
    bytes: int = 0
    source_key: str = ""  # of path, size and time of what it was read from

    @property
    def usable(self) -> bool:
        """An image that was accepted, with a warning or without."""
        return self.kind == "image" and self.status != REJECTED

    def add(self, reason: Reason, detail: str = "") -> None:
        """Give a reason, once, and let it act on the status."""
        if reason.value not in self.reasons:
            self.reasons.append(reason.value)
            self.detail = "; ".join(part for part in (self.detail, detail) if part)
        self.status = status_of(Reason(code) for code in self.reasons)


@dataclass(frozen=True)
class Rules:
    """What decides how a scan is examined; records made by other rules are not reused."""

    profile: str = "ct"
    min_slices: int = MIN_SLICES
    most_bytes: int = MOST_BYTES
    salt: str = field(default="", repr=False)
    hash_ids: bool = True
    patient_pattern: str = ""

    def hidden(self, identity: str, prefix: str) -> str:
        """A salted hash of what could identify a patient."""
        if not self.hash_ids:
            return identity
        key = self.salt.encode()[:64]
        digest = hashlib.blake2b(
            identity.strip().upper().encode("utf-8", "surrogatepass"), digest_size=8, key=key
        )
        return f"{prefix}-{digest.hexdigest()}"


@dataclass(frozen=True)
class Job:
    """Work for one process: a file, a folder's DICOM files, or one series among them."""

    root: Path
    path: str
    kind: str  # file, label, folder, series
    source_key: str
    files: tuple[str, ...] = ()
    series: Series | None = None


def run_job(job: Job, rules: Rules) -> tuple[list[ScanRecord], list[Job]]:
    """Records, and work that turned up; nothing is raised, whatever the files hold."""
    record = ScanRecord(
        job.path, _format_of(job), "label" if job.kind == "label" else "image", files=list(job.files)
    )
    try:
        if job.kind == "folder":
            return _plan_folder(job, rules)
        if job.kind == "series":
            assert job.series is not None
            return [_examine_series(job, job.series, rules)], []
        record.bytes = (job.root / job.path).stat().st_size
        voxels = open_scan(job.root / job.path, job.root, rules.most_bytes)
        _describe(record, voxels, rules)
    except Fault as fault:
        record.add(fault.reason, fault.detail)
    except MemoryError:
        record.add(Reason.BOMB, "out of memory")
    except Exception as error:  # a worker that dies would take the others' results along
        record.add(Reason.READER_FAILED, type(error).__name__)
    record.status = status_of(Reason(code) for code in record.reasons)
    record.source_key = job.source_key
    return [record], []


def _format_of(job: Job) -> str:
    name = job.path.lower()
    if job.kind in ("folder", "series"):
        return "dicom"
    return (
        "nifti"
        if name.endswith((".nii", ".nii.gz"))
        else "nrrd"
        if name.endswith(("rrd", "hdr"))
        else "metaimage"
    )


# -- DICOM ----------------------------------------------------------------------------------------------


def _plan_folder(job: Job, rules: Rules) -> tuple[list[ScanRecord], list[Job]]:
    headers: list[SliceHeader] = []
    faults: dict[Reason, list[tuple[str, str]]] = {}
    for name in job.files:
        path = job.root / name
        try:
            if not path.name.lower().endswith((".dcm", ".dicom", ".ima")) and not is_dicom(path):
                continue
            headers.append(read_header(path))
        except Fault as fault:
            faults.setdefault(fault.reason, []).append((name, fault.detail))
        except OSError as error:
            faults.setdefault(Reason.UNREADABLE, []).append((name, type(error).__name__))
    records = []
    for reason, damaged in faults.items():
        kind = "other" if reason in (Reason.NO_PIXELS, Reason.NOT_AN_IMAGE) else "image"
        record = ScanRecord(
            job.path, "dicom", kind, files=[name for name, _ in damaged], source_key=job.source_key
        )
        record.add(reason, f"{len(damaged)} files; {damaged[0][1]}".strip("; "))
        records.append(record)
    jobs = []
    for series in sort_series(headers, rules.min_slices):
        if any(record.kind == "image" for record in records):
            series.reasons.append(Reason.DAMAGED_SLICES)
        files = tuple(path.relative_to(job.root).as_posix() for path in series.files)
        jobs.append(Job(job.root, job.path, "series", job.source_key, files, series))
    return records, jobs


def _examine_series(job: Job, series: Series, rules: Rules) -> ScanRecord:
    first = series.slices[0]
    record = ScanRecord(job.path, "dicom", "image", files=list(job.files), source_key=job.source_key)
    record.modality = first.modality
    record.detail = series.detail
    for reason in series.reasons:
        record.add(reason)
    identity = first.study if _NOBODY.match(first.patient_id) else first.patient_id
    record.patient = rules.hidden(identity, "p") if identity else ""
    record.shape = [first.columns, first.rows, len(series.slices)]
    try:
        record.bytes = sum((job.root / name).stat().st_size for name in job.files)
        if first.rows * first.columns * 4 * len(series.slices) > rules.most_bytes:
            raise Fault(Reason.BOMB, f"shape {record.shape}")
        if first.modality not in ("CT", "MR", "PT"):
            record.kind = "other"
            raise Fault(Reason.UNSUPPORTED, "not CT, MR or PET")
        if record.status != REJECTED:
            raw, affine = stack(series)
            voxels = Voxels(raw, affine, warnings=check_grid(affine, raw.shape), modality=first.modality)
            _describe(record, voxels, rules)
    except Fault as fault:
        record.add(fault.reason, fault.detail)
    except MemoryError:
        record.add(Reason.BOMB, "out of memory")
    except Exception as error:
        record.add(Reason.READER_FAILED, type(error).__name__)
    record.status = status_of(Reason(code) for code in record.reasons)
    return record


# -- voxels ---------------------------------------------------------------------------------------------


def _describe(record: ScanRecord, voxels: Voxels, rules: Rules) -> None:
    """Fill in what the voxels tell."""
    record.shape = [int(n) for n in voxels.raw.shape]
    record.affine = np.round(voxels.affine, 6).tolist()
    spacing = np.linalg.norm(voxels.affine[:3, :3], axis=0)
    record.spacing_mm = np.round(spacing, 4).tolist()
    record.orientation = "".join(nib.aff2axcodes(voxels.affine))
    for warning in voxels.warnings:
        record.add(warning)
    # as resample.to_ras does; that module brings torch along, which every worker would have to import
    flips = nib.orientations.io_orientation(voxels.affine)
    turned = nib.orientations.apply_orientation(voxels.raw, flips)
    spacing = spacing[np.argsort(flips[:, 0])]
    record.content_hash, low, high, bad = _hash_values(turned, voxels, spacing)
    if bad:
        raise Fault(Reason.NOT_FINITE, f"{bad} voxels")
    if record.kind == "label":
        _check_label(record, voxels, low, high)
        return
    if turned.shape[2] < rules.min_slices:
        record.add(Reason.FEW_SLICES, f"{turned.shape[2]} slices, {rules.min_slices} wanted")
    sample = _sample(turned, voxels)
    record.values = _statistics(sample, low, high)
    if low == high:
        raise Fault(Reason.CONSTANT, f"{low:g}")
    modality, fault = judge_values(sample, voxels, low, high, record.modality, record.path)
    record.modality = modality
    record.profile = next((name for name, kinds in PROFILES.items() if modality in kinds), "")
    if modality == "CT":
        first, last, bins = HISTOGRAM_HU
        counts = np.histogram(np.clip(sample, first, last - 1), bins, (first, last))[0]
        record.histogram = np.round(counts / sample.size, 5).tolist()
    record.padding, share = _padding(turned, voxels, sample, low)
    if fault is None and modality not in PROFILES[rules.profile]:
        fault = Fault(Reason.OTHER_MODALITY, modality)
    if modality == "CT" and record.padding == 0 and low < -200 and share > 0.05:
        record.add(Reason.ZERO_PADDING, f"{share:.0%} of it")
    _fingerprint_body(record, turned, voxels, spacing, sample)
    if fault is None and modality == "CT" and not record.body_hash:
        fault = Fault(Reason.NO_BODY)
    if fault:
        raise fault


def _hash_values(turned: np.ndarray, voxels: Voxels, spacing: np.ndarray) -> tuple[str, float, float, int]:
    """Hash of shape, spacing and values, their range, and how many are not finite: one pass, plane by plane."""
    head = [*turned.shape, *np.round(spacing, 2).tolist()]
    digest = hashlib.sha256(repr(head).encode())
    low, high, bad = np.inf, -np.inf, 0
    for z in range(turned.shape[2]):
        plane = voxels.scaled(np.ascontiguousarray(turned[:, :, z].T)).astype(np.float32)
        finite = np.isfinite(plane)
        if not finite.all():
            bad += int(plane.size - finite.sum())
            continue
        low, high = min(low, float(plane.min())), max(high, float(plane.max()))
        digest.update((np.round(plane, 3) + 0.0).tobytes())  # + 0.0: no negative zeros
    return digest.hexdigest(), low, high, bad


def _sample(turned: np.ndarray, voxels: Voxels) -> np.ndarray:
    step = max(1, round((turned.size / _FEW_VALUES) ** (1 / 3)))
    steps = [step if n > 4 * step else 1 for n in turned.shape]
    return voxels.scaled(turned[tuple(slice(s // 2, None, s) for s in steps)]).astype(np.float32)


def _statistics(sample: np.ndarray, low: float, high: float) -> dict[str, float]:
    p01, p50, p99 = np.percentile(sample, (1, 50, 99))
    found = {"min": low, "max": high, "mean": sample.mean(dtype=float), "std": sample.std(dtype=float)}
    found |= {"p01": p01, "p50": p50, "p99": p99}
    return {name: round(float(value), 3) for name, value in found.items()}


def judge_values(
    sample: np.ndarray, voxels: Voxels, low: float, high: float, modality: str, path: str
) -> tuple[str, Fault | None]:
    """The modality, and what speaks against the values.

    Args:
        sample: of the values.
        voxels: for their stored type.
        low: smallest value of all.
        high: largest value of all.
        modality: as the file tells; "" if it does not, then the values and the name decide.
        path: relative, for names that tell.
    """
    span = f"{low:g} to {high:g}"
    kind = voxels.raw.dtype
    if kind.kind in "iu" and kind.itemsize == 2:
        wrapped = float((sample >= 60000).mean()) if kind.kind == "u" else 0.0
        if wrapped > 0.01 or (modality != "MR" and low < -200 and (low <= -32768 or high >= 32767)):
            return modality or "CT", Fault(Reason.OVERFLOW, span)
    if modality in ("MR", "PT") or (not modality and (low > -200 and _MR_NAME.search(path))):
        return modality or "MR", None
    if low > -200:
        tissue = sample[sample > 300]
        near_water = float(((tissue > 824) & (tissue < 1324)).mean()) if tissue.size else 0.0
        if (
            kind.kind in "iu"
            and np.unique(sample).size <= 150
            and high <= 255
            and (sample == low).mean() > 0.3
        ):
            return modality, Fault(Reason.LOOKS_LIKE_LABEL, span)
        if near_water > 0.6 and low <= 100:
            return "CT", Fault(Reason.NO_INTERCEPT, span)
        if modality == "CT" or high <= 255:  # rescaled to 8 bits or to [0, 1]
            return modality, Fault(Reason.NOT_HU, span)
        return "MR", None
    if low <= -32768 or high >= 32767:
        return "CT", Fault(Reason.OVERFLOW, span)
    if high < -500:
        return "CT", Fault(Reason.ALL_AIR, span)
    return "CT", None


def _padding(
    turned: np.ndarray, voxels: Voxels, sample: np.ndarray, low: float
) -> tuple[float | None, float]:
    """The value that fills the corners of every plane, and its share of the scan."""
    corners = voxels.scaled(turned[:: turned.shape[0] - 1, :: turned.shape[1] - 1, :]).astype(np.float32)
    values, counts = np.unique(corners, return_counts=True)
    best = int(counts.argmax())
    share = float((sample == values[best]).mean())
    if counts[best] < 0.7 * corners.size or share < 0.01:
        return None, 0.0
    return float(values[best]), share


def _check_label(record: ScanRecord, voxels: Voxels, low: float, high: float) -> None:
    whole = voxels.raw.dtype.kind in "iu" and (voxels.slope, voxels.intercept) == (1.0, 0.0)
    if (
        low < 0
        or high > 255
        or not (whole or np.array_equal(voxels.scaled(voxels.raw), np.rint(voxels.scaled(voxels.raw))))
    ):
        raise Fault(Reason.LABEL_VALUES, f"{low:g} to {high:g}")
    record.values = {"min": low, "max": high}


# -- the body's look ------------------------------------------------------------------------------------


def _fingerprint_body(
    record: ScanRecord, turned: np.ndarray, voxels: Voxels, spacing: np.ndarray, sample: np.ndarray
) -> None:
    """Extent of the body, and how it looks from afar."""
    steps = [max(1, min(round(3.0 / s), n // _CELLS)) for s, n in zip(spacing, turned.shape, strict=True)]
    fine = voxels.scaled(turned[tuple(slice(s // 2, None, s) for s in steps)]).astype(np.float32)
    if record.modality != "CT":  # brought to where tissue is brighter than BODY_HU
        fine = fine / max(float(np.percentile(sample, 99)), 1e-6) * 1500 - 700
    fine_mm = spacing * steps
    body, coarse = body_mask(fine, tuple(fine_mm), coarse_mm=min(6.0, float((fine_mm * fine.shape).min())))
    if not body.any():
        return
    cells = np.argwhere(body)
    low = cells.min(axis=0) * coarse
    high = np.minimum((cells.max(axis=0) + 1) * coarse, fine.shape)
    record.body_mm = np.round((high - low) * fine_mm, 1).tolist()
    record.body_hash = body_hash(fine[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])


def body_hash(body: np.ndarray) -> str:
    """Mean soft-tissue values of a body cut into 8 x 8 x 8 cells, a byte each, as base64.

    Args:
        body: HU (X, Y, Z), axes along R, A, S, cut to the body's box.
    """
    grid = np.clip(body, -1000, 400)
    for axis in range(3):
        grid = _means(grid, axis)
    low, high = _SOFT_HU
    grid = (np.clip(grid, low, high) - low) / (high - low) * 255
    return base64.b64encode(np.rint(grid).astype(np.uint8).tobytes()).decode("ascii")


def _means(grid: np.ndarray, axis: int) -> np.ndarray:
    """Averages over ``_CELLS`` equal stretches of an axis, parts of voxels counted as parts."""
    count = grid.shape[axis]
    total = np.concatenate(
        [np.zeros_like(grid.take([0], axis)), grid.cumsum(axis=axis, dtype=np.float64)], axis
    )
    edges = np.linspace(0, count, _CELLS + 1)
    whole = np.minimum(edges.astype(int), count - 1)
    shape = [1, 1, 1]
    shape[axis] = -1
    part = (edges - whole).reshape(shape)
    at_edges = total.take(whole, axis) * (1 - part) + total.take(whole + 1, axis) * part
    return np.diff(at_edges, axis=axis) / (count / _CELLS)


def near_pairs(
    hashes: Sequence[str], others: Sequence[str], most_different: float, block: int = 2048
) -> list[tuple[int, int, float]]:
    """Pairs of body hashes that look alike.

    Args:
        hashes: of some scans, none empty.
        others: of others; may be the same list.
        most_different: 1 - correlation of two hashes.
        block: pairs are compared in blocks of its square.

    Returns:
        (index, index among others, difference), each pair as found.
    """
    found: list[tuple[int, int, float]] = []
    if not hashes or not others:
        return found
    ours, theirs = _looks(hashes), _looks(others)
    for i in range(0, len(hashes), block):
        for j in range(0, len(others), block):
            apart = 1 - ours[i : i + block] @ theirs[j : j + block].T
            found += [
                (i + int(p), j + int(q), float(apart[p, q])) for p, q in np.argwhere(apart <= most_different)
            ]
    return found


def _looks(hashes: Sequence[str]) -> np.ndarray:
    """Hashes as vectors whose products are correlations."""
    grids = np.stack([np.frombuffer(base64.b64decode(text), np.uint8) for text in hashes]).astype(np.float32)
    grids -= grids.mean(axis=1, keepdims=True)
    return grids / np.maximum(np.linalg.norm(grids, axis=1, keepdims=True), 1e-6)
