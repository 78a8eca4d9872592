"""Raw DICOM: headers read without pixels, series sorted into single acquisitions, and one series as a volume."""

from __future__ import annotations

import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from custom.data.reasons import REJECTED, Fault, Reason
from custom.data.scans import ScanError

MIN_SLICES = 16  # ours: fewer make no crop
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_IMPLICIT, _DEFLATED, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_NATIVE = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG)
_PIXELS = (0x7FE0, 0x0010)
_TAGS = {  # the only elements that are read at all
    (0x0002, 0x0010): "syntax",
    (0x0008, 0x0008): "image_type",
    (0x0008, 0x0060): "modality",
    (0x0010, 0x0020): "patient_id",
    (0x0018, 0x1120): "tilt",
    (0x0020, 0x000D): "study",
    (0x0020, 0x000E): "series",
    (0x0020, 0x0012): "acquisition",
    (0x0020, 0x0032): "position",
    (0x0020, 0x0037): "orientation",
    (0x0020, 0x0052): "frame",
    (0x0020, 0x0100): "temporal",
    (0x0028, 0x0002): "samples",
    (0x0028, 0x0008): "frames",
    (0x0028, 0x0010): "rows",
    (0x0028, 0x0011): "columns",
    (0x0028, 0x0030): "spacing",
    (0x0028, 0x0100): "bits",
    (0x0028, 0x1052): "intercept",
    (0x0028, 0x1053): "slope",
}
_WHOLE = ("samples", "rows", "columns", "bits")  # US, two bytes
_NUMBERS = ("position", "orientation", "spacing")  # several decimals
_NUMBER = ("tilt", "intercept", "slope")
_PROJECTIONS = {"MIP", "MINIP", "MNIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "PROJECTION", "VRT", "SSD", "CPR",
                "CURVED", "VOLUME RENDERED", "THICK_MIP", "3D"}  # fmt: skip


@dataclass
class SliceHeader:
    """What of one file decides where it belongs. ``patient_id`` and the UIDs never leave the process as they are."""

    path: Path
    patient_id: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    series: str = field(default="", repr=False)
    frame: str = field(default="", repr=False)
    modality: str = ""
    image_type: tuple[str, ...] = ()
    acquisition: str = ""
    temporal: str = ""
    frames: str = "1"
    rows: int = 0
    columns: int = 0
    samples: int = 1
    bits: int = 16
    position: tuple[float, ...] = ()  # LPS mm
    orientation: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()  # between rows, between columns
    tilt: float = 0.0
    slope: float | None = None
    intercept: float | None = None
    syntax: str = ""
    has_pixels: bool = False


@dataclass
class Series:
    """One acquisition: slices in order, and what is wrong with it."""

    slices: list[SliceHeader]
    reasons: list[Reason] = field(default_factory=list)
    detail: str = ""
    part: int = 0  # of a series that was split, from 1

    @property
    def files(self) -> list[Path]:
        return [one.path for one in self.slices]


# -- one file -------------------------------------------------------------------------------------------


def is_dicom(path: Path) -> bool:
    """Whether a file carries DICOM's mark."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str | Path) -> SliceHeader:
    """The elements we need of one file, pixels untouched.

    Raises:
        Fault: if the file is empty, no DICOM, damaged or truncated (its pixels included).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _parse(path, file)
    except OSError as error:
        raise Fault(Reason.UNREADABLE, type(error).__name__) from error
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise Fault(Reason.BAD_HEADER, type(error).__name__) from error


