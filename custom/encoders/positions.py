"""Position tables: fixed sin-cos tables, and interpolation to another grid."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import Tensor

from custom.errors import AliceError


@functools.lru_cache(maxsize=32)
def sincos_positions(grid: tuple[int, int, int], width: int, device: str = "cpu") -> Tensor:
    """MONAI's fixed sin-cos table (1, N, width) for a grid, cached; ``width`` must be divisible by 6."""
    if width % 6:
        raise AliceError(f"Sin-cos positions in 3D need a width divisible by 6, got {width}.")
    with quiet_meshgrid():
        return build_sincos_position_embedding(list(grid), width, 3).detach().to(device)


@contextlib.contextmanager
def quiet_meshgrid() -> Iterator[None]:
    """Silence torch's warning about MONAI's use of ``torch.meshgrid``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        yield


def resize_positions(table: Tensor, grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Interpolate a position table to another token grid, trilinearly, edges aligned.

    Args:
        table: (1, N, C), tokens in grid order.
        grid: the table's grid, ``N = prod(grid)``.
        new_grid: the grid wanted.

    Returns:
        (1, N', C) with ``N' = prod(new_grid)``; the table itself if the grids are equal.

    Raises:
        AliceError: if the table does not have ``prod(grid)`` entries.
    """
    if table.shape[1] != math.prod(grid):
        raise AliceError(
            f"Position table has {table.shape[1]} entries, its grid {tuple(grid)} asks for {math.prod(grid)}."
        )
    if tuple(grid) == tuple(new_grid):
        return table
    volume = table.transpose(1, 2).reshape(1, table.shape[2], *grid)
    volume = F.interpolate(volume.float(), size=tuple(new_grid), mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(table.dtype)


def positions_at(positions: Tensor, index: Tensor) -> Tensor:
    """Rows of a (1, N, C) table for tokens ``index`` (B, N_visible) -> (B, N_visible, C)."""
    return torch.index_select(positions[0], 0, index.flatten()).view(*index.shape, -1)


def sincos_at(places: Tensor, width: int) -> Tensor:
    """MONAI's fixed sin-cos positions at any places, also between tokens and outside of a grid.

    Args:
        places: (..., 3) along x, y, z, in tokens from the first token of the grid.
        width: channels, divisible by 6.

    Returns:
        (..., width). At the places of a grid it equals :func:`sincos_positions`. MONAI's table holds its three blocks of
        channels in the order y, x, z.
    """
    if width % 6:
        raise AliceError(f"Sin-cos positions in 3D need a width divisible by 6, got {width}.")
    count = width // 6
    frequency = 1.0 / 10000.0 ** (torch.arange(count, dtype=torch.float32, device=places.device) / count)
    x, y, z = places.float().unbind(dim=-1)
    angles = torch.stack((y, x, z), dim=-1)[..., None] * frequency  # (..., 3, width / 6)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
