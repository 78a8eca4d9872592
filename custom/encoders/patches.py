"""Cut crops into patches, and put patches together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patchify(crop: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, X, Y, Z) -> patches (B, N, P) in grid order, P = C * px * py * pz."""
    batch, channels = crop.shape[:2]
    px, py, pz = patch
    gx, gy, gz = (side // p for side, p in zip(crop.shape[2:], patch, strict=True))
    split = crop.reshape(batch, channels, gx, px, gy, py, gz, pz)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, gx * gy * gz, -1)


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of :func:`patchify` for one channel: (B, N, P) -> (B, 1, X, Y, Z)."""
    (gx, gy, gz), (px, py, pz) = grid, patch
    split = patches.reshape(len(patches), gx, gy, gz, px, py, pz).permute(0, 1, 4, 2, 5, 3, 6)
    return split.reshape(len(patches), 1, gx * px, gy * py, gz * pz)


def normalise_patches(patches: Tensor) -> Tensor:
    """Bring every patch to zero mean and unit variance (MAE, Sec. 3: its normalised pixel target)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def empty_patches(patches: Tensor, tolerance: float = 1e-3) -> Tensor:
    """True where a patch is one flat value: air, padding, an anonymised box (ours).

    Args:
        patches: (B, N, P) in [0, 1].
        tolerance: largest spread of values that still counts as flat.
    """
    return patches.amax(dim=-1) - patches.amin(dim=-1) <= tolerance
