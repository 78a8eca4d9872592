"""Sort DICOM slices into single acquisitions, and find what is wrong with each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.formats.dicom_header import SliceHeader
from custom.data.formats.reasons import Reason

MIN_SLICES = 16  # too thin for a crop with fewer (ours)
_PROJECTIONS = {"MIP", "MINIP", "MNIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "PROJECTION", "VRT", "SSD", "CPR",
                "CURVED", "VOLUME RENDERED", "THICK_MIP", "3D"}  # fmt: skip


@dataclass
class Series:
    """One acquisition: its slices in order, and what is wrong with it."""

    slices: list[SliceHeader]
    reasons: list[Reason] = field(default_factory=list)
    detail: str = ""
    part: int = 0  # number, from 1, if the series was split

    @property
    def files(self) -> list[Path]:
        return [one.path for one in self.slices]


def sort_series(headers: Iterable[SliceHeader], min_slices: int = MIN_SLICES) -> list[Series]:
    """Sort the slices of one folder into single acquisitions.

    A series is split where its slices differ in kind, size or direction. If its slices are not evenly spaced, it is also
    split by acquisition number and by time.

    Args:
        headers: of the files in a folder, in any order.
        min_slices: a series with fewer slices is refused.
    """
    groups: dict[tuple, list[SliceHeader]] = defaultdict(list)
    for one in headers:
        key = one.series or one.frame or one.study
        groups[(key, one.patient_id, one.modality)].append(one)
    series: list[Series] = []
    for slices in groups.values():
        parts = _split(slices)
        for number, part in enumerate(parts, 1):
            found = _examine_series(part, min_slices)
            if len(parts) > 1:
                found.part = number
                found.reasons.insert(0, Reason.SPLIT_SERIES)
                found.detail = f"{found.detail}; part {number} of {len(parts)}".strip("; ")
            series.append(found)
    return sorted(series, key=lambda one: str(one.slices[0].path))


def _split(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    kinds = _by(
        slices,
        lambda one: (
            one.rows,
            one.columns,
            tuple(round(v, 3) for v in one.orientation),
            tuple(round(v, 4) for v in one.spacing),
            "LOCALIZER" in one.image_type,
            _is_projection(one),
        ),
    )
    parts = []
    for kind in kinds:
        pieces = [kind]
        if not _is_even(kind):
            for attribute in ("acquisition", "temporal"):
                pieces = [finer for piece in pieces for finer in _split_by(piece, attribute)]
        parts += pieces
    return sorted(parts, key=len, reverse=True)


def _split_by(slices: list[SliceHeader], attribute: str) -> list[list[SliceHeader]]:
    finer = [slices] if _is_even(slices) else _by(slices, lambda one: getattr(one, attribute))
    # some scanners give every slice an acquisition number of its own: these are useless
    return finer if len(finer) <= max(1, len(slices) // 2) else [slices]


def _by(slices: list[SliceHeader], key: Any) -> list[list[SliceHeader]]:
    groups: dict[Any, list[SliceHeader]] = defaultdict(list)
    for one in slices:
        groups[key(one)].append(one)
    return list(groups.values())


def _is_projection(one: SliceHeader) -> bool:
    return any(part in _PROJECTIONS or part.startswith("MIP") for part in one.image_type)


def _heights(slices: Sequence[SliceHeader]) -> np.ndarray | None:
    """Positions of the slices along their normal, in mm; None if one does not say where it lies."""
    if any(len(s.position) != 3 or len(s.orientation) != 6 for s in slices):
        return None
    positions = np.array([s.position for s in slices])
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    heights = positions @ normal
    return heights if np.isfinite(heights).all() else None


def _is_even(slices: Sequence[SliceHeader]) -> bool:
    heights = _heights(slices)
    return heights is not None and _gap_fault(np.sort(heights)) is None


def _gap_fault(heights: np.ndarray) -> tuple[Reason, str] | None:
    """What is wrong with the sorted positions of slices."""
    if len(heights) < 2:
        return None
    gaps = np.diff(heights)
    if (gaps < 0.01).any():
        return Reason.DUPLICATE_SLICES, f"{int((gaps < 0.01).sum())} of {len(heights)} slices"
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual) > max(0.05 * usual, 0.02)  # positions are rounded to 0.01 mm at worst (ours)
    if not off.any():
        return None
    several = gaps[off] / usual
    if (np.abs(several - np.rint(several)) < 0.1).all() and (several > 1.5).all():
        return Reason.MISSING_SLICES, f"{int((np.rint(several) - 1).sum())} slices"
    return Reason.UNEVEN_SLICES, f"gaps of {gaps.min():.2f} to {gaps.max():.2f} mm"


def _examine_series(slices: list[SliceHeader], min_slices: int) -> Series:
    first = slices[0]
    slices = sorted(slices, key=lambda one: str(one.path))
    if not all(one.has_pixels for one in slices):
        return Series(slices, [Reason.NO_PIXELS])
    for reason, wrong in (
        (Reason.LOCALIZER, "LOCALIZER" in first.image_type),
        (Reason.PROJECTION, _is_projection(first)),
        (Reason.MULTIFRAME, any(one.frames not in ("", "0", "1") for one in slices)),
        (Reason.COLOUR, any(one.samples != 1 for one in slices)),
        (Reason.BAD_HEADER, first.rows < 1 or first.columns < 1),
        (Reason.ZERO_SLOPE, any(one.slope == 0 or not _finite(one.slope, one.intercept) for one in slices)),
        (Reason.NEGATIVE_SPACING, any(v < 0 for v in first.spacing)),
        (Reason.BAD_SPACING, len(first.spacing) != 2 or not all(0.02 <= v <= 50 for v in first.spacing)),
    ):
        if wrong:
            return Series(slices, [reason])
    heights = _heights(slices)
    if heights is None:
        return Series(slices, [Reason.NO_POSITION])
    slices = [slices[i] for i in np.argsort(heights, kind="stable")]
    rows, columns = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if abs(rows @ columns) > 0.01 or not np.allclose([rows @ rows, columns @ columns], 1, atol=0.02):
        return Series(slices, [Reason.SHEARED_AFFINE])
    if abs(np.cross(rows, columns)[2]) < 0.8:  # more than 37 degrees from axial (ours)
        return Series(slices, [Reason.NOT_AXIAL])
    found = Series(slices)
    fault = _gap_fault(np.sort(heights))
    if fault:
        found.reasons.append(fault[0])
        found.detail = fault[1]
    if len(slices) < min_slices:
        found.reasons.append(Reason.FEW_SLICES)
        found.detail = f"{found.detail}; {len(slices)} slices, {min_slices} wanted".strip("; ")
    tilt = _tilt(slices)
    if tilt > 0.5:
        found.reasons.append(Reason.GANTRY_TILT)
        found.detail = f"{found.detail}; {tilt:.1f} degrees".strip("; ")
    return found


def _finite(*values: float | None) -> bool:
    return all(value is None or math.isfinite(value) for value in values)


def _tilt(slices: Sequence[SliceHeader]) -> float:
    """Degrees between the stack and the normal of its slices. Taken from the positions, not from the tag."""
    if len(slices) < 2:
        return 0.0
    step = np.subtract(slices[-1].position, slices[0].position)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    if not np.any(step):
        return 0.0
    return math.degrees(math.acos(min(1.0, abs(float(step @ normal)) / float(np.linalg.norm(step)))))
