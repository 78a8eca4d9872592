"""Read MetaImage files that may be damaged (https://itk.org/Wiki/ITK/MetaIO/Documentation)."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from custom.data.formats.file_bytes import (
    detached,
    enough_bytes,
    inflate,
    read_exactly,
    text_header,
    voxel_type,
)
from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import Voxels, check_grid, check_shape

_META_TYPES = {
    "i1": ("met_char",),
    "u1": ("met_uchar",),
    "i2": ("met_short",),
    "u2": ("met_ushort",),
    "i4": ("met_int", "met_long"),
    "u4": ("met_uint", "met_ulong"),
    "i8": ("met_long_long",),
    "u8": ("met_ulong_long",),
    "f4": ("met_float",),
    "f8": ("met_double",),
}


def open_metaimage(path: Path, root: Path, most_bytes: int, any_grid: bool) -> Voxels:
    """Voxels of a .mha or .mhd; errors as in :func:`custom.data.formats.open_scan.open_scan`."""
    with open(path, "rb") as file:
        if not re.match(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=", file.read(64)):
            raise Fault(Reason.NOT_AN_IMAGE, "no MetaImage header")
        file.seek(0)
        fields = text_header(file, re.compile(r"^(\w+)\s*=\s*(.*)$"), stop="elementdatafile")
        begin = file.tell()
    shape = tuple(int(n) for n in fields["dimsize"].split())
    if len(shape) != int(fields["ndims"]):
        raise Fault(Reason.BAD_HEADER, "NDims")
    if int(fields.get("elementnumberofchannels", "1")) != 1:
        raise Fault(Reason.COLOUR)
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "false")).lower() == "true"
    dtype = voxel_type(fields["elementtype"].lower(), _META_TYPES, big)
    promised = check_shape(shape, dtype.itemsize, most_bytes)
    affine = _meta_affine(fields)
    where = fields["elementdatafile"]
    if where.upper().startswith("LIST") or "%" in where or fields.get("headersize", "0") not in ("0",):
        raise Fault(Reason.UNSUPPORTED, "data in several files")
    data = detached(path, None if where.upper() == "LOCAL" else where, root)
    packed = fields.get("compresseddata", "false").lower() == "true"
    with open(data, "rb") as file:
        file.seek(begin if data == path else 0)
        stored = data.stat().st_size - file.tell()
        enough_bytes(stored, promised, packed)
        warnings = [] if any_grid else check_grid(affine, shape[:3])
        content = inflate(file, promised) if packed else read_exactly(file, b"", 0, promised)
    raw = np.frombuffer(content, dtype, math.prod(shape)).reshape(shape[:3], order="F")
    return Voxels(raw, affine, warnings=warnings)


def _meta_affine(fields: dict[str, str]) -> np.ndarray:
    spacing = [float(v) for v in fields.get("elementspacing", fields.get("elementsize", "nan")).split()][:3]
    if any(s < 0 for s in spacing):
        raise Fault(Reason.NEGATIVE_SPACING, f"{spacing} mm")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise Fault(Reason.BAD_SPACING)
    matrix = fields.get(
        "transformmatrix", fields.get("rotation", fields.get("orientation", "1 0 0 0 1 0 0 0 1"))
    )
    size = math.isqrt(len(matrix.split()))
    directions = np.array([float(v) for v in matrix.split()]).reshape(size, size)[:3, :3].T
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    origin = fields.get("offset", fields.get("position", fields.get("origin", "0 0 0")))
    affine[:3, 3] = [float(v) for v in origin.split()][:3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
