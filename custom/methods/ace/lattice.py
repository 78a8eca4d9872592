"""The lattice of cells of ACE: which token of one crop shows what which tokens of the other show.

A cell is what one token of the small crop shows. The large crop is shrunk, so one of its tokens shows ``prod(zoom)``
cells. A crop's origin is the number of its first cell on the lattice, along each axis in the order of the array's axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from custom.errors import AliceError

KERNELS, SMALL_KERNELS = (3, 5), (1, 3)  # the authors'; ours, for grids of few tokens


class Targets(NamedTuple):
    """Which tokens belong together, for a batch of pairs of crops of N tokens each; P is ``prod(zoom)``."""

    composition: Tensor  # (B, N, N / P) in [0, 1]: tokens of the large crop x merged tokens of the small one
    decomposition: Tensor  # (B, N, N * P): tokens of the small crop x split tokens of the large one
    inside_large: Tensor  # bool (B, N): tokens of the large crop that lie in the small one
    inside_small: Tensor  # bool (B, N): tokens of the small crop that lie in the large one


def match_targets(
    o_large: Tensor,
    o_small: Tensor,
    cells: Sequence[int],
    zoom: Sequence[int],
    kernels: Sequence[int] = KERNELS,
    sigma: float = 1.0,
) -> Targets:
    """Soft labels of composition and decomposition (ACE, Sec. 3; its form is that of the authors' code).

    A token's match gets 1. Its neighbours up to ``kernel // 2`` away along each axis get ``exp(-d^2 / (2 sigma^2))``.
    What would lie outside of the grid is cut off. A token outside of the other crop gets only zeros.

    Args:
        o_large, o_small: origins in cells (B, D), whole numbers.
        cells: tokens of a crop along each axis.
        zoom: cells along each axis that a token of the large crop shows.
        kernels: of composition and of decomposition, odd.
        sigma: of the labels, in tokens.

    Raises:
        AliceError: if the origins of a pair differ by no multiple of the zoom, or the zoom does not divide ``cells``.
    """
    apart = o_large - o_small
    for axis, (count, k) in enumerate(zip(cells, zoom, strict=True)):
        if count % k:
            raise AliceError(f"{count} tokens along axis {axis} cannot be merged by {k}.")
        odd = apart[:, axis] % k != 0
        if bool(odd.any()):
            row = int(odd.nonzero()[0])
            raise AliceError(
                f"Along axis {axis} the large crop begins at cell {int(o_large[row, axis])} and the small one at "
                f"{int(o_small[row, axis])}: origins must differ by a multiple of the zoom, {k}."
            )
    composition, decomposition, inside_large, inside_small = [], [], [], []
    for axis, (count, k) in enumerate(zip(cells, zoom, strict=True)):
        token = torch.arange(count, device=apart.device)
        first = apart[:, axis, None] + token * k  # the first small token that each large token shows
        within = (first >= 0) & (first + k <= count)
        composition.append(
            _labels(first.div(k, rounding_mode="floor"), within, count // k, kernels[0], sigma)
        )
        inside_large.append(within)
        cell = token - apart[:, axis, None]  # of the large crop's cells, the one that each small token is
        within = (cell >= 0) & (cell < count * k)
        decomposition.append(_labels(cell, within, count * k, kernels[1], sigma))
        inside_small.append(within)
    return Targets(
        _product(composition),
        _product(decomposition),
        *(_product([axis[:, :, None] for axis in found])[:, :, 0] for found in (inside_large, inside_small)),
    )


def _labels(peak: Tensor, within: Tensor, columns: int, kernel: int, sigma: float) -> Tensor:
    """Rows (B, n) with a peak each -> labels (B, n, columns)."""
    apart = torch.arange(columns, device=peak.device) - peak[..., None]
    near = (apart.abs() <= kernel // 2) & within[..., None]
    return torch.exp(-(apart**2) / (2 * sigma**2)) * near


def _product(axes: list[Tensor]) -> Tensor:
    """Kronecker product of one matrix (B, n, m) an axis; the first axis varies slowest, as in a flattened grid."""
    found = axes[0]
    for axis in axes[1:]:
        found = (found[:, :, None, :, None] * axis[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    return found


def kernels_for(cells: Sequence[int], zoom: Sequence[int]) -> tuple[int, int]:
    """The authors' kernels, or smaller ones where a grid of merged tokens would lie in one kernel (ours)."""
    return SMALL_KERNELS if any(m // k <= 2 for m, k in zip(cells, zoom, strict=True)) else KERNELS


def merge_children(tokens: Tensor, grid: Sequence[int], zoom: Sequence[int]) -> Tensor:
    """Put tokens that one large token shows side by side: (B, N, C) -> (B, N / P, P * C), in grid order."""
    (x, y, z), (i, j, k) = grid, zoom
    split = tokens.reshape(len(tokens), x // i, i, y // j, j, z // k, k, -1)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(tokens), x * y * z // (i * j * k), -1)


def split_children(tokens: Tensor, grid: Sequence[int], zoom: Sequence[int]) -> Tensor:
    """Lay the parts of each token on the finer grid: (B, N, P * C) -> (B, N * P, C). It undoes :func:`merge_children`.

    Args:
        tokens: (B, N, P * C).
        grid: of these tokens, along x, y, z.
        zoom: parts of each token along x, y, z; P is their product.
    """
    (x, y, z), (i, j, k) = grid, zoom
    split = tokens.reshape(len(tokens), x, y, z, i, j, k, -1)
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(tokens), x * y * z * i * j * k, -1)


def mean_over(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen tokens: (B, N, C), bool (B, N) -> (B, C); 0 where none is chosen."""
    weight = chosen.to(tokens.dtype)[..., None]
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def tokens_along(crop_size: Sequence[int], patch: Sequence[int], zoom: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a crop along each axis.

    Raises:
        AliceError: if a side is no multiple of what the zoom merges; names sides that are.
    """
    for axis, side, p, k in zip("xyz", crop_size, patch, zoom, strict=True):
        if side % (p * k):
            unit = p * k
            fits = ", ".join(str(n) for n in (side // unit * unit, -(-side // unit) * unit) if n)
            raise AliceError(
                f"crop_size: side {axis} = {side} is no multiple of {unit} voxels ({k} tokens of {p}), which ACE merges "
                f"along {axis}; take {fits}."
            )
    return tuple(int(side) // int(p) for side, p in zip(crop_size, patch, strict=True))


def parts_of(zoom: Sequence[int]) -> int:
    """Cells that a token of the large crop shows, P."""
    return math.prod(zoom)
