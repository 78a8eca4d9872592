"""Embeddings on disk: one compact, memory-mapped file per scan, made once, refused when stale."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from custom.data.body import body_mask
from custom.data.profiles import require_ct
from custom.data.scans import Scan, list_scans
from custom.data.store import VolumeStore, sha256_of_file, write_text
from custom.landmarks.geometry import to_voxels
from custom.landmarks.matching import Lattice, coarse_norm, flat_index, lattice_weights, make_lattice, pool
from custom.landmarks.sam import SAM, ScanEmbedding, Triple, cell_to_world, embed_scan, read_scan

logger = logging.getLogger(__name__)

FORMAT = "alice-embedding-1"
SUFFIX = ".sam"
INDEX = "embeddings.json"
# Of 4, 5, 6 and 8 bits the fewest whose refined matches stay within 2 mm of float32's for 99 % of points
# (benchmarks/matching.py). Entropy coding (zstd) gains nothing on top and costs ten times the search.
FINE_BITS = 5
BODY_MARGIN = 2  # fine cells kept around the body, so that points of the skin have theirs (ours)
_SECTIONS = {
    "pooled": "I8",
    "pooled_length": "F32",
    "pooled_norm": "F16",
    "coarse": "F16",
    "coarse_norm": "F16",
    "body": "U8",
    "fine": "U8",
}
_DTYPES = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}


class EmbeddingError(ValueError):
    """Embeddings that cannot be used; the message names the file and the way out."""


@dataclass(frozen=True)
class EmbeddingHeader:
    """What a file says of itself.

    Attributes:
        name: the scan's.
        weights_sha256: of the network that made it.
        source_sha256: of the scan it was made from.
        grid: fine cells along z, y, x.
        shape: voxels of the 2 mm grid along x, y, z.
        affine: of that grid, voxel (x, y, z) to world mm (RAS).
        dim: numbers per embedding, C.
        fine_bits: per number of a fine cell.
        content_sha256: of all sections.
    """

    name: str
    weights_sha256: str
    source_sha256: str
    grid: Sequence[int]
    shape: Sequence[int]
    affine: Sequence[Sequence[float]]
    dim: int
    fine_bits: int
    content_sha256: str


class Saved(NamedTuple):
    """A written file: its size, and what rounding cost (cosine of fine vectors before and after)."""

    path: Path
    num_bytes: int
    mean_cosine: float
    lowest_cosine: float


def save_embedding(
    path: str | Path,
    embedding: ScanEmbedding,
    weights_sha256: str,
    source_sha256: str,
    *,
    name: str | None = None,
    body: NDArray[np.bool_] | None = None,
    fine_bits: int = FINE_BITS,
) -> Saved:
    """Write a scan's embeddings, whole or not at all.

    A safetensors file, used in place through a memory map, so that a search reads the cells it looks at and no
    others: fine vectors in steps of their own largest number (their length is known to be 1, so no scale is
    stored), packed to ``fine_bits`` a number; means of 2 x 2 x 2 fine cells as int8; coarse vectors and the lengths
    of interpolated ones in fp16.

    Args:
        path: to write.
        embedding: of the scan.
        weights_sha256: of the network's file.
        source_sha256: of the scan.
        name: the scan's; the path's stem by default.
        body: bool (z, y, x) of fine cells; only these are stored and found. None for all.
        fine_bits: 4 to 8.

    Returns:
        Size and rounding error.

    Raises:
        ValueError: if ``body`` has another grid or holds nothing, or ``fine_bits`` is out of range.
    """
    path = Path(path)
    rows = np.ascontiguousarray(embedding.fine.detach().float().cpu().permute(1, 2, 3, 0).numpy())
    coarse = embedding.coarse.detach().float().cpu().permute(1, 2, 3, 0).numpy().astype(np.float16)
    grid: Triple = (rows.shape[0], rows.shape[1], rows.shape[2])
    if not 4 <= fine_bits <= 8:
        raise ValueError(f"fine_bits must be in 4 to 8, got {fine_bits}.")
    if body is None:
        body = np.ones(grid, bool)
    if body.shape != grid or not body.any():
        raise ValueError(
            f"body must be bool {grid} with something in it, got {body.shape}, {body.sum()} cells."
        )

    pooled, used = pool(rows, body)
    pooled_rows = quantise(pooled[used], 127)
    known = coarse.astype(np.float32)  # norms of what is stored, not of what was given
    sections: dict[str, NDArray[Any]] = {
        "pooled": pooled_rows,
        "pooled_length": _lengths(pooled_rows),
        "pooled_norm": coarse_norm(known, lattice_weights(grid, coarse.shape[:3], 2)).astype(np.float16),
        "coarse": np.ascontiguousarray(coarse),
        "coarse_norm": coarse_norm(known, lattice_weights(grid, coarse.shape[:3], 1)).astype(np.float16),
        "body": np.packbits(body),
    }
    steps = quantise(rows[body], levels_of(fine_bits))
    cosines = np.einsum("nc,nc->n", rows[body], steps.astype(np.float32)) / _lengths(steps)
    sections["fine"] = pack(steps, fine_bits)
    header = EmbeddingHeader(
        name=path.stem if name is None else name,
        weights_sha256=weights_sha256,
        source_sha256=source_sha256,
        grid=grid,
        shape=[int(n) for n in embedding.shape],
        affine=np.asarray(embedding.affine, float).tolist(),
        dim=rows.shape[-1],
        fine_bits=fine_bits,
        content_sha256=_digest(sections),
    )
    # one entry: safetensors writes several in any order, and equal embeddings shall give equal files
    metadata = {"alice": json.dumps({"format": FORMAT, **asdict(header)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.numpy.save_file(sections, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Saved(path, path.stat().st_size, float(cosines.mean()), float(cosines.min()))


def quantise(vectors: NDArray[np.float32], levels: int) -> NDArray[np.int8]:
    """Round vectors (N, C) to ``levels`` steps to each side of zero, the largest number at the last step."""
    largest = np.maximum(np.abs(vectors).max(axis=-1, keepdims=True), 1e-12)
    return np.rint(vectors * (levels / largest)).astype(np.int8)


def levels_of(bits: int) -> int:
    """Steps to each side of zero that so many bits can tell apart."""
    return (1 << (bits - 1)) - 1


def pack(steps: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Numbers (N, C) of ``bits`` each, close together: four bits in halves of bytes, further ones as bit planes."""
    raised = (steps.astype(np.int16) + levels_of(bits)).astype(np.uint8)
    half = -(-raised.shape[1] // 2)
    low = raised[:, :half] & 15
    low[:, : raised.shape[1] - half] |= (raised[:, half:] & 15) << 4
    planes = [np.packbits((raised >> bit) & 1, axis=1) for bit in range(4, bits)]
    return np.concatenate([low, *planes], axis=1)


def unpack(packed: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.float32]:
    """What :func:`pack` packed, (N, C) as float32."""
    half, plane = -(-dim // 2), -(-dim // 8)
    raised = np.empty((len(packed), 2 * half), np.uint8)
    np.bitwise_and(packed[:, :half], 15, out=raised[:, :half])
    np.right_shift(packed[:, :half], 4, out=raised[:, half:])
    raised = raised[:, :dim]
    for bit in range(4, bits):
        start = half + (bit - 4) * plane
        raised |= np.unpackbits(packed[:, start : start + plane], axis=1, count=dim) << bit
    out = raised.astype(np.float32)
    out -= levels_of(bits)
    return out


class StoredEmbedding:
    """A scan's embeddings in a file, opened at first use and read where a search goes (an ``EmbeddingMap``).

    Safe to use from many workers: what is opened is opened per process.

    Args:
        path: as ``save_embedding`` wrote it.

    Raises:
        EmbeddingError: if the file is missing, damaged, or no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header, self._places, self._data_start = _read_header(self.path)
        self.affine = np.array(self.header.affine)
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
        return self._section("coarse").astype(np.float32)

    @functools.cached_property
    def fine_lattice(self) -> Lattice:
        """See :class:`Lattice`."""
        norm = self._section("coarse_norm").astype(np.float32)
        return make_lattice(self.coarse, self.grid, 1, ~self.body.reshape(-1), self._fine_dot, norm)

    @functools.cached_property
    def pooled_lattice(self) -> Lattice:
        """See :class:`Lattice`."""
        used = _pooled_body(self.body).reshape(-1)
        row_of_cell = np.cumsum(used) - 1
        rows, lengths = self._section("pooled"), self._section("pooled_length")

        def dot(index: NDArray | None, vector: NDArray) -> NDArray:
            if index is None:
                total = np.full(len(used), -1.0, np.float32)
                total[used] = (rows.astype(np.float32) @ vector) / lengths
                return total
            some = row_of_cell[index]
            return (rows[some].astype(np.float32) @ vector) / lengths[some]

        norm = self._section("pooled_norm").astype(np.float32)
        return make_lattice(self.coarse, self.grid, 2, ~used, dot, norm)

    @property
    def pooled_rows(self) -> NDArray[np.float32]:
        """(cells of 8 mm that hold body, C), of length 1."""
        rows: NDArray[np.float32] = self._section("pooled") / self._section("pooled_length")[:, None]
        return rows

    def fine_vectors(self, cells_zyx: NDArray[np.int_]) -> NDArray[np.float32]:
        """(N, C), of length 1, of cells (N, 3) in the body."""
        vectors = self._fine_steps(flat_index(cells_zyx, self.grid))
        return vectors / _lengths(vectors)[:, None]

    def decode(self) -> ScanEmbedding:
        """All of it in memory; fine vectors off the body are 0."""
        cells = np.argwhere(self.body)
        fine = np.zeros((*self.grid, self.header.dim), np.float32)
        fine[tuple(cells.T)] = self.fine_vectors(cells)
        maps = [torch.from_numpy(part).permute(3, 0, 1, 2) for part in (fine, self.coarse)]
        return ScanEmbedding(maps[0], maps[1], self.affine, self.shape)

    def check(self) -> None:
        """Read everything and compare checksums.

        Raises:
            EmbeddingError: if a byte differs from what was written.
        """
        if _digest({key: self._section(key) for key in self._places}) != self.header.content_sha256:
            raise EmbeddingError(f"{self.path}: differs from what was written. Delete it and embed again.")

    @functools.cached_property
    def _bytes(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _section(self, key: str) -> NDArray[Any]:
        dtype, shape, start = self._places[key]
        count = int(np.prod(shape))
        return np.frombuffer(self._bytes, dtype, count, self._data_start + start).reshape(shape)

    @functools.cached_property
    def _row_of_cell(self) -> NDArray[np.int32]:
        return (np.cumsum(self.body.reshape(-1), dtype=np.int32) - 1).astype(np.int32)

    def _fine_steps(self, flat: NDArray[np.int_]) -> NDArray[np.float32]:
        """Fine vectors of some cells of the body, not of length 1 yet."""
        packed = self._section("fine")[self._row_of_cell[flat]]
        return unpack(packed, self.header.fine_bits, self.header.dim)

    def _fine_dot(self, index: NDArray | None, vector: NDArray) -> NDArray:
        if index is not None:
            vectors = self._fine_steps(index)
            return (vectors @ vector) / _lengths(vectors)
        total = np.full(int(np.prod(self.grid)), -1.0, np.float32)
        inside = np.flatnonzero(self.body.reshape(-1))
        for some in np.array_split(inside, -(-len(inside) // 16384)):  # bounds the memory of unpacked vectors
            total[some] = self._fine_dot(some, vector)
        return total


class EmbeddingFolder:
    """A folder of embeddings made by one network.

    Picklable; files are opened at first use, per process, the last ones kept open.

    Args:
        path: as ``embed_store`` or ``embed_folder`` left it.
        max_open: scans kept open.

    Raises:
        EmbeddingError: if there are none here, or they are of another format.

    Attributes:
        weights_sha256: of the network that made them all.
        threshold: score below which its matches are not to be used, if it was calibrated.
        profile: of the intensities they were made from.
    """

    def __init__(self, path: str | Path, *, max_open: int = 64) -> None:
        self.path, self.max_open = Path(path), max_open
        index = read_folder_index(self.path)
        self.weights_sha256: str = index["weights_sha256"]
        self.threshold: float | None = index.get("threshold")
        self.profile: str = index.get("profile", "ct")  # before profiles, all were of CT
        self._open = functools.lru_cache(maxsize=max_open)(self._open_file)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], max_open=state["max_open"])  # type: ignore[misc]

    def __getitem__(self, name: str) -> StoredEmbedding:
        return self._open(name)

    @property
    def names(self) -> list[str]:
        """Every scan there is, in order."""
        found = self.path.rglob(f"*{SUFFIX}")
        return sorted(p.relative_to(self.path).as_posix().removesuffix(SUFFIX) for p in found)

    def require(self, store: VolumeStore, names: Sequence[str] | None = None) -> None:
        """Refuse embeddings that are missing or were made from other scans.

        Raises:
            EmbeddingError: naming the first such scans and the way out.
        """
        if self.profile != store.profile:
            raise EmbeddingError(
                f"{self.path}: made from intensities of profile {self.profile!r}, {store.path} holds {store.profile!r}. "
                f"Embed the store's scans: alice embed {store.path} EMBEDDINGS"
            )
        wrong = []
        for name in names if names is not None else store.names:
            if not embedding_path(self.path, name).is_file():
                wrong.append(f"{name} (missing)")
            elif self._open_file(name).header.source_sha256 != store.records[name].voxels_sha256:
                wrong.append(f"{name} (made from other voxels)")
        if wrong:
            raise EmbeddingError(
                f"{self.path}: {len(wrong)} of {len(store)} scans of {store.path} have no embedding that fits: "
                f"{', '.join(wrong[:3])}. Embed them again: alice embed {store.path} {self.path}"
            )

    def keep_threshold(self, threshold: float) -> None:
        """Keep the weights' calibrated score with the embeddings that they made."""
        content = {**read_folder_index(self.path), "threshold": threshold}
        write_text(self.path / INDEX, json.dumps(content, indent=1))
        self.threshold = threshold

    def _open_file(self, name: str) -> StoredEmbedding:
        stored = StoredEmbedding(embedding_path(self.path, name))
        if stored.header.weights_sha256 != self.weights_sha256:
            raise EmbeddingError(
                f"{stored.path}: made with weights {stored.header.weights_sha256[:12]}, the folder's are "
                f"{self.weights_sha256[:12]}: they do not compare. Delete the file and embed again."
            )
        return stored


def embed_store(
    model: SAM,
    weights_sha256: str,
    store: VolumeStore,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    threshold: float | None = None,
    fine_bits: int = FINE_BITS,
    slab: int = 32,
    overwrite: bool = False,
    progress: bool = True,
    allow_profile: bool = False,
) -> list[Saved]:
    """Embed every volume of a store: ``<out>/<name>.sam``. What is there already, and fits, is kept.

    Args:
        model: in evaluation mode.
        weights_sha256: of the file its weights came from.
        store: volumes in HU.
        out: folder to write; made if missing.
        names: volumes to embed; None for all.
        threshold: the weights' calibrated score, kept with the embeddings.
        fine_bits: see :func:`save_embedding`.
        slab: see :func:`custom.landmarks.sam.embed_scan`.
        overwrite: replace what was made with other weights or from other voxels.
        progress: show a bar.
        allow_profile: embed a store of another profile than ct, which SAM was not trained on.

    Returns:
        What was written in this call.

    Raises:
        ProfileError: for a store of another profile, unless allowed.
        EmbeddingError: if the folder holds embeddings made with other weights, or of a scan that has changed,
            and ``overwrite`` is False.
    """
    require_ct(store.profile, store.path, "SAM", allow_profile)
    chosen = list(names) if names is not None else store.names
    sources = {name: store.records[name].voxels_sha256 for name in chosen}

    def read(name: str) -> tuple[Any, NDArray[np.float64]]:
        return store.read_crop(name, (0, 0, 0), store.shape(name)), store.affine(name)

    return _embed_all(
        model,
        weights_sha256,
        sources,
        read,
        Path(out),
        threshold,
        fine_bits,
        slab,
        overwrite,
        progress,
        store.profile,
    )


def embed_folder(
    model: SAM,
    weights_sha256: str,
    source: str | Path | Sequence[Scan],
    out: str | Path,
    *,
    threshold: float | None = None,
    fine_bits: int = FINE_BITS,
    slab: int = 32,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Saved]:
    """As :func:`embed_store`, of a folder of NIfTI files, a datalist or a list of scans."""
    scans = list_scans(source) if isinstance(source, str | Path) else list(source)
    images = {scan.name: scan.image for scan in scans}
    sources = {name: sha256_of_file(image) for name, image in images.items()}

    def read(name: str) -> tuple[Any, NDArray[np.float64]]:
        volume, affine = read_scan(images[name])
        return volume.numpy(), affine

    return _embed_all(
        model, weights_sha256, sources, read, Path(out), threshold, fine_bits, slab, overwrite, progress
    )


def body_cells(
    volume_hu: NDArray[Any], affine: NDArray[np.float64], embedding: ScanEmbedding
) -> NDArray[np.bool_] | None:
    """Fine cells in or near the patient's body, bool (z, y, x); None where no body is found.

    Args:
        volume_hu: (X, Y, Z).
        affine: of the volume, voxel to world mm.
        embedding: of it.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    mask, steps = body_mask(volume_hu, tuple(float(s) for s in spacing))
    if not mask.any():
        return None
    grid = tuple(embedding.fine.shape[1:])
    cells = np.indices(grid).reshape(3, -1).T
    voxels = to_voxels(affine, cell_to_world(cells, embedding.affine, "fine"))
    places = np.rint((voxels - np.array(steps) // 2) / np.array(steps)).astype(int)
    places = np.clip(places, 0, np.array(mask.shape) - 1)
    found = mask[tuple(places.T)].reshape(grid)
    wider = torch.from_numpy(found).float()[None, None]
    size = 2 * BODY_MARGIN + 1
    return torch.nn.functional.max_pool3d(wider, size, 1, BODY_MARGIN)[0, 0].numpy().astype(bool)


def embedding_path(folder: Path, name: str) -> Path:
    """Where a scan's embeddings lie."""
    return folder / f"{name}{SUFFIX}"


def read_folder_index(folder: Path) -> dict[str, Any]:
    """What holds for the whole folder, checked for its format."""
    path = folder / INDEX
    if not path.is_file():
        raise EmbeddingError(
            f"{folder}: no embeddings here ({INDEX} is missing). Make them: alice embed STORE {folder}"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EmbeddingError(f"{path}: unreadable ({error}). Delete the folder and embed again.") from error
    if index.get("format") != FORMAT:
        raise EmbeddingError(
            f"{path}: format {index.get('format')!r}, this version reads {FORMAT!r}. Embed again."
        )
    return index


def _embed_all(
    model: SAM,
    weights_sha256: str,
    sources: dict[str, str],
    read: Callable[[str], tuple[Any, NDArray[np.float64]]],
    out: Path,
    threshold: float | None,
    fine_bits: int,
    slab: int,
    overwrite: bool,
    progress: bool,
    profile: str = "ct",
) -> list[Saved]:
    if (out / INDEX).is_file() and not overwrite:
        made = read_folder_index(out)
        if made["weights_sha256"] != weights_sha256:
            raise EmbeddingError(
                f"{out}: made with weights {made['weights_sha256'][:12]}, now {weights_sha256[:12]} are given, and "
                "their embeddings do not compare. Choose another folder, or overwrite."
            )
        if made.get("profile", "ct") != profile:
            raise EmbeddingError(
                f"{out}: made from intensities of profile {made.get('profile', 'ct')!r}, now {profile!r} are given. "
                "Choose another folder."
            )
        threshold = made.get("threshold") if threshold is None else threshold
    todo = [
        name
        for name in sources
        if _needs_embedding(out, name, weights_sha256, sources[name], fine_bits, overwrite)
    ]
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "format": FORMAT,
        "weights_sha256": weights_sha256,
        "threshold": threshold,
        "profile": profile,
        "network": model.settings,
    }
    write_text(out / INDEX, json.dumps(index, indent=1))

    written = []
    for name in tqdm(todo, desc="embed", disable=not progress or not todo):
        volume, affine = read(name)
        embedding = embed_scan(model, (volume, affine), slab=slab)
        body = body_cells(volume, affine, embedding)
        if body is None:
            logger.warning("%s: no body found (nothing above -500 HU); all of the scan is embedded.", name)
        path = embedding_path(out, name)
        written.append(
            save_embedding(
                path, embedding, weights_sha256, sources[name], name=name, body=body, fine_bits=fine_bits
            )
        )
    return written


def _needs_embedding(
    out: Path, name: str, weights: str, source: str, fine_bits: int, overwrite: bool
) -> bool:
    path = embedding_path(out, name)
    if not path.is_file():
        return True
    try:
        header = StoredEmbedding(path).header
    except EmbeddingError:
        if overwrite:
            return True
        raise
    if header.weights_sha256 == weights and header.source_sha256 == source:
        return header.fine_bits != fine_bits
    if overwrite:
        return True
    what = "with other weights" if header.weights_sha256 != weights else "from a scan that has changed since"
    raise EmbeddingError(f"{path}: made {what}. Delete it, choose another folder, or overwrite.")


def _pooled_body(body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(body, [(0, n % 2) for n in body.shape])
    z, y, x = (n // 2 for n in padded.shape)
    return np.asarray(padded.reshape(z, 2, y, 2, x, 2).any(axis=(1, 3, 5)))


def _lengths(rows: NDArray[Any]) -> NDArray[np.float32]:
    rows = rows.astype(np.float32, copy=False)
    return np.maximum(np.sqrt(np.einsum("nc,nc->n", rows, rows)), 1e-12)


def _digest(sections: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(sections):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(sections[key]).tobytes())
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[EmbeddingHeader, dict[str, tuple[Any, tuple[int, ...], int]], int]:
    """Of a safetensors file: ours, where each section lies (dtype, shape, first byte), and where data begin."""
    if not path.is_file():
        raise EmbeddingError(f"{path}: missing. Embed the scan: alice embed STORE {path.parent}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise EmbeddingError(f"{path}: no embedding, or cut short. Delete it and embed again.")
        raw = file.read(length)
    try:
        table = json.loads(raw)
        metadata = json.loads(table.pop("__metadata__")["alice"])
        found = metadata.pop("format")
        if found != FORMAT:
            raise EmbeddingError(f"{path}: format {found!r}, this version reads {FORMAT!r}. Embed again.")
        header = EmbeddingHeader(**metadata)
        places = {
            key: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), int(entry["data_offsets"][0]))
            for key, entry in table.items()
        }
        end = max(int(entry["data_offsets"][1]) for entry in table.values())
        right_types = all(entry["dtype"] == _SECTIONS.get(key) for key, entry in table.items())
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EmbeddingError(
            f"{path}: no embedding, or damaged ({error}). Delete it and embed again."
        ) from error
    if set(places) != set(_SECTIONS) or not right_types or size != 8 + length + end:
        raise EmbeddingError(f"{path}: cut short or damaged. Delete it and embed again.")
    return header, places, 8 + length
