"""One NIfTI, NRRD or MetaImage file opened with suspicion: sizes are checked before anything is allocated."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from custom.data.reasons import Fault, Reason

MOST_BYTES = 4_000_000_000  # of voxels in one scan: 512 x 512 x 7600 in int16 (ours)
_DEFLATE_RATIO = 1032  # zlib cannot compress better than this (zlib's technical notes)
_LONGEST_HEADER = 1 << 20
_TAIL_BYTES = 1 << 20  # after the voxels, read only to reach the checksum


@dataclass
class Voxels:
    """A scan as its file stores it: ``raw * slope + intercept`` are the values."""

    raw: np.ndarray  # (X, Y, Z)
    affine: np.ndarray  # voxel to world, RAS mm
    slope: float = 1.0
    intercept: float = 0.0
    warnings: list[Reason] = field(default_factory=list)
    modality: str = ""  # where the file says so

    def scaled(self, part: np.ndarray) -> np.ndarray:
        """Values of a part of ``raw``."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return part
        return part * np.float32(self.slope) + np.float32(self.intercept)


def open_scan(path: Path, root: Path | None = None, most_bytes: int = MOST_BYTES) -> Voxels:
    """Read and check one file.

    Args:
        path: NIfTI, NRRD or MetaImage, told by its suffix.
        root: detached data (.nhdr, .mhd) must lie in it; the file's own folder by default.
        most_bytes: voxel data above this are refused unread.

    Raises:
        Fault: with the reason; whatever the file holds, no other error is meant to come out.
    """
    name = path.name.lower()
    try:
        if path.stat().st_size == 0:
            raise Fault(Reason.EMPTY_FILE)
        if name.endswith((".nii", ".nii.gz")):
            return _open_nifti(path, most_bytes)
        parse = _open_nrrd if name.endswith((".nrrd", ".nhdr")) else _open_metaimage
        return parse(path, root or path.parent, most_bytes)
    except OSError as error:
        raise Fault(Reason.UNREADABLE, type(error).__name__) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Fault(Reason.BAD_HEADER, type(error).__name__) from error


def check_grid(affine: np.ndarray, shape: Sequence[int]) -> list[Reason]:
    """Refuse grids that are no volume in space.

    Returns:
        What to warn of.

    Raises:
        Fault: for a flat, singular, sheared or non-axial grid, or an implausible voxel size.
    """
    if min(shape) < 2:
        raise Fault(Reason.ONE_SLICE, f"{list(shape)}")
    if not np.isfinite(affine).all():
        raise Fault(Reason.SINGULAR_AFFINE, "not finite")
    axes = affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if (spacing == 0).any() or abs(np.linalg.det(axes)) < 1e-6 * math.prod(spacing):
        raise Fault(Reason.SINGULAR_AFFINE)
    if spacing.min() < 0.02 or spacing.max() > 50:  # micro-CT to the thickest slices (ours)
        raise Fault(Reason.BAD_SPACING, f"{np.round(spacing, 4).tolist()} mm")
    extent = np.sort(spacing * shape)
    if extent[0] < 2 or extent[1] < 20 or extent[2] > 4000:  # mm; no slab of a patient (ours)
        raise Fault(Reason.BAD_SPACING, f"{np.round(extent, 1).tolist()} mm in all")
    directions = axes / spacing
    slant = np.abs(directions.T @ directions - np.eye(3)).max()
    if slant > 0.01:  # cosine, about 0.6 degrees (ours); rounded headers stay below 0.001
        raise Fault(Reason.SHEARED_AFFINE, f"{math.degrees(math.asin(min(1.0, slant))):.1f} degrees")
    thick = int(np.argmax(spacing))
    if spacing[thick] > 2 * np.sort(spacing)[1] and np.argmax(np.abs(directions[:, thick])) != 2:
        raise Fault(Reason.NOT_AXIAL, f"{np.round(spacing, 2).tolist()} mm")
    nearest = np.abs(directions).max(axis=0).min()
    return [Reason.OBLIQUE] if nearest < math.cos(math.radians(10)) else []


