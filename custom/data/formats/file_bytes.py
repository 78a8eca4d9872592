"""Read the bytes of a file that may be damaged: never more than it can hold, and up to the last checksum."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from custom.data.formats.reasons import Fault, Reason

DEFLATE_RATIO = 1032  # the best that zlib can compress (https://zlib.net/zlib_tech.html)
BZIP2_RATIO = 1_500_000  # measured: 45 MB of equal bytes take 37
LONGEST_HEADER = 1 << 20
_BLOCK = 1 << 22  # decompressed at a time (ours)
_TAIL_BYTES = 1 << 20  # after the voxels; they are read only to reach the checksum


def voxel_type(name: str, types: dict[str, tuple[str, ...]], big: bool) -> np.dtype:
    """The numpy type of a format's type name; ``types``: numpy code -> names; ``big``: big-endian.

    Raises:
        Fault: for a name that is not known.
    """
    for code, names in types.items():
        if name in names:
            return np.dtype((">" if big else "<") + code)
    raise Fault(Reason.COLOUR if "array" in name else Reason.BAD_HEADER, "voxel type")


def text_header(file: BinaryIO, line_of: re.Pattern, stop: str) -> dict[str, str]:
    """The ``key: value`` lines of a header, up to the line with key ``stop``, or to a blank line if ``stop`` is empty."""
    fields: dict[str, str] = {}
    while file.tell() < LONGEST_HEADER:
        line = file.readline(LONGEST_HEADER)
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


def detached(path: Path, name: str | None, root: Path) -> Path:
    """The file with the voxels. It must lie in the scanned folder."""
    if not name:
        return path
    data = path.parent / name
    if not data.resolve().is_relative_to(root.resolve()):
        raise Fault(Reason.LEAVES_FOLDER, "data file")
    if not data.is_file():
        raise Fault(Reason.TRUNCATED, "its data file is missing")
    return data


def enough_bytes(stored: int, promised: int, packed: bool, ratio: int = DEFLATE_RATIO) -> None:
    """Refuse a file that cannot hold as many bytes as its header promises.

    Args:
        stored: bytes in the file.
        promised: bytes of voxels.
        packed: whether the data are compressed.
        ratio: the best possible compression.

    Raises:
        Fault: if the file is too small.
    """
    if packed and promised > max(stored, 64) * ratio:
        raise Fault(Reason.BOMB, f"{promised} bytes promised by {stored}")
    if not packed and promised > stored:
        # a file that was cut short while it was copied does not lack a thousand times its size
        reason = Reason.BOMB if promised > max(stored, 1 << 16) * 1000 else Reason.TRUNCATED
        raise Fault(reason, f"{promised} bytes promised, {stored} there")


def read_or_fault(stream: Any, count: int) -> bytes:
    """Read at most ``count`` bytes; damage in compressed data is raised as a ``Fault``."""
    try:
        return stream.read(count)
    except EOFError as error:
        raise Fault(Reason.TRUNCATED, "in the compressed data") from error
    except (gzip.BadGzipFile, zlib.error, OSError) as error:
        raise Fault(Reason.BAD_CHECKSUM) from error


def read_exactly(stream: Any, start: bytes, offset: int, count: int) -> memoryview:
    """``count`` bytes at ``offset`` of a stream whose first bytes, ``start``, were read before; then read to its checksum."""
    content = memoryview(np.empty(count, np.uint8))  # the system gives memory only where it is written
    early = start[offset:][:count]
    content[: len(early)] = early
    filled = len(early)
    behind = max(0, offset - len(start))
    while behind > 0:
        skipped = len(read_or_fault(stream, min(behind, LONGEST_HEADER)))
        if skipped == 0:
            raise Fault(Reason.TRUNCATED, "before the voxels")
        behind -= skipped
    while filled < count:
        block = read_or_fault(stream, min(count - filled, _BLOCK))
        if not block:
            raise Fault(Reason.TRUNCATED, f"{filled} of {count} bytes")
        content[filled : filled + len(block)] = block
        filled += len(block)
    if not isinstance(stream, io.BufferedReader):
        rest = 0
        while block := read_or_fault(stream, 1 << 16):
            rest += len(block)
            if rest > _TAIL_BYTES:
                raise Fault(Reason.BOMB, "more data than the header tells")
    return content


def inflate(file: BinaryIO, count: int) -> memoryview:
    """Decompress exactly ``count`` bytes of a zlib stream, block by block, up to its checksum.

    Raises:
        Fault: if there are more or fewer bytes, or they are damaged.
    """
    content, filled, decoder = memoryview(np.empty(count, np.uint8)), 0, zlib.decompressobj()

    def more(most: int) -> bytes:
        while not decoder.eof:
            packed = decoder.unconsumed_tail or file.read(_BLOCK)
            block = decoder.decompress(packed, most)
            if block or not packed:
                return block
        return b""

    try:
        while filled < count and (block := more(min(count - filled, _BLOCK))):
            content[filled : filled + len(block)] = block
            filled += len(block)
        rest = more(1)
    except zlib.error as error:
        raise Fault(Reason.BAD_CHECKSUM) from error
    if rest:
        raise Fault(Reason.BAD_HEADER, "more data than the header tells")
    if filled < count or not decoder.eof:
        raise Fault(Reason.TRUNCATED, f"{filled} of {count} bytes")
    return content
