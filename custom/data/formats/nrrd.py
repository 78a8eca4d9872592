"""Read NRRD files that may be damaged (https://teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import bz2
import gzip
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.formats.file_bytes import (
    BZIP2_RATIO,
    DEFLATE_RATIO,
    LONGEST_HEADER,
    detached,
    enough_bytes,
    read_exactly,
    text_header,
    voxel_type,
)
from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import Voxels, check_grid, check_shape

_NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_NRRD_SPACES = {  # to RAS
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}


def open_nrrd(path: Path, root: Path, most_bytes: int, any_grid: bool) -> Voxels:
    """Voxels of a .nrrd or .nhdr; errors as in :func:`custom.data.formats.open_scan.open_scan`."""
    with open(path, "rb") as file:
        if file.read(4) != b"NRRD":
            raise Fault(Reason.NOT_AN_IMAGE, "no NRRD header")
        file.readline(LONGEST_HEADER)
        fields = text_header(file, re.compile(r"^([^:=]+):=?\s*(.*)$"), stop="")
        begin = file.tell()
    shape = tuple(int(n) for n in fields["sizes"].split())
    if len(shape) != int(fields["dimension"]):
        raise Fault(Reason.BAD_HEADER, "dimension")
    kinds = fields.get("kinds", "").lower().split()
    if any(kind not in ("domain", "space", "time", "???", "none", "list") for kind in kinds):
        raise Fault(Reason.COLOUR, f"shape {list(shape)}")
    dtype = voxel_type(fields["type"].lower(), _NRRD_TYPES, fields.get("endian", "little").lower() == "big")
    promised = check_shape(shape, dtype.itemsize, most_bytes)
    affine, warnings = _nrrd_affine(fields)
    data = detached(path, fields.get("data file") or fields.get("datafile"), root)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz", "bzip2", "bz2"):
        raise Fault(Reason.UNSUPPORTED, "encoding")
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if skip or int(fields.get("line skip", fields.get("lineskip", "0"))):
        raise Fault(Reason.UNSUPPORTED, "skipped bytes")
    with open(data, "rb") as file:
        file.seek(begin if data == path else 0)
        stored = data.stat().st_size - file.tell()
        ratio = BZIP2_RATIO if encoding[0] == "b" else DEFLATE_RATIO
        enough_bytes(stored, promised, packed=encoding != "raw", ratio=ratio)
        warnings += [] if any_grid else check_grid(affine, shape[:3])
        stream: Any = file
        if encoding[0] == "g":
            stream = gzip.GzipFile(fileobj=file)
        elif encoding[0] == "b":
            stream = bz2.BZ2File(file)
        content = read_exactly(stream, b"", 0, promised)
    raw = np.frombuffer(content, dtype, math.prod(shape)).reshape(shape[:3], order="F")
    return Voxels(raw, affine, warnings=warnings)


def _nrrd_affine(fields: dict[str, str]) -> tuple[np.ndarray, list[Reason]]:
    affine = np.eye(4)
    if "space directions" in fields:
        vectors = re.findall(r"\(([^)]*)\)", fields["space directions"])
        affine[:3, :3] = np.array([[float(v) for v in vector.split(",")] for vector in vectors]).T
        space = _NRRD_SPACES.get(fields.get("space", "").lower())
    else:
        spacing = [float(v) for v in fields.get("spacings", "nan nan nan").split()]
        if any(s < 0 for s in spacing):
            raise Fault(Reason.NEGATIVE_SPACING, f"{spacing} mm")
        if not all(math.isfinite(s) and s > 0 for s in spacing):
            raise Fault(Reason.BAD_SPACING)
        affine[:3, :3] = np.diag(spacing)
        space = None
    origin = fields.get("space origin")
    if origin:
        affine[:3, 3] = [float(v) for v in origin.strip("() ").split(",")]
    signs = (-1, -1, 1) if space is None else space  # ITK treats an unnamed space as LPS
    return np.diag([*signs, 1.0]) @ affine, [] if space is not None else [Reason.NO_ORIENTATION]
