"""A scan's embeddings in a file that is mapped into memory: a search reads only the cells it visits."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from custom.files import Mapped
from custom.landmarks.embeddings.blocks import Blocks
from custom.landmarks.embeddings.file import EmbeddingError, digest_of, read_header
from custom.landmarks.embeddings.lattice import Lattice, flat_index, make_lattice
from custom.landmarks.embeddings.packing import largest_of, levels_of, row_lengths, unpack
from custom.landmarks.sam.scan_grid import ScanEmbedding, Triple


class StoredEmbedding:
    """A scan's embeddings in a file, opened when first needed (an ``EmbeddingMap``).

    Safe in many workers: each process opens the file for itself.

    Args:
        path: as ``save_embedding`` wrote it.

    Raises:
        EmbeddingError: if the file is missing, damaged, or of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header, self._places, self._data_start = read_header(self.path)
        self.affine = np.array(self.header.affine)
        self.weights_sha256: str | None = self.header.weights_sha256
        self.shape: Triple = (self.header.shape[0], self.header.shape[1], self.header.shape[2])
        self.grid: Triple = (self.header.grid[0], self.header.grid[1], self.header.grid[2])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @functools.cached_property
    def body(self) -> NDArray[np.bool_]:
        """Bool (z, y, x): fine cells that are stored."""
        count = int(np.prod(self.grid))
        return np.unpackbits(self._section("body"), count=count).view(bool).reshape(self.grid)

    @functools.cached_property
    def coarse(self) -> NDArray[np.float32]:
        """(z, y, x, C)."""
        return self.coarse_stored.astype(np.float32)

    @property
    def coarse_stored(self) -> NDArray[np.float16]:
        """(z, y, x, C), as large as ``coarse``, but only the parts in use are read."""
        return self._section("coarse")

    @functools.cached_property
    def fine_lattice(self) -> Lattice:
        """See :class:`Lattice`."""
        norm = self._section("coarse_norm")
        outside = ~self.body.reshape(-1)
        return make_lattice(
            self.coarse_stored, self.grid, 1, outside, self._fine_dot, norm, self._row_of_cell
        )

    @functools.cached_property
    def pooled_lattice(self) -> Lattice:
        """See :class:`Lattice`."""
        used, row_of_cell = self._pooled_rows

        def dot(index: NDArray | None, vector: NDArray) -> NDArray:
            if index is not None:
                return self.pooled_vectors(index) @ vector
            total = np.full(len(used), -1.0, np.float32)
            total[used] = self._pooled_at(slice(None)) @ vector
            return total

        norm = self._section("pooled_norm")
        return make_lattice(self.coarse_stored, self.grid, 2, ~used, dot, norm, row_of_cell)

    @property
    def blocks(self) -> Blocks:
        """See :class:`Blocks`; read again at each use."""
        vectors = self._section("blocks").astype(np.float32)
        vectors *= self._section("blocks_step")
        return Blocks(vectors, self._section("blocks_mm").astype(float), self.header.alternate)

    def fine_vectors(self, cells_zyx: NDArray[np.int_]) -> NDArray[np.float32]:
        """(N, C), of length 1, of cells (N, 3) in the body."""
        vectors = self._fine_steps(flat_index(cells_zyx, self.grid))
        return vectors / row_lengths(vectors)[:, None]

    def pooled_vectors(self, flat: NDArray[np.int_]) -> NDArray[np.float32]:
        """(N, C), of length 1, of 8 mm cells (flat indices); any vector for a cell outside the body."""
        return self._pooled_at(self._pooled_rows[1][flat])

    def decode(self) -> ScanEmbedding:
        """All embeddings in memory; fine vectors outside the body are 0."""
        cells = np.argwhere(self.body)
        fine = np.zeros((*self.grid, self.header.dim), np.float32)
        fine[tuple(cells.T)] = self.fine_vectors(cells)
        maps = [torch.from_numpy(part).permute(3, 0, 1, 2) for part in (fine, self.coarse)]
        return ScanEmbedding(maps[0], maps[1], self.affine, self.shape, self.body, self.weights_sha256)

    def check(self) -> None:
        """Read everything and compare the checksum.

        Raises:
            EmbeddingError: if a byte differs from what was written.
        """
        if digest_of({key: self._section(key) for key in self._places}) != self.header.content_sha256:
            raise EmbeddingError(f"{self.path}: differs from what was written. Delete it and embed again.")

    @functools.cached_property
    def _bytes(self) -> tuple[mmap.mmap, Mapped]:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), Mapped(self.path)

    def _section(self, key: str) -> NDArray[Any]:
        dtype, shape, start = self._places[key]
        content, mapped = self._bytes
        try:
            mapped.require_whole()
        except OSError as error:
            raise EmbeddingError(f"{self.path}: {error}. Delete it and embed again.") from error
        count = int(np.prod(shape))
        return np.frombuffer(content, dtype, count, self._data_start + start).reshape(shape)

    @functools.cached_property
    def _row_of_cell(self) -> NDArray[np.int32]:
        rows: NDArray[np.int32] = np.cumsum(self.body.reshape(-1), dtype=np.int32)
        rows -= 1
        return rows

    @functools.cached_property
    def _pooled_rows(self) -> tuple[NDArray[np.bool_], NDArray[np.int_]]:
        """For all 8 mm cells: which are stored, and the row of each stored one."""
        used = _pooled_body(self.body).reshape(-1)
        return used, np.cumsum(used) - 1

    def _pooled_at(self, rows: NDArray[np.int_] | slice) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self._section("pooled")[rows].astype(np.float32)
        vectors /= row_lengths(vectors)[:, None]
        return vectors

    def _fine_steps(self, flat: NDArray[np.int_]) -> NDArray[np.float32]:
        """Fine vectors of some cells of the body, before normalisation."""
        rows = self._row_of_cell[flat]
        vectors = unpack(self._section("fine")[rows], self.header.fine_bits, self.header.dim)
        vectors *= (largest_of(self._section("fine_largest")[rows]) / levels_of(self.header.fine_bits))[
            :, None
        ]
        cells = np.stack(np.unravel_index(flat, self.grid), axis=-1)
        # eight cells share a mean
        means, of_each = np.unique(flat_index(cells // 2, self.pooled_lattice.grid), return_inverse=True)
        vectors += self.pooled_vectors(means)[of_each]
        return vectors

    def _fine_dot(self, index: NDArray | None, vector: NDArray) -> NDArray:
        if index is not None:
            vectors = self._fine_steps(index)
            return (vectors @ vector) / row_lengths(vectors)
        total = np.full(int(np.prod(self.grid)), -1.0, np.float32)
        inside = np.flatnonzero(self.body.reshape(-1))
        # in parts, to bound the memory of unpacked vectors
        for some in np.array_split(inside, -(-len(inside) // 16384)):
            total[some] = self._fine_dot(some, vector)
        return total


def _pooled_body(body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(body, [(0, n % 2) for n in body.shape])
    for axis in range(3):  # axis by axis, which is tens of times faster than ``any`` over three
        padded = np.moveaxis(padded, axis, 0)
        padded = np.moveaxis(padded[::2] | padded[1::2], 0, axis)
    return padded
