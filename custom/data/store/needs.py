"""What a build will need: disk and time, told from headers before anything is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.errors import StoreError
from custom.data.scans import Scan

SPACING = (1.5, 1.5, 2.0)  # mm of a store, unless another is asked for
MARGIN_MM = 10.0  # of air kept around the body (ours)
# Measured, see docs/data.md: bytes a voxel of the store (0.9 to 1.3 on real CT), and seconds of one core.
BYTES_A_VOXEL = 1.1
READ_SECONDS = 2.5e-8  # a voxel of the scan: unpacked and resampled
WRITE_SECONDS = 2.0e-8  # a voxel of the store: compressed
_PACKED = 0.45  # bytes of a .nii.gz, .nrrd or .mha a byte of its voxels, where no header was read
_SPARE = 1.1  # room asked for beyond the estimate


@dataclass
class Needs:
    """What is left to do of a build."""

    volumes: int
    bytes: int  # on the store's disk, at most (a body smaller than its scan needs less)
    seconds: float  # with all workers
    free: int  # bytes

    def __str__(self) -> str:
        return (
            f"{self.volumes} volumes to build: up to {_size(self.bytes)} of {_size(self.free)} free, "
            f"about {_time(self.seconds)}."
        )

    def of_a_build(self) -> str:
        """Disk and time alone, before it is known where to."""
        return f"up to {_size(self.bytes)} of disk, about {_time(self.seconds)}"

    def refuse_small_disk(self, store: Path) -> None:
        """Refuse before anything is written.

        Raises:
            StoreError: if the disk has less room than the build needs at most.
        """
        if self.bytes > self.free:
            raise StoreError(
                f"{store}: the build needs up to {_size(self.bytes)}, the disk has {_size(self.free)} free. Choose "
                "another disk or a coarser spacing, or build all the same with check_disk=False."
            )


def needs_of(scans: Sequence[Scan], store: Path, settings: dict[str, Any], workers: int) -> Needs:
    """Estimate a build.

    Args:
        scans: that are to be built; ``extra["shape"]``, ``["spacing_mm"]`` and ``["body_mm"]`` where a manifest
            knows them, else headers are read (NIfTI) or sizes of files taken.
        store: where to.
        settings: of the store.
        workers: processes.
    """
    old_voxels = new_voxels = 0.0
    largest = 0.0
    for scan in scans:
        old, new = _voxels(scan, settings)
        old_voxels, new_voxels, largest = old_voxels + old, new_voxels + new, max(largest, new)
    labels = sum(scan.label is not None for scan in scans) / max(len(scans), 1)
    size = new_voxels * (BYTES_A_VOXEL + 0.05 * labels) * _SPARE
    size += workers * largest * 2 if largest * 2 > 1 << 28 else 0  # temporary files of large scans
    seconds = (old_voxels * READ_SECONDS + new_voxels * WRITE_SECONDS) / max(1, min(workers, len(scans)))
    return Needs(len(scans), int(size), seconds, shutil.disk_usage(_existing(store)).free)


def _voxels(scan: Scan, settings: dict[str, Any]) -> tuple[float, float]:
    """Of the scan, and of the store."""
    shape, spacing = scan.extra.get("shape"), scan.extra.get("spacing_mm")
    if not shape and scan.image.name.lower().endswith((".nii", ".nii.gz")):
        try:
            header = nib.load(scan.image).header
            shape, spacing = header.get_data_shape()[:3], header.get_zooms()[:3]
        except Exception:  # a file that is no image is refused by name when it is built
            return 0.0, 0.0
    if not shape or not spacing or len(shape) != 3 or not all(spacing):
        files = scan.extra.get("files") or [scan.image]
        size = sum(Path(file).stat().st_size for file in files if Path(file).is_file())
        return size / 2 / _PACKED, size / 2 / _PACKED
    extent = np.array(shape, dtype=float) * np.array(spacing)
    if settings["crop_margin_mm"] is not None and scan.extra.get("body_mm"):
        extent = np.minimum(extent, np.array(scan.extra["body_mm"]) + 2 * settings["crop_margin_mm"] + 12)
    return float(math.prod(shape)), float(np.prod(extent / np.array(settings["spacing"])))


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
