"""Read the header of one DICOM file that may be damaged, without its pixels.

Written by hand, because pydicom accepts some damaged files that this reader refuses.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from custom.data.formats.reasons import Fault, Reason

_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_IMPLICIT, _DEFLATED, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_NATIVE = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG)
_PIXELS = (0x7FE0, 0x0010)
_TAGS = {  # only these elements are read
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


@dataclass
class SliceHeader:
    """The header of one file, as far as sorting needs it. ``patient_id`` and the UIDs are hashed before they leave the process."""

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


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM mark after its preamble."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str | Path) -> SliceHeader:
    """The elements of one file that we need; pixels are not read.

    Raises:
        Fault: if the file is empty, not DICOM, damaged, or truncated (also in the pixels).
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
    """Refuse a file that does not hold all of its pixels."""
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
    while True:  # the pieces of a compressed picture
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
