"""A scan on a fixed grid: axes along R, A, S, the spacing asked for, and an affine that tells the truth."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from torch import Tensor


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes flipped and swapped (never interpolated) to the nearest of R, A, S.

    An oblique scan keeps its rotation in the affine.
    """
    flips = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(volume, flips)
    return turned, affine @ nib.orientations.inv_ornt_aff(flips, volume.shape)


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size in mm along x, y, z."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)


def resample(
    volume: np.ndarray, affine: np.ndarray, spacing: Sequence[float], nearest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Change the voxel size along each axis, outer voxel edges kept.

    Linear where the grid gets finer; where it gets coarser the linear filter is widened to the new voxel, so
    that nothing aliases (what torch calls ``antialias``; torch has it in 2D only).

    Args:
        volume: (X, Y, Z).
        affine: voxel-to-world (4, 4).
        spacing: new voxel size in mm along x, y, z.
        nearest: for labels: the voxel nearest to each new centre, no filter.

    Returns:
        The volume in its own type (rounded if that is an integer), and its affine.
    """
    factors = np.asarray(spacing, dtype=float) / spacing_of(affine)
    sizes = [max(1, round(n / f)) for n, f in zip(volume.shape, factors, strict=True)]
    new_affine = np.array(affine, dtype=float)
    # the new first centre lies half a new voxel from the edge that both grids share; voxels keep the size
    # asked for, so the far edge may move by less than half a voxel
    new_affine[:3, :3] = affine[:3, :3] * factors
    shift = (np.array(volume.shape) - np.array(sizes) * factors) / 2
    new_affine[:3, 3] = (affine @ np.r_[0.5 * (factors - 1) + shift, 1.0])[:3]
    if np.allclose(factors, 1.0, atol=1e-6):
        return volume, np.array(affine, dtype=float)

    out = torch.from_numpy(np.ascontiguousarray(volume))
    kept_type = out.dtype
    if not nearest:
        out = out.to(torch.float32)
    for axis in sorted(range(3), key=lambda a: sizes[a] / volume.shape[a]):  # shrink first: less to do
        centres = (torch.arange(sizes[axis], dtype=torch.float64) + 0.5) * factors[axis] - 0.5 + shift[axis]
        out = _pick(out, centres, axis) if nearest else _filter(out, centres, max(1.0, float(factors[axis])), axis)
    if not kept_type.is_floating_point and not nearest:
        limits = torch.iinfo(kept_type)
        out = out.round_().clamp_(limits.min, limits.max).to(kept_type)
    return out.numpy(), new_affine


def _pick(volume: Tensor, centres: Tensor, axis: int) -> Tensor:
    return volume.index_select(axis, centres.round().long().clamp(0, volume.shape[axis] - 1))


def _filter(volume: Tensor, centres: Tensor, width: float, axis: int) -> Tensor:
    """A triangle filter of half-width ``width`` voxels at ``centres`` along one axis, edge voxels repeated."""
    first = torch.floor(centres - width).long() + 1
    taps = int(np.ceil(2 * width)) + 1
    positions = first[:, None] + torch.arange(taps)
    weights = (1 - (positions - centres[:, None]).abs() / width).clamp(min=0)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(volume.dtype)
    positions = positions.clamp(0, volume.shape[axis] - 1)
    shape = [1, 1, 1]
    shape[axis] = len(centres)
    out = torch.zeros([len(centres) if a == axis else n for a, n in enumerate(volume.shape)], dtype=volume.dtype)
    for tap in range(taps):
        if (weights[:, tap] != 0).any():
            out.addcmul_(volume.index_select(axis, positions[:, tap]), weights[:, tap].view(shape))
    return out
