"""SAL's two losses, and which crops they bring together (Li, Ouyang, Wan; arXiv 2406.15699)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from custom.errors import AliceError
from custom.processes import gather_rows, mean_over_processes, rank, world_size


def exact(threshold: float) -> Fraction:
    """The decimal number that a user wrote: 0.1 is 1/10, which no floating-point number is.

    Raises:
        AliceError: if it is outside (0, 1].
    """
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise AliceError(f"t must be in (0, 1], a share of the body's height; got {threshold}.")
    return Fraction(str(threshold)).limit_denominator(10**6)


def near(positions: Tensor, others: Tensor, threshold: Fraction) -> Tensor:
    """Which positions differ by less than a threshold, compared in whole numbers.

    In floating point 0.4 - 0.3 is less than 0.1, and equal steps of a stack of slices would be near here and far there.

    Args:
        positions, others: (n, 2) and (m, 2) int64: numerators and denominators.
        threshold: positive.

    Returns:
        Bool (n, m).
    """
    above, below = positions[:, None].unbind(-1)
    gaps = (above * others[:, 1] - others[:, 0] * below).abs()
    return gaps * threshold.denominator < threshold.numerator * below * others[:, 1]


def check_windows(windows: Sequence[int], grid: Sequence[int]) -> None:
    """Refuse a number of windows that does not divide a token grid.

    Raises:
        AliceError: naming the axis, its side and the numbers that divide it.
    """
    if len(windows) != 3 or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in windows):
        raise AliceError(f"windows must be three positive whole numbers, got {list(windows)}.")
    for axis, side, count in zip("xyz", grid, windows, strict=True):
        if side % count:
            divisors = ", ".join(str(d) for d in range(1, side + 1) if side % d == 0)
            raise AliceError(
                f"windows: {count} along {axis} do not divide the grid's {side} tokens; take one of {divisors}."
            )


def local_alignment(x: Tensor, y: Tensor, grid: Sequence[int], windows: Sequence[int] = (1, 1, 1)) -> Tensor:
    """How far the tokens of one crop are from their best partners in another: LA, or WLA with several windows.

    Constant features give 0, so a small value says nothing by itself.

    Args:
        x, y: (P, N, C) tokens of both crops of P pairs, on one grid.
        grid: tokens along x, y, z.
        windows: how many windows along x, y, z; the partner lies in the window at the same place.

    Returns:
        (P,) in [0, 2], in fp32: the mean over x's tokens of one minus the best cosine.

    Raises:
        AliceError: if the windows do not divide the grid.
    """
    check_windows(windows, grid)
    first, second = (_in_windows(F.normalize(tokens.float(), dim=-1), grid, windows) for tokens in (x, y))
    best = (first @ second.transpose(-1, -2)).amax(dim=-1)  # (P, W, N / W)
    return (1 - best.clamp(max=1)).abs().flatten(1).mean(dim=1)


def local_term(tokens: Tensor, pairs: Tensor, grid: Sequence[int], windows: Sequence[int]) -> Tensor:
    """L_la: the mean of LA over the ordered pairs of all processes; 0, and a gradient of 0, where there is none.

    Args:
        tokens: (n, N, C) of this process's crops.
        pairs: (P, 2) int64, rows of tokens.
        grid, windows: as of :func:`local_alignment`.
    """
    total = local_alignment(tokens[pairs[:, 0]], tokens[pairs[:, 1]], grid, windows).sum()
    count = mean_over_processes(total.new_tensor(float(len(pairs))))
    return total / count.clamp(min=1 / world_size())


def global_perception(z: Tensor, positive: Tensor, tau: float) -> Tensor:
    """L_gp: crops at a like relative position attract each other, all others repel.

    Args:
        z: (n, D), n >= 2; brought to unit length here, in fp32.
        positive: bool (n, n); its diagonal does not matter.
        tau: the temperature of the cosines.

    Returns:
        The mean over rows that have a positive; exactly 0 if none has. All vectors alike give ln(n - 1).
    """
    unit = F.normalize(z.float(), dim=-1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similar = unit @ unit.T / tau
    log_share = similar - similar.masked_fill(own, -math.inf).logsumexp(dim=1, keepdim=True)
    positive = positive & ~own
    count = positive.sum(dim=1)
    rows = -(log_share * positive).sum(dim=1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum().clamp(min=1)


def global_term(z: Tensor, positions: Tensor, threshold: Fraction, tau: float) -> Tensor:
    """L_gp over the crops of all processes. Value and gradient are those of one process that holds them all.

    Args:
        z: (n, D) of this process.
        positions: (n, 2), as of :func:`near`.
        threshold: how near positions are that attract each other.
        tau: the temperature.
    """
    everyone, start = gather_rows(z), rank() * len(z)
    everyone = torch.cat([everyone[:start], z, everyone[start + len(z) :]])
    places = gather_rows(positions.to(z.device, non_blocking=True))
    found = global_perception(everyone, near(places, places, threshold), tau)
    many = world_size()  # DDP takes the mean of gradients, and each process has those of its own rows alone
    return many * found - (many - 1) * found.detach()


@torch.no_grad()
def variance(vectors: Tensor) -> Tensor:
    """One minus the squared length of the mean unit vector, of (..., C): 0 if all are alike."""
    unit = F.normalize(vectors.detach().float(), dim=-1).flatten(0, -2)
    return 1 - unit.mean(dim=0).square().sum()


def _in_windows(tokens: Tensor, grid: Sequence[int], windows: Sequence[int]) -> Tensor:
    """(P, N, C) in grid order -> (P, W, N / W, C)."""
    sizes = [n for side, count in zip(grid, windows, strict=True) for n in (count, side // count)]
    split = tokens.unflatten(1, sizes).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return split.flatten(4, 6).flatten(1, 3)