def _parse(path: Path, file: BinaryIO) -> SliceHeader:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise Fault(Reason.EMPTY_FILE)
    if file.read(132)[128:] != b"DICM":
        file.seek(0)  # old files have no preamble and begin with group 0008
        if file.read(4) not in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00"):
            raise Fault(Reason.NOT_AN_IMAGE, "no DICOM mark")
        file.seek(0)
    found: dict[str, bytes] = {}
    big, implicit, in_meta = False, False, True
    nested: list[bool] = []  # open sequences of undefined length: implicit inside?
    has_pixels = False
    for _ in range(200_000):
        where = file.tell()
        start = file.read(8)
        if not start:
            break
        if len(start) < 8:
            raise Fault(Reason.TRUNCATED, f"at byte {where}")
        if in_meta and start[:2] != b"\x02\x00":
            in_meta = False
            syntax = _text(found.get("syntax", b""))
            if syntax == _DEFLATED:
                raise Fault(Reason.UNSUPPORTED, "deflated")
            big = syntax == _BIG
            implicit = syntax == _IMPLICIT or (not syntax and not start[4:6].isalpha())
        order = ">" if big else "<"
        tag = struct.unpack(order + "HH", start[:4])
        if tag[0] == 0xFFFE:  # items have neither VR nor value of their own
            (length,) = struct.unpack(order + "I", start[4:])
            if tag[1] == 0xE0DD and nested:
                nested.pop()
            elif tag[1] == 0xE000 and length != _UNDEFINED:
                _skip(file, length, size)
            continue
        if nested[-1] if nested else implicit:
            vr, (length,) = b"", struct.unpack(order + "I", start[4:])
        else:
            vr = start[4:6]
            if vr in _LONG_VRS:
                (length,) = struct.unpack(order + "I", file.read(4))
            elif vr.isalpha() and vr.isupper():
                (length,) = struct.unpack(order + "H", start[6:])
            else:
                raise Fault(Reason.BAD_HEADER, f"at byte {where}")
        if tag == _PIXELS and not nested:
            has_pixels = True
            _check_pixels(file, length, size, found, order)
            break
        if length == _UNDEFINED:
            nested.append(vr == b"UN" or (nested[-1] if nested else implicit))
            continue
        name = None if nested else _TAGS.get(tag)
        if name is None or length > 4096:
            _skip(file, length, size)
            continue
        value = file.read(length)
        if len(value) < length:
            raise Fault(Reason.TRUNCATED, f"at byte {where}")
        found[name] = value
    else:
        raise Fault(Reason.BAD_HEADER, "endless")
    if "modality" not in found and "rows" not in found:
        raise Fault(Reason.NO_PIXELS if found else Reason.TRUNCATED, "no image module")
    if "rows" in found and not has_pixels:
        raise Fault(Reason.TRUNCATED, "before the pixels")
    return _slice_header(path, found, ">" if big else "<", has_pixels)


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if length > size - file.tell():
        raise Fault(Reason.TRUNCATED, f"at byte {file.tell()}")
    file.seek(length, os.SEEK_CUR)


def _check_pixels(file: BinaryIO, length: int, size: int, found: dict[str, bytes], order: str) -> None:
    """Are the pixels all there?"""
    if length != _UNDEFINED:
        if length > size - file.tell():
            raise Fault(Reason.TRUNCATED, f"{length} bytes of pixels promised, {size - file.tell()} there")
        rows, columns, bits = (_whole(found.get(name, b""), order) for name in ("rows", "columns", "bits"))
        frames = max(1, int(_text(found.get("frames", b"")) or 1))
        samples = _whole(found.get("samples", b""), order) or 1
        promised = rows * columns * samples * frames * math.ceil(bits / 8)
        if _text(found.get("syntax", b"")) in (*_NATIVE, "") and promised > length:
            reason = Reason.BOMB if promised > 1000 * max(length, 1 << 16) else Reason.TRUNCATED
            raise Fault(reason, f"{promised} bytes of pixels promised, {length} there")
        return
    while True:  # fragments of a compressed picture
        start = file.read(8)
        if len(start) < 8:
            raise Fault(Reason.TRUNCATED, "in the pixels")
        tag, element, part = struct.unpack(order + "HHI", start)
        if (tag, element) == (0xFFFE, 0xE0DD):
            return
        if (tag, element) != (0xFFFE, 0xE000):
            raise Fault(Reason.BAD_HEADER, "in the pixels")
        _skip(file, part, size)


def _text(value: bytes) -> str:
    return value.decode("latin-1").strip(" \0")


def _whole(value: bytes, order: str) -> int:
    return struct.unpack(order + "H", value[:2])[0] if len(value) >= 2 else 0


def _slice_header(path: Path, found: dict[str, bytes], order: str, has_pixels: bool) -> SliceHeader:
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name in _WHOLE:
            values[name] = _whole(value, order)
        elif name == "image_type":
            values[name] = tuple(part.strip().upper() for part in _text(value).split("\\"))
        elif name in _NUMBERS:
            values[name] = tuple(float(part) for part in _text(value).split("\\")) if _text(value) else ()
        elif name in _NUMBER:
            if _text(value):
                values[name] = float(_text(value).split("\\")[0])
        else:
            values[name] = _text(value)
    return SliceHeader(path, has_pixels=has_pixels, **values)


