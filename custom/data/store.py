"""A folder of chunked, compressed volumes on one grid, read crop by crop."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

FORMAT = "alice-store-1"
CHUNK = 64  # voxels a side: a 192x192x64 crop touches few chunks (spec, performance.md section 4)
BLOCK = 16


class StoreError(ValueError):
    """A store that cannot be used; the message names the file and the way out."""


@dataclass
class VolumeRecord:
    """What the index says of one volume."""

    name: str
    patient: str
    shape: list[int]  # voxels along x, y, z
    affine: list[list[float]]  # voxel to world, RAS mm
    body_box: list[list[int]]  # first and one-past-last voxel of the body along x, y, z
    body_step: list[int]  # voxels per cell of the body mask
    source: str
    source_sha256: str
    voxels_sha256: str
    label_sha256: str | None = None
    labels: list[int] = field(default_factory=list)
    source_stamp: dict[str, int] = field(default_factory=dict)  # size and mtime_ns


class VolumeStore:
    """Volumes in int16 HU, with affine, body mask and (optionally) labels.

    Safe to use from many workers: what is opened is opened per process, and files are only ever replaced whole.

    Args:
        path: the store's folder, as ``build_store`` leaves it.

    Raises:
        StoreError: if the folder holds no store, or one of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = read_index(self.path)
        self.spacing: tuple[float, ...] = tuple(index["settings"]["spacing"])
        self.settings: dict[str, Any] = index["settings"]
        self.records = {name: VolumeRecord(**record) for name, record in sorted(index["volumes"].items())}
        self._open = functools.lru_cache(maxsize=128)(self._open_array)

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(maxsize=128)(self._open_array)

    @property
    def names(self) -> list[str]:
        """Every volume, in order."""
        return list(self.records)

    def patient(self, name: str) -> str:
        """Whose scan it is."""
        return self._record(name).patient

    def shape(self, name: str) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self._record(name).shape
        return x, y, z

    def affine(self, name: str) -> np.ndarray:
        """Voxel to world in RAS mm, (4, 4)."""
        return np.array(self._record(name).affine)

    def body_box_mm(self, name: str) -> np.ndarray:
        """The body's box along the volume's own axes: (2, 3), outer corners in voxel coordinates."""
        return np.array(self._record(name).body_box, dtype=float) - 0.5

    def body_voxels(self, name: str) -> np.ndarray:
        """Voxels of the body on the coarse grid, (n, 3) int."""
        return _body_voxels(self.path, name, tuple(self._record(name).body_step))

    def read_crop(
        self, name: str, start: Sequence[int], size: Sequence[int], fill: int = -1024
    ) -> np.ndarray:
        """A box of voxels, padded with ``fill`` where it leaves the volume.

        Args:
            name: of the volume.
            start: first voxel along x, y, z; may be negative.
            size: voxels along x, y, z.
            fill: HU outside the volume.

        Returns:
            int16 (size).
        """
        return self._read(name, "hu", start, size, fill, np.int16)

    def read_label_crop(self, name: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """As :meth:`read_crop`, of the label map, uint8, 0 outside."""
        if not self.has_label(name):
            raise StoreError(f"{self.path}: {name} has no label.")
        return self._read(name, "label", start, size, 0, np.uint8)

    def has_label(self, name: str) -> bool:
        """Whether a label map was stored with the scan."""
        return self._record(name).label_sha256 is not None

    def check(self) -> dict[str, str]:
        """Decode every volume and compare checksums: name -> what is wrong; empty if all is well."""
        faults = {}
        for name, record in self.records.items():
            for kind, wanted in (("hu", record.voxels_sha256), ("label", record.label_sha256)):
                if wanted is None:
                    continue
                try:
                    array = self._open_array(name, kind)[:]
                except (RuntimeError, StoreError, ValueError) as error:
                    faults[name] = str(error)
                    continue
                if sha256_of_array(array) != wanted:
                    faults[name] = (
                        f"{volume_path(self.path, name, kind)}: voxels differ from what was written"
                    )
        return faults

    def _read(
        self, name: str, kind: str, start: Sequence[int], size: Sequence[int], fill: int, dtype: Any
    ) -> np.ndarray:
        shape = self._record(name).shape
        inner = [(max(s, 0), min(s + n, limit)) for s, n, limit in zip(start, size, shape, strict=True)]
        out = np.full(tuple(size), fill, dtype=dtype)
        if all(a < b for a, b in inner):
            place = tuple(slice(a - s, b - s) for (a, b), s in zip(inner, start, strict=True))
            try:
                out[place] = self._open(name, kind)[tuple(slice(a, b) for a, b in inner)]
            except RuntimeError as error:
                raise StoreError(
                    f"{volume_path(self.path, name, kind)}: damaged ({error}). Delete it and build the store again."
                ) from error
        return out

    def _open_array(self, name: str, kind: str) -> Any:
        path = volume_path(self.path, name, kind)
        if not path.is_file():
            raise StoreError(f"{path}: missing. Build the store again; finished volumes are kept.")
        try:
            # one thread: parallelism comes from the workers, and a forked worker must not inherit a thread pool
            return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        except RuntimeError as error:
            raise StoreError(f"{path}: damaged ({error}). Delete it and build the store again.") from error

    def _record(self, name: str) -> VolumeRecord:
        if name not in self.records:
            raise StoreError(f"{self.path}: holds no volume {name!r}.")
        return self.records[name]


@functools.lru_cache(maxsize=64)  # a large scan's voxels are some MiB
def _body_voxels(path: Path, name: str, step: tuple[int, ...]) -> np.ndarray:
    packed = blosc2.open(str(volume_path(path, name, "body")), mode="r", dparams={"nthreads": 1})[:]
    return np.argwhere(packed) * np.array(step) + np.array(step) // 2


def volume_path(store: Path, name: str, kind: str) -> Path:
    """Where a volume's ``hu``, ``label`` or ``body`` lies."""
    return store / "volumes" / f"{name}.{kind}.b2nd"


def read_index(store: Path) -> dict[str, Any]:
    """The store's index, checked for its format."""
    path = store / "index.json"
    if not path.is_file():
        raise StoreError(
            f"{store}: no store here (index.json is missing). Make one: alice build SCANS {store}"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StoreError(f"{path}: unreadable ({error}). Delete the store and build it again.") from error
    if index.get("format") != FORMAT:
        raise StoreError(
            f"{path}: format {index.get('format')!r}, this version reads {FORMAT!r}. Build it again."
        )
    return index


def write_index(
    store: Path,
    settings: dict[str, Any],
    records: dict[str, VolumeRecord],
    extra: dict[str, Any] | None = None,
) -> None:
    """Replace the index whole; ``extra`` is kept beside settings and volumes."""
    content = (extra or {}) | {
        "format": FORMAT,
        "settings": settings,
        "volumes": {n: asdict(r) for n, r in sorted(records.items())},
    }
    write_text(store / "index.json", json.dumps(content, indent=1))


def write_array(path: Path, array: np.ndarray) -> None:
    """One compressed file, written beside its place and moved there when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        chunks = tuple(min(CHUNK, n) for n in array.shape)
        blocks = tuple(min(BLOCK, n) for n in chunks)
        blosc2.asarray(
            np.ascontiguousarray(array),
            chunks=chunks,
            blocks=blocks,
            cparams={
                "codec": blosc2.Codec.ZSTD,
                "clevel": 3,
                "filters": [blosc2.Filter.SHUFFLE],
                "nthreads": 1,
            },
            urlpath=str(temporary),
            mode="w",
        )
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # blosc2 reports a full disk as RuntimeError
        raise StoreError(
            f"{path}: cannot be written ({error}). Make room on the disk and build again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error}). Make room on the disk and build again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of_array(array: np.ndarray) -> str:
    """Of the voxels, independent of how they are compressed."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
