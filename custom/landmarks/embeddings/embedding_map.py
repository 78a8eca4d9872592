"""What a search needs from the embeddings of a scan, and embeddings in memory that provide it."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from custom.errors import AliceError
from custom.landmarks.embeddings.blocks import Blocks, make_blocks
from custom.landmarks.embeddings.lattice import (
    Lattice,
    axis_weights,
    dot_of,
    flat_index,
    interpolate_at,
    make_lattice,
    pool,
)
from custom.landmarks.sam.scan_grid import ScanEmbedding, Triple, world_to_cell

Array: TypeAlias = NDArray[Any]


class EmbeddingMap(Protocol):
    """What a search needs. ``StoredEmbedding`` provides it; a ``ScanEmbedding`` is wrapped in ``DenseMap``."""

    affine: NDArray[np.float64]
    shape: Triple
    weights_sha256: str | None  # of the network that made it, if that is known

    @property
    def grid(self) -> Triple: ...
    @property
    def coarse(self) -> Array: ...  # (z, y, x, C) float32
    @property
    def coarse_stored(self) -> Array: ...  # the same, perhaps in float16; to read a few cells
    @property
    def body(self) -> Array | None: ...  # bool (z, y, x) of fine cells
    @property
    def fine_lattice(self) -> Lattice: ...
    @property
    def pooled_lattice(self) -> Lattice: ...
    @property
    def blocks(self) -> Blocks: ...
    def fine_vectors(self, cells_zyx: Array) -> Array: ...
    def pooled_vectors(self, flat: Array) -> Array: ...
    def decode(self) -> ScanEmbedding: ...


Searchable: TypeAlias = "ScanEmbedding | EmbeddingMap"


class DenseMap:
    """A ``ScanEmbedding`` prepared for searching: channels last, with norms and a pooled copy. Float32, CPU."""

    def __init__(self, embedding: ScanEmbedding) -> None:
        self.affine, self.shape = np.asarray(embedding.affine), embedding.shape
        self.body, self.weights_sha256 = embedding.body, embedding.weights_sha256
        fine, coarse = embedding.fine.detach().float().cpu(), embedding.coarse.detach().float().cpu()
        self._fine, self._coarse = fine, coarse
        self.grid: Triple = (int(fine.shape[1]), int(fine.shape[2]), int(fine.shape[3]))
        self.coarse: Array = np.ascontiguousarray(coarse.permute(1, 2, 3, 0).numpy())
        self.coarse_stored = self.coarse
        rows = np.ascontiguousarray(fine.permute(1, 2, 3, 0).numpy()).reshape(-1, fine.shape[0])
        self._rows = rows
        pooled, self._used = pool(rows.reshape(*self.grid, -1), self.body)
        self._pooled_rows = pooled.reshape(-1, pooled.shape[-1])
        outside = (None, None) if self.body is None else (~self.body.reshape(-1), ~self._used.reshape(-1))
        self.fine_lattice = make_lattice(self.coarse, self.grid, 1, outside[0], dot_of(rows))
        self.pooled_lattice = make_lattice(self.coarse, self.grid, 2, outside[1], dot_of(self._pooled_rows))

    @functools.cached_property
    def blocks(self) -> Blocks:
        """See :class:`Blocks`."""
        rows = self._pooled_rows[self._used.reshape(-1)]
        return make_blocks(rows, self._used, self.coarse, self.grid, self.affine)

    def fine_vectors(self, cells_zyx: Array) -> Array:
        """(N, C) of cells (N, 3)."""
        return self._rows[flat_index(cells_zyx, self.grid)]

    def pooled_vectors(self, flat: Array) -> Array:
        """(N, C) of 8 mm cells (flat indices); any vector for a cell outside the body."""
        return self._pooled_rows[flat]

    def decode(self) -> ScanEmbedding:
        """The embeddings as they were given."""
        return ScanEmbedding(
            self._fine, self._coarse, self.affine, self.shape, self.body, self.weights_sha256
        )


_prepared: dict[int, tuple[weakref.ref[ScanEmbedding], DenseMap]] = {}


def prepare(embedding: Searchable) -> EmbeddingMap:
    """Prepare a scan for searches; what is made for a ``ScanEmbedding`` is kept as long as the embedding."""
    if not isinstance(embedding, ScanEmbedding):
        return embedding
    key = id(embedding)
    if key not in _prepared:
        reference = weakref.ref(embedding, lambda _: _prepared.pop(key, None) and None)
        _prepared[key] = (reference, DenseMap(embedding))
    return _prepared[key][1]


def prepare_pair(embedding_q: Searchable, embedding_k: Searchable) -> tuple[EmbeddingMap, EmbeddingMap]:
    """Prepare two scans for comparison.

    Raises:
        AliceError: if they come from different networks and so do not compare.
    """
    map_q, map_k = prepare(embedding_q), prepare(embedding_k)
    dims = [map_.coarse_stored.shape[-1] for map_ in (map_q, map_k)]
    if dims[0] != dims[1]:
        raise AliceError(
            f"Embeddings of {dims[0]} and {dims[1]} numbers do not compare: "
            "embed both scans with the same network."
        )
    known = {map_.weights_sha256 for map_ in (map_q, map_k)} - {None}
    if len(known) > 1:
        raise AliceError(
            f"Embeddings made with different weights ({', '.join(sorted(str(w)[:12] for w in known))}) do not compare: "
            "embed both scans with the same ones."
        )
    return map_q, map_k


def inside_grid(points_mm: Array, target: EmbeddingMap) -> Array:
    """Bool (N,): True for points in a voxel of the scan's grid; False for points that are not finite."""
    finite: Array = np.all(np.isfinite(points_mm), axis=1)
    inverse = np.linalg.inv(target.affine)
    voxels = np.where(finite[:, None], points_mm, 0.0) @ inverse[:3, :3].T + inverse[:3, 3]
    inside = (voxels >= -0.5) & (voxels <= np.array(target.shape) - 0.5)
    return finite & np.all(inside, axis=1)


def query_cells(points_mm: Array, source: EmbeddingMap) -> tuple[Array, Array]:
    """Fine cells (N, 3) that hold the points, and bool (N,), which points lie inside grid and body."""
    inside = inside_grid(points_mm, source)
    cells = np.floor(world_to_cell(np.where(inside[:, None], points_mm, 0.0), source.affine, "fine") + 0.5)
    # with an odd number of slices the last one has no cell
    cells = np.clip(cells, 0, np.array(source.grid) - 1).astype(int)
    if source.body is not None:
        inside = np.logical_and(inside, source.body[tuple(cells.T)])
    return cells, inside


def coarse_vectors(source: EmbeddingMap, cells_zyx: Array) -> Array:
    """Coarse vectors (N, C) at fine cells, interpolated from eight corners and normalised to length 1."""
    axes = [
        axis_weights(np.arange(n), n, m)
        for n, m in zip(source.grid, source.coarse_stored.shape, strict=False)
    ]
    vectors = interpolate_at(source.coarse_stored, (axes[0], axes[1], axes[2]), tuple(cells_zyx.T))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
