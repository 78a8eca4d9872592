"""What the voxels of a scan tell: its content hash, its values, its modality, and whether it can be used."""

from __future__ import annotations

import hashlib
import re

import nibabel as nib
import numpy as np

from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import Voxels
from custom.data.grid.orientation import spacing_of, to_ras
from custom.data.intake.fingerprint import fingerprint_body
from custom.data.intake.scan_record import HISTOGRAM_HU, PROFILES, Rules, ScanRecord

_FEW_VALUES = 1_000_000  # about this many voxels are enough for statistics
_MR_NAME = re.compile(r"(^|[_\-. /])(mri?|t1w?|t2w?|flair|dwi|adc|lge)([_\-. /]|$)", re.IGNORECASE)


def describe(record: ScanRecord, voxels: Voxels, rules: Rules) -> None:
    """Fill in the fields of a record that come from the voxels.

    Raises:
        Fault: if the scan cannot be used.
    """
    record.shape = [int(n) for n in voxels.raw.shape]
    record.affine = np.round(voxels.affine, 6).tolist()
    record.spacing_mm = np.round(spacing_of(voxels.affine), 4).tolist()
    record.orientation = "".join(nib.aff2axcodes(voxels.affine))
    for warning in voxels.warnings:
        record.add(warning)
    turned, affine = to_ras(voxels.raw, voxels.affine)
    spacing = spacing_of(affine)
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
    fingerprint_body(record, turned, voxels, spacing, sample)
    if fault is None and modality == "CT" and not record.body_hash:
        fault = Fault(Reason.NO_BODY)
    if fault:
        raise fault


def _hash_values(turned: np.ndarray, voxels: Voxels, spacing: np.ndarray) -> tuple[str, float, float, int]:
    """Hash of shape, spacing and values; lowest and highest value; number of voxels that are not finite."""
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
        digest.update((np.round(plane, 3) + 0.0).tobytes())  # + 0.0 makes negative zeros positive
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
    """The modality, and what is wrong with the values.

    Args:
        sample: some of the values.
        voxels: the scan, for its stored type.
        low: lowest of all values.
        high: highest of all values.
        modality: as the file says; if it is "", the values and the name of the file decide.
        path: of the file, relative to the scanned folder.
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
    """The value that fills the corners of the slices, and its share of the scan; None if there is no such value."""
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
