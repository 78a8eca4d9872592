"""Convert one scan for a store: read, check, orient, resample, cut to the body and compress it, slab by slab."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.errors import ScanError, StoreError
from custom.data.formats.dicom_volume import read_series
from custom.data.formats.open_scan import Voxels, open_scan
from custom.data.formats.reasons import Fault
from custom.data.formats.voxels import MOST_BYTES
from custom.data.grid.body import body_box, body_mask, crop_box, near_body
from custom.data.grid.orientation import is_same_grid, to_ras
from custom.data.grid.profiles import PROFILES, Values, body_threshold, scaling, to_hu, to_stored
from custom.data.grid.resample import Regrid, regrid, resample_part
from custom.data.scans import Scan
from custom.data.store.chunked_array import CHUNK, ArrayWriter, write_array
from custom.data.store.records import VolumeRecord
from custom.data.store.volume_store import require_plain_name, store_text, volume_path
from custom.files import sha256_of_file

_SLAB = 1 << 24  # voxels of the scan that are converted at a time: 64 MiB as float32 (ours)
_IN_MEMORY = 1 << 28  # bytes; a larger resampled scan is kept in a temporary file (ours)


def convert(scan: Scan, store: Path, settings: dict[str, Any], most_bytes: int = MOST_BYTES) -> VolumeRecord:
    """Write the files of one scan. Its record comes last, so a volume with a record is complete.

    It needs memory for the scan as its file stores it (2 bytes for each voxel of most CT), and some hundred MB.

    Args:
        scan: to convert.
        store: folder to write.
        settings: of the store, from ``BuildSettings.stored``.
        most_bytes: of voxels in its file and in the store; a larger scan is refused before it is read.

    Raises:
        ScanError: if the scan cannot be used.
        StoreError: if its files cannot be written.
    """
    profile, spacing = settings["profile"], tuple(settings["spacing"])
    voxels = _open(scan, most_bytes)
    source_grid = voxels.raw.shape, voxels.affine
    with _resampled(scan, voxels, spacing, profile, store, most_bytes) as (volume, affine):
        del voxels
        body, steps = body_mask(volume, spacing, threshold=body_threshold(volume, profile))
        if not body.any():
            raise ScanError(
                f"{scan.image}: no body found (nothing above {body_threshold(volume, profile):g}). Leave it out."
            )
        try:
            scaled = {} if profile == "ct" else scaling(volume, body, steps, profile)
        except ScanError as error:
            raise ScanError(f"{scan.image}: {error} Leave it out.") from error
        low, high = (0, 0, 0), volume.shape
        if settings["crop_margin_mm"] is not None:
            low, high = crop_box(body, steps, volume.shape, spacing, settings["crop_margin_mm"])
        label_sha256, labels = _write_label(scan, source_grid, spacing, store, low, high, most_bytes)
        cells = tuple(slice(a // s, -(-b // s)) for a, b, s in zip(low, high, steps, strict=True))
        kept = body[cells]
        write_array(volume_path(store, scan.name, "body"), kept.astype(np.uint8))
        air = int(scaled.get("air", PROFILES[profile].air))
        with ArrayWriter(
            volume_path(store, scan.name, "hu"),
            tuple(b - a for a, b in zip(low, high, strict=True)),
            np.int16,
        ) as writer:
            for start in range(low[0], high[0], CHUNK):
                end = min(start + CHUNK, high[0])
                slab = to_stored(volume[start:end, low[1] : high[1], low[2] : high[2]], scaled, profile)
                if settings["remove_table"]:
                    inside = near_body(body, steps, (start, *low[1:]), (end, *high[1:]))
                    slab = np.where(inside, slab, np.int16(air))
                writer.write(slab)
                _let_go(volume)
    moved = np.array(affine)
    moved[:3, 3] = (affine @ np.r_[low, 1.0])[:3]
    first, last = body_box(kept, steps, writer.shape)
    record = VolumeRecord(
        name=scan.name,
        patient=scan.patient,
        shape=list(writer.shape),
        affine=moved.tolist(),
        body_box=[list(first), list(last)],
        body_step=list(steps),
        source=scan.image.name,
        source_sha256=sha256_of_file(scan.image),
        source_stamp=stamp(scan.image),
        voxels_sha256=writer.sha256,
        label_sha256=label_sha256,
        labels=labels,
        crop_start=list(low),
        scaling=scaled,
    )
    store_text(record_path(store, scan.name), json.dumps(asdict(record) | {"settings": settings}))
    return record


def record_path(store: Path, name: str) -> Path:
    """The file with the record of a finished volume; errors as :func:`require_plain_name`."""
    require_plain_name(store, name)
    return store / "volumes" / f"{name}.json"


def stamp(path: Path) -> dict[str, int]:
    """Size and time of a file, which show without reading it whether it has changed."""
    try:
        found = path.stat()
    except OSError:
        return {"size": -1, "mtime_ns": -1}
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _open(scan: Scan, most_bytes: int) -> Voxels:
    if files := scan.extra.get("files"):  # a DICOM series
        return Voxels(*read_series([Path(file) for file in files], most_bytes))
    return _open_file(scan.image, most_bytes)


def _open_file(path: Path, most_bytes: int) -> Voxels:
    if not path.is_file():
        raise ScanError(f"{path}: no such file.")
    try:
        return open_scan(path, most_bytes=most_bytes)
    except Fault as fault:
        raise ScanError(f"{path}: {fault}") from fault


@contextlib.contextmanager
def _resampled(
    scan: Scan, voxels: Voxels, spacing: tuple[float, ...], profile: str, folder: Path, most_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The scan on the store's grid, and its affine. CT is int16 HU, other profiles are float32."""
    turned, turned_affine = to_ras(voxels.raw, voxels.affine)
    plan = regrid(turned.shape, turned_affine, spacing)
    dtype = np.dtype(np.int16 if profile == "ct" else np.float32)
    if (size := math.prod(plan.shape) * dtype.itemsize) > most_bytes:  # a small file can claim huge voxels
        raise ScanError(
            f"{scan.image}: has {size} bytes of voxels at {list(spacing)} mm, most_bytes is {most_bytes}. Leave it out, "
            "or set a coarser spacing or a larger most_bytes."
        )
    axis = int(np.argmax(np.abs(turned.strides)))  # slabs that are contiguous in memory
    values = Values(scan.image)
    for _, part in _slabs(turned, plan, axis, halo=False):
        values.see(voxels.scaled(part))
    values.judge(profile)
    with _workspace(plan.shape, dtype, folder) as volume:
        for (start, stop), part in _slabs(turned, plan, axis):
            known = voxels.scaled(part)
            known = to_hu(known) if profile == "ct" else known.astype(np.float32)
            place = [slice(None)] * 3
            place[axis] = slice(start, stop)
            volume[tuple(place)] = resample_part(known, plan, axis, start, stop)
            _let_go(volume)
        yield volume, plan.affine


