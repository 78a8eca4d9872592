"""The store: a folder of compressed volumes on one grid, read crop by crop."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.errors import DamagedScan, StoreError
from custom.data.grid.profiles import PROFILES, profile_of, window_of
from custom.data.remote import RemoteFolder, is_url
from custom.data.store.chunked_array import CHUNK, MAKE_ROOM, ChunkedArray
from custom.data.store.records import Records, VolumeRecord
from custom.files import is_plain_name, read_json, write_text

FORMAT = "alice-store-3"


class VolumeStore:
    """Volumes in int16 (HU, or as their profile says), with affine, body mask and (optionally) labels.

    Many workers can use it: every process opens its own files, and files are only replaced as a whole. Checksums are
    compared when a part of a file is first read.

    Args:
        path: the folder that ``build_store`` wrote, or its URL, with any protocol that fsspec knows.
        cache: for a URL: folder for copies of its files, which are fetched when first read.

    Raises:
        StoreError: if there is no store, or one of another format.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None) -> None:
        self._remote = RemoteFolder(str(path), cache) if is_url(path) else None
        if self._remote is None:
            self.path = Path(path)
        else:
            self.path = self._remote.folder
            self._remote.fetch("index.json", refresh=True)
        index = read_index(self.path)
        self.settings: dict[str, Any] = index["settings"]
        self.spacing: tuple[float, ...] = tuple(self.settings["spacing"])
        self.records: Mapping[str, VolumeRecord] = Records(index["volumes"])
        self._open = functools.lru_cache(maxsize=128)(self._open_array)
        self._body = functools.lru_cache(maxsize=64)(self._body_voxels)  # some MiB for a large scan

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_body")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(maxsize=128)(self._open_array)
        self._body = functools.lru_cache(maxsize=64)(self._body_voxels)

    @property
    def names(self) -> list[str]:
        """The names of all volumes, in order."""
        return list(self.records)

    @property
    def profile(self) -> str:
        """The profile of the intensities: ct, mr or zscore."""
        return str(self.settings["profile"])

    def window(self, window_hu: Sequence[float]) -> tuple[float, float]:
        """The stored values that become 0 and 1: for CT ``window_hu``, else the profile's own."""
        return window_of(self.profile, window_hu)

    def air(self, name: str) -> int:
        """The stored value of air in a volume; it also stands for everything outside of the volume."""
        return int(self._record(name).scaling.get("air", PROFILES[self.profile].air))

    def patient(self, name: str) -> str:
        """The patient of a volume."""
        if name in self.records and isinstance(self.records, Records):
            return self.records.patient(name)
        return self._record(name).patient

    def shape(self, name: str) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self._record(name).shape
        return x, y, z

    def affine(self, name: str) -> np.ndarray:
        """Voxel to world in RAS mm, (4, 4)."""
        return np.array(self._record(name).affine)

    def body_box_mm(self, name: str) -> np.ndarray:
        """The outer corners of the body's box in voxel coordinates, (2, 3)."""
        return np.array(self._record(name).body_box, dtype=float) - 0.5

    def body_voxels(self, name: str) -> np.ndarray:
        """The centres of the body mask's cells that lie in the body, in voxels, (n, 3) int."""
        return self._body(name)

    def read_crop(
        self, name: str, start: Sequence[int], size: Sequence[int], fill: int | None = None
    ) -> np.ndarray:
        """A box of voxels. Where it leaves the volume, it is filled.

        Args:
            name: of the volume.
            start: first voxel along x, y, z; may be negative.
            size: voxels along x, y, z.
            fill: value outside of the volume; None for air.

        Returns:
            int16 (size).

        Raises:
            DamagedScan: if the file is missing, or the checksum of a chunk differs.
        """
        return self._read(name, "hu", start, size, self.air(name) if fill is None else fill, np.int16)

    def read_label_crop(self, name: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """As :meth:`read_crop`, but of the label map: uint8, 0 outside of the volume."""
        if not self.has_label(name):
            raise StoreError(f"{self.path}: {name} has no label.")
        return self._read(name, "label", start, size, 0, np.uint8)

    def has_label(self, name: str) -> bool:
        """Whether the volume has a label map."""
        return self._record(name).label_sha256 is not None

    def verify(self, name: str) -> None:
        """Compare the checksums of all chunks of a volume and its body mask, without decompressing them.

        Raises:
            DamagedScan: if one differs, or a file is missing.
        """
        for kind in ("hu", "body"):
            array = self._open(name, kind)
            with self._named(name, kind):
                array.verify()

    def check(self) -> dict[str, str]:
        """Decode every file and compare its checksums: name -> what is wrong; empty if nothing is."""
        return dict(self.faults())

    def faults(self) -> Iterator[tuple[str, str]]:
        """Name and fault of every damaged file, as they are found."""
        for name, record in self.records.items():
            wanted = {"hu": record.voxels_sha256, "label": record.label_sha256, "body": None}
            for kind, digest in wanted.items():
                if kind == "label" and digest is None:
                    continue
                try:
                    found = self._digest(name, kind)
                except DamagedScan as error:
                    yield name, str(error)
                    continue
                if digest is not None and found != digest:
                    yield name, f"{self._where(name, kind)}: voxels differ from what was written."

    def _digest(self, name: str, kind: str) -> str:
        """SHA-256 of all voxels of a file, read slab by slab."""
        array = self._open_array(name, kind)
        digest = hashlib.sha256()
        with self._named(name, kind):
            for x in range(0, array.shape[0], CHUNK):
                end = min(x + CHUNK, array.shape[0])
                digest.update(np.ascontiguousarray(array.read((x, 0, 0), (end, *array.shape[1:]))))
        return digest.hexdigest()

    def _read(
        self, name: str, kind: str, start: Sequence[int], size: Sequence[int], fill: int, dtype: Any
    ) -> np.ndarray:
        shape = self._record(name).shape
        inner = [(max(s, 0), min(s + n, limit)) for s, n, limit in zip(start, size, shape, strict=True)]
        if not all(a < b for a, b in inner):
            return np.full(tuple(size), fill, dtype=dtype)
        array = self._open(name, kind)
        with self._named(name, kind):
            found = array.read(tuple(a for a, _ in inner), tuple(b for _, b in inner))
        if found.shape == tuple(size):
            return found
        out = np.full(tuple(size), fill, dtype=dtype)
        out[tuple(slice(a - s, b - s) for (a, b), s in zip(inner, start, strict=True))] = found
        return out

    def _body_voxels(self, name: str) -> np.ndarray:
        array, step = self._open(name, "body"), np.array(self._record(name).body_step)
        with self._named(name, "body"):
            return np.argwhere(array.read((0, 0, 0), array.shape)) * step + step // 2

    def _open_array(self, name: str, kind: str) -> ChunkedArray:
        with self._named(name, kind):
            array = ChunkedArray(self._file(name, kind))
            wanted = self._record(name).shape
            if kind != "body" and list(array.shape) != wanted:
                raise RuntimeError(f"has shape {list(array.shape)}, {wanted} was written")
        return array

    def _file(self, name: str, kind: str) -> Path:
        path = volume_path(self.path, name, kind)
        if self._remote is not None:
            inside = path.relative_to(self.path).as_posix()
            return self._remote.fetch(inside, version=self._record(name).voxels_sha256)
        if not path.is_file():
            raise FileNotFoundError
        return path

    def _where(self, name: str, kind: str) -> str:
        path = volume_path(self.path, name, kind)
        return str(path) if self._remote is None else f"{self._remote.url}/{path.relative_to(self.path)}"

    @contextlib.contextmanager
    def _named(self, name: str, kind: str) -> Iterator[None]:
        """Add to an error the name of the file, and what to do."""
        try:
            yield
        except FileNotFoundError as error:
            raise DamagedScan(
                f"{self._where(name, kind)}: missing. Build the store again; finished volumes are kept.", name
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, DamagedScan):
                raise
            what = str(error) or type(error).__name__
            way_out = "Delete it and build the store again."
            if self._remote is not None:
                way_out = (
                    f"Delete its copy under {self.path} to fetch it again, or mend the store at the URL."
                )
            raise DamagedScan(f"{self._where(name, kind)}: damaged ({what}). {way_out}", name) from error

    def _record(self, name: str) -> VolumeRecord:
        if name not in self.records:
            raise StoreError(f"{self.path}: holds no volume {name!r}.")
        return self.records[name]


def volume_path(store: Path, name: str, kind: str) -> Path:
    """The file of a volume's ``hu``, ``label`` or ``body``; errors as :func:`require_plain_name`."""
    require_plain_name(store, name)
    return store / "volumes" / f"{name}.{kind}.b2nd"


def require_plain_name(store: Path, name: object) -> None:
    """Refuse a volume whose files would lie outside of the store.

    Raises:
        StoreError: naming the volume.
    """
    if not is_plain_name(name):
        raise StoreError(
            f"{store}: a volume is called {name!r}, which cannot name a file in the store. Build the store again."
        )


def read_index(store: Path) -> dict[str, Any]:
    """The index of a store.

    Raises:
        StoreError: if it is missing, unreadable, or of another format.
    """
    path = store / "index.json"
    if not path.is_file():
        raise StoreError(
            f"{store}: no store here (index.json is missing). Make one: alice build SCANS {store}"
        )
    index = read_json(
        path, error=StoreError, advice="Delete it and build the store again; finished volumes are kept."
    )
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise StoreError(
            f"{path}: format {found!r}, this version reads {FORMAT!r}. Delete the store and build it again."
        )
    settings, volumes = index.get("settings"), index.get("volumes")
    if not isinstance(settings, dict) or not isinstance(volumes, dict):
        raise StoreError(f"{path}: lacks its settings or volumes. Delete the store and build it again.")
    profile_of(str(settings.get("profile")))
    for name in volumes:
        require_plain_name(store, name)
    return index


def store_text(path: Path, text: str) -> None:
    """Write one of a store's JSON files.

    Raises:
        StoreError: if it cannot be written.
    """
    write_text(path, text, sync=True, error=StoreError, advice=MAKE_ROOM)


def write_index(
    store: Path,
    settings: dict[str, Any],
    records: dict[str, VolumeRecord],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the index; ``extra`` is kept beside settings and volumes."""
    content = (extra or {}) | {
        "format": FORMAT,
        "settings": settings,
        "volumes": {n: asdict(r) for n, r in sorted(records.items())},
    }
    store_text(store / "index.json", json.dumps(content, indent=1))


def sha256_of_array(array: np.ndarray) -> str:
    """SHA-256 of the voxels; it does not depend on the compression."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