def check_shape(shape: Sequence[int], bytes_a_voxel: int, most_bytes: int) -> int:
    """Bytes that a header promises.

    Raises:
        Fault: for no, flat or too many dimensions, or more bytes than allowed.
    """
    if any(n <= 0 for n in shape):
        raise Fault(Reason.BAD_HEADER, f"shape {list(shape)}")
    promised = math.prod(int(n) for n in shape) * bytes_a_voxel
    if promised > most_bytes:
        raise Fault(Reason.BOMB, f"{promised} bytes for shape {list(shape)}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Fault(Reason.FOUR_D, f"shape {list(shape)}")
    if len(shape) < 3:
        raise Fault(Reason.TWO_D, f"shape {list(shape)}")
    return promised


# -- NIfTI ----------------------------------------------------------------------------------------------


def _open_nifti(path: Path, most_bytes: int) -> Voxels:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed and path.name.lower().endswith(".gz"):
        raise Fault(Reason.NOT_AN_IMAGE, "not gzip")
    with open(path, "rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        start = _read_or_fault(stream, 540)
        header = _nifti_header(start)
        shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
        dtype = header.get_data_dtype()
        promised = check_shape(shape, dtype.itemsize, most_bytes)
        if dtype.fields is not None or dtype.kind == "c":
            raise Fault(Reason.COLOUR)
        if dtype.kind not in "iuf":
            raise Fault(Reason.BAD_HEADER, "voxel type")
        offset = float(header["vox_offset"])
        if not (math.isfinite(offset) and len(start) - 540 + 348 <= offset <= _LONGEST_HEADER * 64):
            raise Fault(Reason.BAD_HEADER, "data offset")
        slope, intercept = _nifti_scale(header)
        affine, warnings = _nifti_affine(header, shape)
        _enough_bytes(path.stat().st_size, promised + int(offset), packed)
        content = _read_exactly(stream, start, int(offset), promised)
    raw = np.frombuffer(content, dtype, math.prod(shape)).reshape(shape[:3], order="F")
    return Voxels(raw, affine, slope, intercept, warnings + check_grid(affine, raw.shape))


def _nifti_header(start: bytes) -> Any:
    if len(start) < 348:
        raise Fault(
            Reason.TRUNCATED if start[:4] in _NIFTI_SIZES else Reason.NOT_AN_IMAGE, f"{len(start)} bytes"
        )
    kind = _NIFTI_SIZES.get(start[:4])
    if kind is None:
        raise Fault(Reason.NOT_AN_IMAGE, "no NIfTI header")
    size = kind.template_dtype.itemsize
    if len(start) < size:
        raise Fault(Reason.TRUNCATED, f"{len(start)} bytes")
    header = kind(start[:size], check=False)
    if bytes(header["magic"].tobytes()[:3]) not in (b"n+1", b"n+2"):
        raise Fault(Reason.BAD_HEADER, "magic")
    if not 1 <= int(header["dim"][0]) <= 7:
        raise Fault(Reason.BAD_HEADER, "number of dimensions")
    try:
        header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        raise Fault(Reason.BAD_HEADER, "voxel type") from error
    return header


_NIFTI_SIZES = {
    (348).to_bytes(4, "little"): nib.Nifti1Header,
    (348).to_bytes(4, "big"): nib.Nifti1Header,
    (540).to_bytes(4, "little"): nib.Nifti2Header,
    (540).to_bytes(4, "big"): nib.Nifti2Header,
}


def _nifti_scale(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) and math.isnan(intercept):
        return 1.0, 0.0  # what nibabel writes for "not scaled"
    if slope == 0 and intercept == 0:
        return 1.0, 0.0  # the standard's "not scaled"
    if slope == 0 or not (math.isfinite(slope) and math.isfinite(intercept)):
        raise Fault(Reason.ZERO_SLOPE, f"slope {slope:g}, intercept {intercept:g}")
    return slope, intercept


def _nifti_affine(header: Any, shape: Sequence[int]) -> tuple[np.ndarray, list[Reason]]:
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if (pixdim < 0).any():
        raise Fault(Reason.NEGATIVE_SPACING, f"{pixdim.tolist()} mm")
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise Fault(Reason.BAD_SPACING, f"{pixdim.tolist()} mm")
    sform = header.get_sform() if int(header["sform_code"]) > 0 else None
    qform = None
    if int(header["qform_code"]) > 0:
        try:
            qform = header.get_qform()
        except (ValueError, nib.spatialimages.HeaderDataError) as error:
            if sform is None:
                raise Fault(Reason.SINGULAR_AFFINE, "qform") from error
    warnings = []
    if sform is None and qform is None:
        return np.asarray(header.get_base_affine(), dtype=float), [Reason.NO_ORIENTATION]
    affine = np.asarray(sform if sform is not None else qform, dtype=float)
    if sform is not None and qform is not None and np.isfinite(affine).all():
        corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) * np.array(shape[:3])
        apart = np.abs(nib.affines.apply_affine(affine - qform, corners) + 0.0)
        if not apart.max() <= 1.0:  # mm (ours)
            warnings.append(Reason.FORMS_DISAGREE)
    if np.isfinite(affine).all() and not np.allclose(
        np.linalg.norm(affine[:3, :3], axis=0), pixdim, rtol=0.01, atol=1e-3
    ):
        warnings.append(Reason.SPACING_DISAGREES)
    return affine, warnings


# -- NRRD -----------------------------------------------------------------------------------------------

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


def _open_nrrd(path: Path, root: Path, most_bytes: int) -> Voxels:
    with open(path, "rb") as file:
        if file.read(4) != b"NRRD":
            raise Fault(Reason.NOT_AN_IMAGE, "no NRRD header")
        file.readline(_LONGEST_HEADER)
        fields = _text_header(file, re.compile(r"^([^:=]+):=?\s*(.*)$"), stop="")
        begin = file.tell()
    shape = tuple(int(n) for n in fields["sizes"].split())
    if len(shape) != int(fields["dimension"]):
        raise Fault(Reason.BAD_HEADER, "dimension")
    kinds = fields.get("kinds", "").lower().split()
    if any(kind not in ("domain", "space", "time", "???", "none", "list") for kind in kinds):
        raise Fault(Reason.COLOUR, f"shape {list(shape)}")
    dtype = _dtype(fields["type"].lower(), _NRRD_TYPES, fields.get("endian", "little").lower() == "big")
    promised = check_shape(shape, dtype.itemsize, most_bytes)
    affine, warnings = _nrrd_affine(fields)
    warnings += check_grid(affine, shape[:3])
    data = _detached(path, fields.get("data file") or fields.get("datafile"), root)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz", "bzip2", "bz2"):
        raise Fault(Reason.UNSUPPORTED, "encoding")
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if skip or int(fields.get("line skip", fields.get("lineskip", "0"))):
        raise Fault(Reason.UNSUPPORTED, "skipped bytes")
    with open(data, "rb") as file:
        file.seek(begin if data == path else 0)
        stored = data.stat().st_size - file.tell()
        _enough_bytes(stored, promised, packed=encoding[0] == "g", ratio=_DEFLATE_RATIO)
        stream: Any = file
        if encoding[0] == "g":
            stream = gzip.GzipFile(fileobj=file)
        elif encoding[0] == "b":
            stream = bz2.BZ2File(file)
        content = _read_exactly(stream, b"", 0, promised)
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
    signs = (-1, -1, 1) if space is None else space  # ITK takes an unnamed space for LPS
    return np.diag([*signs, 1.0]) @ affine, [] if space is not None else [Reason.NO_ORIENTATION]


# -- MetaImage ------------------------------------------------------------------------------------------

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


def _open_metaimage(path: Path, root: Path, most_bytes: int) -> Voxels:
    with open(path, "rb") as file:
        if not re.match(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=", file.read(64)):
            raise Fault(Reason.NOT_AN_IMAGE, "no MetaImage header")
        file.seek(0)
        fields = _text_header(file, re.compile(r"^(\w+)\s*=\s*(.*)$"), stop="elementdatafile")
        begin = file.tell()
    shape = tuple(int(n) for n in fields["dimsize"].split())
    if len(shape) != int(fields["ndims"]):
        raise Fault(Reason.BAD_HEADER, "NDims")
    if int(fields.get("elementnumberofchannels", "1")) != 1:
        raise Fault(Reason.COLOUR)
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "false")).lower() == "true"
    dtype = _dtype(fields["elementtype"].lower(), _META_TYPES, big)
    promised = check_shape(shape, dtype.itemsize, most_bytes)
    affine = _meta_affine(fields)
    warnings = check_grid(affine, shape[:3])
    where = fields["elementdatafile"]
    if where.upper().startswith("LIST") or "%" in where or fields.get("headersize", "0") not in ("0",):
        raise Fault(Reason.UNSUPPORTED, "data in several files")
    data = _detached(path, None if where.upper() == "LOCAL" else where, root)
    packed = fields.get("compresseddata", "false").lower() == "true"
    with open(data, "rb") as file:
        file.seek(begin if data == path else 0)
        stored = data.stat().st_size - file.tell()
        _enough_bytes(stored, promised, packed)
        content = _inflate(file.read(stored), promised) if packed else _read_exactly(file, b"", 0, promised)
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