# -- many files -----------------------------------------------------------------------------------------


def sort_series(headers: Iterable[SliceHeader], min_slices: int = MIN_SLICES) -> list[Series]:
    """Slices of one folder as single acquisitions, each with what is wrong with it.

    A series is split where its slices differ in kind, size or direction, and, if its slices are not evenly
    spaced, by acquisition and by time.

    Args:
        headers: of the folder's files, in any order.
        min_slices: fewer are refused.
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
    # some scanners number every slice's acquisition: that tells nothing
    return finer if len(finer) <= max(1, len(slices) // 2) else [slices]


def _by(slices: list[SliceHeader], key: Any) -> list[list[SliceHeader]]:
    groups: dict[Any, list[SliceHeader]] = defaultdict(list)
    for one in slices:
        groups[key(one)].append(one)
    return list(groups.values())


def _is_projection(one: SliceHeader) -> bool:
    return any(part in _PROJECTIONS or part.startswith("MIP") for part in one.image_type)


def _heights(slices: Sequence[SliceHeader]) -> np.ndarray | None:
    """Positions along the slices' normal in mm."""
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
    """What is wrong with sorted positions."""
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
    """Degrees between the stack and the slices' normal; the positions' word counts, not the tag's."""
    if len(slices) < 2:
        return 0.0
    step = np.subtract(slices[-1].position, slices[0].position)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    if not np.any(step):
        return 0.0
    return math.degrees(math.acos(min(1.0, abs(float(step @ normal)) / float(np.linalg.norm(step)))))


# -- a volume -------------------------------------------------------------------------------------------


def read_series(files: Sequence[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """One series as a volume; compressed pixels are decoded by GDCM.

    Args:
        files: the slices of one acquisition, in any order.

    Returns:
        Values (X, Y, Z), HU for CT, int16 if they are whole numbers, else float32; and the voxel-to-world affine
        (4, 4) in RAS mm.

    Raises:
        ScanError: if the files are not slices of one even stack, or one cannot be decoded.
    """
    if not files:
        raise ScanError("No DICOM file was given.")
    folder = Path(files[0]).parent
    try:
        headers = [read_header(file) for file in files]
        found = sort_series(headers, min_slices=2)
        stop = [reason for reason in found[0].reasons if reason.status == REJECTED]
        if len(found) > 1:
            raise Fault(Reason.SPLIT_SERIES, f"{len(found)} acquisitions among {len(files)} files")
        if stop:
            raise Fault(stop[0], found[0].detail)
        return stack(found[0])
    except Fault as error:
        raise ScanError(f"{folder}: {error}") from error


def stack(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """The volume of a series that :func:`sort_series` found no fault with.

    Raises:
        Fault: if a slice cannot be decoded.
    """
    slices = series.slices
    first, last = slices[0], slices[-1]
    volume = np.empty((first.columns, first.rows, len(slices)), np.int16, order="F")
    for z, one in enumerate(slices):
        plane = _decode(one)
        if plane.shape != volume.shape[:2]:
            raise Fault(Reason.BAD_HEADER, f"slice {z} has another size")
        whole = np.rint(plane)
        fits = np.array_equal(whole, plane) and whole.min() >= -32768 and whole.max() <= 32767
        if volume.dtype == np.int16 and not fits:
            volume = volume.astype(np.float32, order="F")
        volume[:, :, z] = plane
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2] = np.subtract(last.position, first.position) / max(1, len(slices) - 1)
    affine[:3, 3] = first.position
    return volume, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM speaks LPS


def _decode(one: SliceHeader) -> np.ndarray:
    import itk  # slow to import, and only needed here

    try:
        reader = itk.ImageFileReader[itk.Image[itk.F, 3]].New()
        reader.SetImageIO(itk.GDCMImageIO.New())
        reader.SetFileName(str(one.path))
        reader.Update()
        plane = itk.array_from_image(reader.GetOutput())
    except (RuntimeError, ValueError) as error:
        raise Fault(Reason.READER_FAILED, "a slice cannot be decoded") from error
    if plane.shape[0] != 1:
        raise Fault(Reason.MULTIFRAME)
    return plane[0].T
