"""Resample a volume to another voxel size, whole or part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from custom.data.grid.orientation import spacing_of


@dataclass(frozen=True)
class Regrid:
    """How one grid becomes another along each axis.

    Attributes:
        source: voxels of the old grid.
        shape: voxels of the new grid.
        affine: of the new grid.
        factors: new voxel size, in old voxels.
        shift: how far new centres move along each axis, in old voxels.
        same: True if the two grids are equal.
    """

    source: tuple[int, ...]
    shape: tuple[int, ...]
    affine: np.ndarray
    factors: tuple[float, ...]
    shift: tuple[float, ...]
    same: bool

    def centres(self, axis: int, start: int, stop: int) -> Tensor:
        """The centres of new voxels, in coordinates of old voxels."""
        index = torch.arange(start, stop, dtype=torch.float64)
        return (index + 0.5) * self.factors[axis] - 0.5 + self.shift[axis]

    def needed(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """First and one-past-last old voxel that are needed for new voxels ``start`` to ``stop``."""
        if self.same:
            return start, stop
        ends = self.centres(axis, start, stop)[[0, -1]]
        reach = 2.0 + max(self.factors[axis], 1.0) / 2  # one voxel more than the width of the filter
        last = self.source[axis] - 1
        low, high = int(np.floor(float(ends[0]) - reach)), int(np.ceil(float(ends[1]) + reach))
        return min(max(low, 0), last), min(max(high, 0), last) + 1


def regrid(shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float]) -> Regrid:
    """The same box with another voxel size: the outer edges stay, to within half a new voxel."""
    factors = np.asarray(spacing, dtype=float) / spacing_of(affine)
    source = tuple(int(n) for n in shape)
    if np.allclose(factors, 1.0, atol=1e-6):
        return Regrid(source, source, np.array(affine, dtype=float), (1.0,) * 3, (0.0,) * 3, True)
    sizes = [max(1, round(n / f)) for n, f in zip(shape, factors, strict=True)]
    new_affine = np.array(affine, dtype=float)
    # The new first centre lies half a new voxel from the shared edge. Voxels have exactly the size asked for, so the
    # outer edges may move by less than half a voxel.
    new_affine[:3, :3] = affine[:3, :3] * factors
    shift = (np.array(shape) - np.array(sizes) * factors) / 2
    new_affine[:3, 3] = (affine @ np.r_[0.5 * (factors - 1) + shift, 1.0])[:3]
    return Regrid(
        source,
        tuple(sizes),
        new_affine,
        tuple(float(f) for f in factors),
        tuple(float(s) for s in shift),
        False,
    )


def resample(
    volume: np.ndarray, affine: np.ndarray, spacing: Sequence[float], nearest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Change the voxel size along each axis; the outer edges stay.

    Interpolation is linear where the grid gets finer. Where it gets coarser, the linear interpolant is averaged over
    the new voxel, which avoids aliasing (torch's own ``antialias`` is for 2D only).

    Args:
        volume: (X, Y, Z).
        affine: voxel-to-world (4, 4).
        spacing: new voxel size in mm along x, y, z.
        nearest: take the voxel nearest to each new centre, without a filter; for labels.

    Returns:
        The volume in its own type (rounded if that is an integer), and its affine.
    """
    plan = regrid(volume.shape, affine, spacing)
    return resample_part(volume, plan, 2, 0, plan.shape[2], nearest), plan.affine


def resample_part(
    part: np.ndarray, plan: Regrid, axis: int, start: int, stop: int, nearest: bool = False
) -> np.ndarray:
    """New voxels ``start`` to ``stop`` along one axis, bit for bit the same as if all were made at once.

    Args:
        part: the old voxels: ``plan.needed(axis, start, stop)`` along ``axis``, all along the other axes.
        plan: of the whole volume.
        axis, start, stop: the new voxels to make.
        nearest: see :func:`resample`.
    """
    if plan.same:
        return part
    out = torch.from_numpy(np.ascontiguousarray(part))
    kept_type = out.dtype
    if not nearest:
        out = out.to(torch.float32)
    before = plan.needed(axis, start, stop)[0]
    # the axis that shrinks most comes first, which saves time
    for along in sorted(range(3), key=lambda a: plan.shape[a] / plan.source[a]):
        here = along == axis
        centres = plan.centres(along, *(start, stop) if here else (0, plan.shape[along]))
        first, size = before if here else 0, plan.source[along]
        if nearest:
            out = out.index_select(along, centres.round().long().clamp(0, size - 1) - first)
        else:
            factor = plan.factors[along]
            out = _filter(out, centres, factor if factor > 1 else 0.0, along, first, size)
    if not kept_type.is_floating_point and not nearest:
        limits = torch.iinfo(kept_type)
        out = out.round_().clamp_(limits.min, limits.max).to(kept_type)
    return out.numpy()


def _filter(volume: Tensor, centres: Tensor, extent: float, axis: int, first_voxel: int, size: int) -> Tensor:
    """Weighted sums of the voxels around ``centres`` along one axis; edge voxels are repeated.

    The weights average the linear interpolant over the extent of a new voxel, so a linear ramp stays exactly linear.
    An extent of 0 is plain linear interpolation. ``volume`` may be a part that begins at voxel ``first_voxel`` of
    ``size``.
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
    positions = positions.clamp(0, size - 1)
    shape = [1, 1, 1]
    shape[axis] = len(centres)
    used = (weights != 0).any(dim=0)
    out = torch.zeros(
        [len(centres) if a == axis else n for a, n in enumerate(volume.shape)], dtype=volume.dtype
    )
    for tap in range(positions.shape[1]):
        if used[tap]:
            index = (positions[:, tap] - first_voxel).clamp(
                0, volume.shape[axis] - 1
            )  # voxels of weight 0 may lie outside
            out.addcmul_(volume.index_select(axis, index), weights[:, tap].view(shape))
    return out


def _hat_integral(t: Tensor) -> Tensor:
    """Integral of the linear interpolation kernel from minus infinity to ``t``."""
    t = t.clamp(-1, 1)
    return torch.where(t < 0, (t + 1).square() / 2, 1 - (1 - t).square() / 2)