def _slabs(
    volume: np.ndarray, plan: Regrid, axis: int, halo: bool = True
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Range of new voxels along the axis, and the old voxels that they are made of.

    Without ``halo``: every old voxel once.
    """
    area = math.prod(n for a, n in enumerate(volume.shape) if a != axis)
    planes = max(1, _SLAB // max(area, 1))  # of the scan
    if halo:  # as many new planes as these become, but no more than fit into as much room
        new_area = math.prod(n for a, n in enumerate(plan.shape) if a != axis)
        planes = max(1, min(int(planes / plan.factors[axis]), _SLAB // new_area))
    length = volume.shape[axis] if not halo else plan.shape[axis]
    for start in range(0, length, planes):
        stop = min(start + planes, length)
        a, b = plan.needed(axis, start, stop) if halo else (start, stop)
        place = [slice(None)] * 3
        place[axis] = slice(a, b)
        yield (start, stop), volume[tuple(place)]


@contextlib.contextmanager
def _workspace(shape: tuple[int, ...], dtype: np.dtype, folder: Path) -> Iterator[np.ndarray]:
    """Room for a volume: memory, or a temporary file if it is large."""
    size = math.prod(shape) * dtype.itemsize
    if size <= _IN_MEMORY:
        yield np.empty(shape, dtype)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"work.{platform.node()}.{os.getpid()}.tmp"
    try:
        with open(path, "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # reports a full disk here; later it would be a bus error
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            yield np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error}). Make room on the disk and build again."
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _let_go(volume: np.ndarray) -> None:
    """Free the memory of what was written to a temporary file."""
    if isinstance(volume, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        volume._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _write_label(
    scan: Scan,
    source_grid: tuple[tuple[int, ...], np.ndarray],
    spacing: tuple[float, ...],
    store: Path,
    low: tuple[int, ...],
    high: tuple[int, ...],
    most_bytes: int,
) -> tuple[str | None, list[int]]:
    """Write the label map, cut like its image. Returns its SHA-256 and the labels in it."""
    if scan.label is None:
        return None, []
    shape, affine = source_grid
    voxels = _open_file(scan.label, most_bytes)
    if not is_same_grid(voxels.raw.shape, voxels.affine, shape, affine):
        raise ScanError(
            f"{scan.label}: shape {voxels.raw.shape} or position differs from its image {scan.image} {shape}."
        )
    own_affine, own_shape = voxels.affine, voxels.raw.shape
    label = np.empty(own_shape, np.uint8, order="F")
    planes = max(1, _SLAB // math.prod(own_shape[:2]))
    for z in range(0, own_shape[2], planes):
        part = voxels.scaled(voxels.raw[..., z : z + planes])
        if not (part.min() >= 0 and part.max() <= 255 and np.array_equal(part, np.rint(part))):
            raise ScanError(
                f"{scan.label}: labels must be whole numbers from 0 to 255, found {part.min():g} to {part.max():g}."
            )
        label[..., z : z + planes] = part
    del voxels
    turned, _ = to_ras(label, own_affine)
    _, turned_affine = to_ras(np.broadcast_to(np.uint8(0), shape), affine)
    plan = regrid(turned.shape, turned_affine, spacing)
    whole = resample_part(turned, plan, 2, 0, plan.shape[2], nearest=True)
    kept = whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return write_array(volume_path(store, scan.name, "label"), kept), [int(v) for v in np.unique(kept) if v]
