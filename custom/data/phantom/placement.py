"""The subject in the scanner: field of view and voxels, arms beside the body, table under it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from custom.data.phantom.pose import Pose
from custom.data.phantom.shapes import Tissue
from custom.errors import AliceError

COVERAGES: dict[str, tuple[float, float]] = {  # lowest and highest canonical z, mm
    "full": (-165.0, 185.0),
    "upper_abdomen": (-45.0, 165.0),
    "chest_abdomen": (-75.0, 305.0),
    "abdomen_pelvis": (-245.0, 150.0),
}
MIN_VOXELS = 24


def place_scan(
    pose: Pose,
    coverage: str,
    shape: Sequence[int] | None,
    spacing: Sequence[float] | None,
    size: str,
    rng: np.random.Generator,
) -> tuple[tuple[int, ...], tuple[float, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Choose the field of view. Returns voxels, spacing, affine, and the origin of the canonical body in world mm."""
    margin = rng.uniform(10, 35) if size == "small" else rng.uniform(-15, 65)
    field = pose.width_mm + margin
    low, high = (z * pose.scale[2] for z in COVERAGES[coverage])
    jitter = rng.uniform(-10, 10, 2)
    low, high = low + jitter[0], high + jitter[1]
    slice_mm = float(rng.choice([2.0, 2.5, 3.0, 4.0, 5.0], p=[0.15, 0.3, 0.3, 0.1, 0.15]))
    in_plane = int(rng.choice([144, 160, 176]))
    off_centre = np.clip(rng.normal(0, [12, 12]), -0.4 * abs(margin) - 4, 0.4 * abs(margin) + 4)
    isocentre = np.array([rng.uniform(-20, 20), rng.uniform(-160, 60), rng.uniform(-900, 400)])

    if shape is not None:
        if len(shape) != 3 or min(shape) < MIN_VOXELS:
            raise AliceError(f"Shape must be 3 numbers of at least {MIN_VOXELS} voxels, got {tuple(shape)}.")
        voxels = tuple(int(count) for count in shape)
    elif spacing is not None:
        voxels = ()
    elif size == "small":
        voxels = (96, 80, 80)
    else:
        voxels = (in_plane, in_plane, max(MIN_VOXELS, round((high - low) / slice_mm)))
    if spacing is not None:
        if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
            raise AliceError(f"Spacing must be 3 numbers above 0 mm, got {tuple(spacing)}.")
        spacing_mm = tuple(float(s) for s in spacing)
        extent = (field, field, high - low)
        voxels = voxels or tuple(
            max(MIN_VOXELS, round(e / s)) for e, s in zip(extent, spacing_mm, strict=True)
        )
    else:
        # pixels are square; their size must be enough for both width and depth
        pixel = max(field / voxels[0], (pose.depth_mm + margin) / voxels[1])
        spacing_mm = (pixel, pixel, (high - low) / voxels[2])

    affine = np.diag([*spacing_mm, 1.0])
    middle = isocentre + np.array([*off_centre, (low + high) / 2])
    affine[:3, 3] = middle - (np.array(voxels) - 1) / 2 * spacing_mm
    return voxels, spacing_mm, affine, isocentre


def add_arms_and_table(
    tissue: NDArray[np.uint8],
    affine: NDArray[np.float64],
    isocentre: NDArray[np.float64],
    pose: Pose,
    rng: np.random.Generator,
) -> None:
    """Paint arms beside the body (in 12 % of scans) and the table under it (in 85 %), where there is air."""
    with_arms, with_table = rng.random() < 0.12, rng.random() < 0.85
    sag, gap = rng.uniform(1500, 4000), rng.uniform(2, 8)
    x, y, z = (
        (affine[axis, axis] * np.arange(tissue.shape[axis]) + affine[axis, 3] - isocentre[axis]).reshape(
            [-1 if axis == other else 1 for other in range(3)]
        )
        for axis in range(3)
    )
    if with_arms:
        for side in (-1, 1):
            centre = side * (pose.width_mm / 2 + 38 - 0.02 * z)
            radius = np.hypot(x - centre, y + 15)
            bone = np.minimum(np.hypot(x - centre - 9, y + 15), np.hypot(x - centre + 9, y + 20))
            for limit, part in ((42, Tissue.FAT), (36, Tissue.MUSCLE)):
                tissue[(radius < limit) & np.isin(tissue, [Tissue.AIR, Tissue.FAT])] = part
            tissue[(bone < 7) & (tissue == Tissue.MUSCLE) & (radius < 36)] = Tissue.CORTICAL
    if with_table:
        rows = np.flatnonzero((tissue != Tissue.AIR).any(axis=(0, 2)))
        back = float(y[0, rows[0], 0]) if len(rows) else 0.0
        top = back - gap + x**2 / sag
        depth = top - y + 0 * z
        shell = (depth > 0) & (depth < 24) & ((depth < 4) | (depth > 20)) & (np.abs(x) < 215)
        tissue[shell & (tissue == Tissue.AIR)] = Tissue.TABLE
