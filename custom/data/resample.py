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

    Linear where the grid gets finer; where it gets coarser the linear interpolant is averaged over the new
    voxel, so that nothing aliases (torch's own ``antialias`` is for 2D only).

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
    extents = [float(f) if f > 1 else 0.0 for f in factors]
    for axis in sorted(range(3), key=lambda a: sizes[a] / volume.shape[a]):  # shrink first: less to do
        centres = (torch.arange(sizes[axis], dtype=torch.float64) + 0.5) * factors[axis] - 0.5 + shift[axis]
        out = _pick(out, centres, axis) if nearest else _filter(out, centres, extents[axis], axis)
    if not kept_type.is_floating_point and not nearest:
        limits = torch.iinfo(kept_type)
        out = out.round_().clamp_(limits.min, limits.max).to(kept_type)
    return out.numpy(), new_affine


def _pick(volume: Tensor, centres: Tensor, axis: int) -> Tensor:
    return volume.index_select(axis, centres.round().long().clamp(0, volume.shape[axis] - 1))


def _filter(volume: Tensor, centres: Tensor, extent: float, axis: int) -> Tensor:
    """Weighted sums of the voxels around ``centres`` along one axis, edge voxels repeated.

    The weights average the linear interpolant over a new voxel's extent, so a linear ramp stays one exactly;
    an extent of 0 is plain linear interpolation.
    """
    reach = 1.0 + extent / 2
    first = torch.floor(centres - reach).long() + 1
    positions = first[:, None] + torch.arange(int(np.ceil(2 * reach)) + 1)
    apart = positions - centres[:, None]
    if extent > 0:
        weights = (_hat_integral(apart + extent / 2) - _hat_integral(apart - extent / 2)) / extent
    else:
        weights = (1 - apart.abs()).clamp(min=0)
    weights = weights.to(volume.dtype)
    positions = positions.clamp(0, volume.shape[axis] - 1)
    shape = [1, 1, 1]
    shape[axis] = len(centres)
    out = torch.zeros(
        [len(centres) if a == axis else n for a, n in enumerate(volume.shape)], dtype=volume.dtype
    )
    for tap in range(positions.shape[1]):
        if (weights[:, tap] != 0).any():
            out.addcmul_(volume.index_select(axis, positions[:, tap]), weights[:, tap].view(shape))
    return out


def _hat_integral(t: Tensor) -> Tensor:
    """Integral of the linear interpolation kernel from minus infinity to t."""
    t = t.clamp(-1, 1)
    return torch.where(t < 0, (t + 1).square() / 2, 1 - (1 - t).square() / 2)