# -- bytes ----------------------------------------------------------------------------------------------


def _dtype(name: str, types: dict[str, tuple[str, ...]], big: bool) -> np.dtype:
    for code, names in types.items():
        if name in names:
            return np.dtype((">" if big else "<") + code)
    raise Fault(Reason.COLOUR if "array" in name else Reason.BAD_HEADER, "voxel type")


def _text_header(file: BinaryIO, line_of: re.Pattern, stop: str) -> dict[str, str]:
    """``key: value`` lines up to a blank line (``stop`` empty) or past the line of key ``stop``."""
    fields: dict[str, str] = {}
    while file.tell() < _LONGEST_HEADER:
        line = file.readline(_LONGEST_HEADER)
        text = line.decode("latin-1").strip()
        if not line:
            if stop:
                raise Fault(Reason.TRUNCATED, "in the header")
            return fields
        if not text and not stop:
            return fields
        found = None if text.startswith("#") else line_of.match(text)
        if found:
            key = found.group(1).strip().lower()
            fields[key] = found.group(2).strip()
            if stop and key == stop:
                return fields
    raise Fault(Reason.BAD_HEADER, "no end of the header")


def _detached(path: Path, name: str | None, root: Path) -> Path:
    """The file with the voxels, which must lie in the folder that is scanned."""
    if not name:
        return path
    data = path.parent / name
    if not data.resolve().is_relative_to(root.resolve()):
        raise Fault(Reason.LEAVES_FOLDER, "data file")
    if not data.is_file():
        raise Fault(Reason.TRUNCATED, "its data file is missing")
    return data


