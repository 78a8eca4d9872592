"""An array in a compressed file: written slab by slab, read box by box, with a checksum for every chunk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from custom.data.errors import StoreError
from custom.files import Mapped, replacing

CHUNK = 64  # voxels along each side: a 192 x 192 x 64 crop touches few chunks (docs/performance.md, "Data loading")
BLOCK = 16  # voxels along each side: the smallest part that is decompressed
MAKE_ROOM = "Make room on the disk and build again."
# The header of a Blosc2 frame with one 3D array and nothing else (README_CFRAME_FORMAT and README_B2ND_METALAYER of c-blosc2).
# Other metadata can make blosc2 run what the file says (LazyArray, proxy), so it is not given such files.
_HEADER = re.compile(
    rb"\x9e\xa8b2frame\x00\xd2.{4}\xcf(?P<size>.{8})\xa4.{4}(?:\xd3.{8}){2}\xd2(?P<itemsize>.{4})(?:\xd2.{4}){2}"
    rb"(?:\xd1.{2}){2}[\xc2\xc3]\xd8.{17}\x93\xcd\x00\x11\xde\x00\x01\xa4b2nd\xd2\x00\x00\x00\x6b\xdc\x00\x01"
    rb"\xc6\x00\x00\x00\x48\x97\x00\x03(?P<shape>\x93(?:\xd3.{8}){3})(?P<chunks>\x93(?:\xd2.{4}){3})"
    rb"(?P<blocks>\x93(?:\xd2.{4}){3})\x00\xdb\x00\x00\x00\x03(?P<dtype>[<|][iuf][1248])",
    re.DOTALL,
)
_CHECKSUMS = "crc32"  # of every chunk as compressed, little-endian uint32, in the file's own metadata


class ArrayWriter:
    """Write an array in slabs along x. The file appears when the array is complete.

    Use it in a ``with`` statement. An error there leaves no file.

    Args:
        path: of the file.
        shape: of the whole array.
        dtype: of its voxels.

    Raises:
        StoreError: if the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._digest, self._filled, self._array = hashlib.sha256(), 0, None

    @property
    def sha256(self) -> str:
        """SHA-256 of the voxels written so far; it does not depend on the compression."""
        return self._digest.hexdigest()

    def __enter__(self) -> ArrayWriter:
        chunks = tuple(min(CHUNK, n) for n in self.shape)
        with contextlib.ExitStack() as stack:
            draft = stack.enter_context(replacing(self.path, sync=True, error=StoreError, advice=MAKE_ROOM))
            with _disk_errors():
                self._array = blosc2.empty(
                    self.shape,
                    dtype=self.dtype,
                    chunks=chunks,
                    blocks=tuple(min(BLOCK, n) for n in chunks),
                    cparams={
                        # a crop is cut in less than half the time of zstd, for a tenth more disk (docs/performance.md)
                        "codec": blosc2.Codec.LZ4HC,
                        "clevel": 5,
                        "filters": [blosc2.Filter.BITSHUFFLE],
                        "nthreads": 1,
                    },
                    urlpath=str(draft),
                    mode="w",
                )
            stack.push(self._finish)
            self._stack = stack.pop_all()  # open until __exit__
        return self

    def write(self, slab: np.ndarray) -> None:
        """Add the next slab along x. All but the last must have a multiple of ``CHUNK`` planes."""
        assert self._array is not None and self._filled % CHUNK == 0, "slabs are whole chunks"
        whole = np.ascontiguousarray(slab, dtype=self.dtype)
        self._digest.update(whole)
        with _disk_errors():
            self._array[self._filled : self._filled + len(whole)] = whole
        self._filled += len(whole)

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)

    def _finish(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Add the checksums, and close the file."""
        array, self._array = self._array, None
        if kind is None:
            assert array is not None and self._filled == self.shape[0], "all slabs were written"
            with _disk_errors():
                schunk = array.schunk
                sums = [zlib.crc32(schunk.get_chunk(i)) for i in range(schunk.nchunks)]
                schunk.vlmeta[_CHECKSUMS] = np.array(sums, "<u4").tobytes()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """blosc2 reports a full disk as RuntimeError; raise it as the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a whole array; returns the SHA-256 of its voxels."""
    with ArrayWriter(path, array.shape, array.dtype) as writer:
        for start in range(0, len(array), CHUNK):
            writer.write(array[start : start + CHUNK])
    return writer.sha256


class ChunkedArray:
    """A file of :class:`ArrayWriter`, opened for reading.

    The checksum of a chunk is compared when the chunk is first read, before it is decompressed.

    Raises:
        RuntimeError: if the file is damaged, or, while reading, one of its chunks.
        OSError: while reading, if the file was cut short since it was opened.
    """

    def __init__(self, path: Path) -> None:
        self._mapped = Mapped(path)
        _require_plain_header(path)
        # one thread: the workers run in parallel anyway, and a forked worker must not inherit a thread pool
        try:
            self._array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        except OverflowError as error:  # of a filter's number
            raise RuntimeError("its header is damaged") from error
        if not isinstance(self._array, blosc2.NDArray):
            raise RuntimeError("it holds no array")
        self.shape = tuple(int(n) for n in self._array.shape)
        self.dtype = self._array.dtype
        self._chunks = tuple(int(n) for n in self._array.chunks)
        self._grid = tuple(math.ceil(n / c) for n, c in zip(self.shape, self._chunks, strict=True))
        meta = self._array.schunk.vlmeta
        self._sums = np.frombuffer(meta.get(_CHECKSUMS, b""), "<u4")
        if len(self._sums) != math.prod(self._grid):
            raise RuntimeError("its checksums are missing or not whole")
        self._seen = np.zeros(self._grid, dtype=bool)

    def read(self, low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
        """Voxels from ``low`` to before ``high``."""
        ranges = [range(a // c, -(-b // c)) for a, b, c in zip(low, high, self._chunks, strict=True)]
        self._mapped.require_whole()
        self._verify_box(ranges)
        return np.asarray(self._array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])

    def verify(self) -> None:
        """Compare every chunk's checksum."""
        self._mapped.require_whole()
        self._verify_box([range(n) for n in self._grid])

    def _verify_box(self, ranges: list[range]) -> None:
        box = tuple(slice(r.start, r.stop) for r in ranges)
        if not self._seen[box].all():
            for place in itertools.product(*ranges):
                if not self._seen[place]:
                    self._verify(place)

    def _verify(self, place: tuple[int, ...]) -> None:
        number = int(np.ravel_multi_index(place, self._grid))
        if zlib.crc32(self._array.schunk.get_chunk(number)) != int(self._sums[number]):
            raise RuntimeError(f"checksum of chunk {number} differs")
        self._seen[place] = True


def _require_plain_header(path: Path) -> None:
    """Refuse a file that is not one 3D array of numbers, or whose sizes do not fit each other."""
    with path.open("rb") as file:
        found = _HEADER.match(file.read(184))
    if not found:
        raise RuntimeError("its header is damaged, or it holds other things than one array of numbers")
    kinds = {"shape": ">i8", "chunks": ">i4", "blocks": ">i4"}  # each number after a byte that says its kind
    shape, chunks, blocks = (
        np.frombuffer(found[key][1:], [("kind", "u1"), ("n", kind)])["n"].tolist()
        for key, kind in kinds.items()
    )
    ordered = all(0 < b <= c <= n < 2**31 for n, c, b in zip(shape, chunks, blocks, strict=True))
    itemsize = int.from_bytes(found["itemsize"], "big")
    size = int.from_bytes(found["size"], "big")
    if not ordered or itemsize != int(found["dtype"][2:]) or size != path.stat().st_size:
        raise RuntimeError("its header is damaged")
