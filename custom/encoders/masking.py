"""Choose the tokens to hide from the online encoder, and keep only the visible ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from custom.errors import AliceError


def hide_tokens(
    batch_size: int, grid: Sequence[int], ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose exactly ``round(ratio * N)`` tokens to hide in each sample (Alice, Sec. 4.2, after MAE).

    Args:
        batch_size: number of independent choices, B.
        grid: tokens along x, y, z.
        ratio: share of hidden tokens, in [0, 1).
        generator: random generator; torch's global one if None.

    Returns:
        Bool (B, gx, gy, gz) on the CPU, True where a token is hidden.

    Raises:
        AliceError: if ``ratio`` is outside [0, 1), or the grid is so small that every token would be hidden.
    """
    num_tokens = math.prod(grid)
    num_hidden = num_hidden_tokens(num_tokens, ratio)
    order = torch.rand(batch_size, num_tokens, generator=generator).argsort(dim=1).argsort(dim=1)
    return (order < num_hidden).view(batch_size, *grid)


def hide_columns(
    batch_size: int, grid: Sequence[int], ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Hide whole columns along z, ``ceil(ratio * gx * gy)`` of them (the authors' code).

    Arguments, result and errors are those of :func:`hide_tokens`.
    """
    num_columns = grid[0] * grid[1]
    num_hidden_tokens(num_columns, ratio)
    num_hidden = min(math.ceil(ratio * num_columns), num_columns - 1)
    order = torch.rand(batch_size, num_columns, generator=generator).argsort(dim=1).argsort(dim=1)
    columns = (order < num_hidden).view(batch_size, grid[0], grid[1], 1)
    return columns.expand(-1, -1, -1, grid[2]).contiguous()


def num_hidden_tokens(num_tokens: int, ratio: float) -> int:
    """``round(ratio * num_tokens)``; AliceError if no token would stay visible."""
    if not 0.0 <= ratio < 1.0:
        raise AliceError(f"Share of hidden tokens must be in [0, 1), got {ratio}.")
    num_hidden = round(ratio * num_tokens)
    if num_hidden >= num_tokens:
        raise AliceError(
            f"Hiding {ratio:.0%} of {num_tokens} token(s) leaves none visible: "
            "take a larger crop or a smaller ratio."
        )
    return num_hidden


def hidden_voxels(hidden: Tensor, unit: Sequence[int] | int) -> Tensor:
    """Spread a token mask over voxels.

    Args:
        hidden: bool (B, gx, gy, gz).
        unit: voxels per token along x, y, z (one number for a cube).

    Returns:
        Bool (B, 1, X, Y, Z).
    """
    return refine_mask(hidden, unit)[:, None]


def refine_mask(hidden: Tensor, factor: Sequence[int] | int) -> Tensor:
    """Repeat every entry of a (B, gx, gy, gz) mask ``factor`` times along each axis."""
    factors = (factor,) * 3 if isinstance(factor, int) else tuple(factor)
    for axis, times in enumerate(factors, start=1):
        hidden = hidden.repeat_interleave(times, dim=axis)
    return hidden


def visible_index(hidden: Tensor) -> Tensor:
    """Positions of the visible tokens, ascending, in flattened grid order.

    Args:
        hidden: bool (B, N) with the same number of visible tokens in every row. Leave it on the CPU:
            on a GPU the host would wait for the counting.

    Returns:
        Int64 (B, N_visible).

    Raises:
        AliceError: if rows differ in their number of visible tokens, or a row has none.
    """
    counts = (~hidden).sum(dim=1)
    num_visible = int(counts[0])
    if not bool((counts == num_visible).all()):
        raise AliceError(
            "Every sample must hide the same number of tokens, got "
            f"{(hidden.shape[1] - counts).tolist()}: draw masks with hide_tokens."
        )
    if num_visible == 0:
        raise AliceError("A sample has no visible token: hide fewer than all of them.")
    return (~hidden).nonzero()[:, 1].view(-1, num_visible)


def gather_visible(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, C) at ``index`` (B, N_visible) -> (B, N_visible, C)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