def _enough_bytes(stored: int, promised: int, packed: bool, ratio: int = _DEFLATE_RATIO) -> None:
    if packed and promised > max(stored, 64) * ratio:
        raise Fault(Reason.BOMB, f"{promised} bytes promised by {stored}")
    if not packed and promised > stored:
        # a header that promises a thousand times the file is no accident of copying
        reason = Reason.BOMB if promised > max(stored, 1 << 16) * 1000 else Reason.TRUNCATED
        raise Fault(reason, f"{promised} bytes promised, {stored} there")


def _read_or_fault(stream: Any, count: int) -> bytes:
    try:
        return stream.read(count)
    except EOFError as error:
        raise Fault(Reason.TRUNCATED, "in the compressed data") from error
    except (gzip.BadGzipFile, zlib.error, OSError) as error:
        raise Fault(Reason.BAD_CHECKSUM) from error


def _read_exactly(stream: Any, start: bytes, offset: int, count: int) -> memoryview:
    """``count`` bytes from ``offset`` on, of a stream that ``start`` was read from; then on to its checksum."""
    content = memoryview(np.empty(count, np.uint8))  # not touched before there are data for it
    early = start[offset:][:count]
    content[: len(early)] = early
    filled = len(early)
    behind = max(0, offset - len(start))
    while behind > 0:
        skipped = len(_read_or_fault(stream, min(behind, _LONGEST_HEADER)))
        if skipped == 0:
            raise Fault(Reason.TRUNCATED, "before the voxels")
        behind -= skipped
    while filled < count:
        block = _read_or_fault(stream, min(count - filled, 1 << 22))
        if not block:
            raise Fault(Reason.TRUNCATED, f"{filled} of {count} bytes")
        content[filled : filled + len(block)] = block
        filled += len(block)
    if not isinstance(stream, io.BufferedReader):
        rest = 0
        while block := _read_or_fault(stream, 1 << 16):
            rest += len(block)
            if rest > _TAIL_BYTES:
                raise Fault(Reason.BOMB, "more data than the header tells")
    return content


def _inflate(packed: bytes, count: int) -> bytes:
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(packed, count)
        rest = decoder.decompress(decoder.unconsumed_tail, 1)
    except zlib.error as error:
        raise Fault(Reason.BAD_CHECKSUM) from error
    if rest:
        raise Fault(Reason.BAD_HEADER, "more data than the header tells")
    if len(content) < count or not decoder.eof:
        raise Fault(Reason.TRUNCATED, f"{len(content)} of {count} bytes")
    return content
