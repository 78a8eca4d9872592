"""A scan as its file stores it; checks of its shape and grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from custom.data.formats.reasons import Fault, Reason

MOST_BYTES = 4_000_000_000  # of voxels in one scan: 512 x 512 x 7600 in int16 (ours)


@dataclass
class Voxels:
    """A scan as its file stores it. Its values are ``raw * slope + intercept``."""

    raw: np.ndarray  # (X, Y, Z)
    affine: np.ndarray  # voxel to world, RAS mm
    slope: float = 1.0
    intercept: float = 0.0
    warnings: list[Reason] = field(default_factory=list)
    modality: str = ""  # if the file says it

    def scaled(self, part: np.ndarray) -> np.ndarray:
        """The values of a part of ``raw``."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return part
        return part * np.float32(self.slope) + np.float32(self.intercept)


def check_grid(affine: np.ndarray, shape: Sequence[int]) -> list[Reason]:
    """Refuse a grid that cannot be that of a patient's scan.

    Args:
        affine: voxel to RAS mm, (4, 4).
        shape: voxels X, Y, Z.

    Returns:
        Warnings.

    Raises:
        Fault: for a flat, singular, sheared or non-axial grid, or an implausible voxel size.
    """
    if min(shape) < 2:
        raise Fault(Reason.ONE_SLICE, f"{list(shape)}")
    if not np.isfinite(affine).all():
        raise Fault(Reason.SINGULAR_AFFINE, "not finite")
    axes = affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if (spacing == 0).any() or abs(np.linalg.det(axes)) < 1e-6 * math.prod(spacing):
        raise Fault(Reason.SINGULAR_AFFINE)
    if spacing.min() < 0.02 or spacing.max() > 50:  # micro-CT to the thickest slices (ours)
        raise Fault(Reason.BAD_SPACING, f"{np.round(spacing, 4).tolist()} mm")
    extent = np.sort(spacing * shape)
    # mm; too thin or too large for a patient (ours); no scanner sees more than a metre across
    if extent[0] < 2 or extent[1] < 20 or extent[1] > 1500 or extent[2] > 4000:
        raise Fault(Reason.BAD_SPACING, f"{np.round(extent, 1).tolist()} mm in all")
    directions = axes / spacing
    slant = np.abs(directions.T @ directions - np.eye(3)).max()
    if slant > 0.01:  # cosine, about 0.6 degrees (ours); rounded headers stay below 0.001
        raise Fault(Reason.SHEARED_AFFINE, f"{math.degrees(math.asin(min(1.0, slant))):.1f} degrees")
    thick = int(np.argmax(spacing))
    if spacing[thick] > 2 * np.sort(spacing)[1] and np.argmax(np.abs(directions[:, thick])) != 2:
        raise Fault(Reason.NOT_AXIAL, f"{np.round(spacing, 2).tolist()} mm")
    nearest = np.abs(directions).max(axis=0).min()
    return [Reason.OBLIQUE] if nearest < math.cos(math.radians(10)) else []


def check_shape(shape: Sequence[int], bytes_a_voxel: int, most_bytes: int) -> int:
    """The bytes of voxels that a header promises.

    Raises:
        Fault: if there are not three dimensions, an empty one, or more bytes than allowed.
    """
    if any(n <= 0 for n in shape):
        raise Fault(Reason.BAD_HEADER, f"shape {list(shape)}")
    promised = math.prod(int(n) for n in shape) * bytes_a_voxel
    if promised > most_bytes:
        raise Fault(Reason.BOMB, f"{promised} bytes for shape {list(shape)}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Fault(Reason.FOUR_D, f"shape {list(shape)}")
    if len(shape) < 3:
        raise Fault(Reason.TWO_D, f"shape {list(shape)}")
    return promised
