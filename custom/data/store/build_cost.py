"""How much disk and time a build will need, estimated from headers before anything is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from custom.data.arguments import worker_count
from custom.data.errors import StoreError
from custom.data.scans import Scan
from custom.data.store.settings import MARGIN_MM, SPACING

# Measured, see docs/data.md: bytes for each voxel of the store (0.9 to 1.3 on real CT), and seconds on one core.
BYTES_A_VOXEL = 1.1
READ_SECONDS = 2.5e-8  # for each voxel of the scan: unpack and resample
WRITE_SECONDS = 2.0e-8  # for each voxel of the store: compress
_PACKED = 0.45  # size of a .nii.gz, .nrrd or .mha over that of its voxels, where no header was read
_SPARE = 1.1  # ask for more room than estimated


@dataclass
class BuildCost:
    """What the rest of a build will need."""

    volumes: int
    bytes: int  # at most, on the store's disk; a body smaller than its scan needs less
    seconds: float  # with all workers
    free: int  # bytes

    def __str__(self) -> str:
        return (
            f"{self.volumes} volumes to build: up to {_size(self.bytes)} of {_size(self.free)} free, "
            f"about {_time(self.seconds)}."
        )

    def refuse_small_disk(self, store: Path) -> None:
        """Refuse a build that the disk may have no room for.

        Raises:
            StoreError: if the disk has less room than the build needs at most.
        """
        if self.bytes > self.free:
            raise StoreError(
                f"{store}: the build needs up to {_size(self.bytes)}, the disk has {_size(self.free)} free. Choose "
                "another disk or a coarser spacing, or build all the same with check_disk=False."
            )


def build_cost(
    scans: Sequence[Scan],
    store: Path,
    spacing: Sequence[float] = SPACING,
    margin_mm: float | None = MARGIN_MM,
    workers: int | None = None,
) -> BuildCost:
    """Estimate a build.

    Args:
        scans: to be built. A manifest puts their ``shape``, ``spacing_mm`` and ``body_mm`` into ``extra``. Without
            these the header is read (NIfTI), or the size of the file is taken.
        store: folder to write.
        spacing: of the store, mm along x, y, z.
        margin_mm: air kept around the body; None if volumes are not cut.
        workers: processes; None takes :func:`custom.data.arguments.default_workers`.
    """
    workers = worker_count(workers)
    sizes = np.array([_voxels(scan, spacing, margin_mm) for scan in scans]).reshape(-1, 2)
    (old, new), largest = sizes.sum(axis=0), sizes[:, 1].max(initial=0.0)
    labels = sum(scan.label is not None for scan in scans) / max(len(scans), 1)
    size = new * (BYTES_A_VOXEL + 0.05 * labels) * _SPARE
    size += workers * largest * 2 if largest * 2 > 1 << 28 else 0  # temporary files of large scans
    seconds = (old * READ_SECONDS + new * WRITE_SECONDS) / max(1, min(workers, len(scans)))
    return BuildCost(len(scans), int(size), float(seconds), shutil.disk_usage(_existing(store)).free)


def default_build_cost(scans: Sequence[Scan], folder: Path) -> str:
    """One sentence: what ``alice build`` needs with its default settings, before it is known where to build."""
    workers = worker_count(None)
    cost = build_cost(scans, folder, workers=workers)
    voxel = " x ".join(f"{size:g}" for size in SPACING)
    return (
        f"alice build at {voxel} mm: up to {_size(cost.bytes)} of disk, about {_time(cost.seconds)} "
        f"with {workers} processes"
    )


def _voxels(scan: Scan, spacing: Sequence[float], margin_mm: float | None) -> tuple[float, float]:
    """Voxels of the scan, and voxels in the store."""
    shape, voxel_mm = scan.extra.get("shape"), scan.extra.get("spacing_mm")
    if not shape and scan.image.name.lower().endswith((".nii", ".nii.gz")):
        try:
            header = nib.load(scan.image).header
            shape, voxel_mm = header.get_data_shape()[:3], header.get_zooms()[:3]
        except Exception:  # the build will refuse a file that is not an image, and name it
            return 0.0, 0.0
    if not shape or not voxel_mm or len(shape) != 3 or not all(voxel_mm):
        files = scan.extra.get("files") or [scan.image]
        size = sum(Path(file).stat().st_size for file in files if Path(file).is_file())
        return size / 2 / _PACKED, size / 2 / _PACKED
    extent = np.array(shape, dtype=float) * np.array(voxel_mm)
    if margin_mm is not None and scan.extra.get("body_mm"):
        extent = np.minimum(extent, np.array(scan.extra["body_mm"]) + 2 * margin_mm + 12)
    return float(math.prod(shape)), float(np.prod(extent / np.array(spacing)))


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
