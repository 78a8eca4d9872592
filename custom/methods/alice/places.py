"""Place matching: each visible token finds its own anatomical place among all tokens of another patient's crop (ours).

The crops of a pair are cut with offsets of their own. So the place of a token within its crop says nothing about the
answer, and the token must tell where in the body it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.errors import AliceError
from custom.methods.terms import masked_mean

NEAR = (
    0.75  # of a token's side: how far a place may lie from the nearest token's centre, along each axis (ours)
)


def token_centres(grid: Sequence[int], pitch_mm: Sequence[float]) -> Tensor:
    """Centres of a crop's tokens, mm from the crop's corner along its axes.

    Args:
        grid: tokens along x, y, z.
        pitch_mm: a token's sides.

    Returns:
        (N, 3) in the order of flattened tokens.
    """
    axes = [
        (torch.arange(g, dtype=torch.float32) + 0.5) * float(p) for g, p in zip(grid, pitch_mm, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


class PlaceLoss(nn.Module):
    """Cross entropy between where tokens match and a soft answer by distance, less the answer's own entropy.

    It is 0 for a perfect answer, and ``log N`` less the answer's entropy where all features are alike. Negatives are
    the other tokens of the same crop, so processes need not talk.

    Args:
        pitch_mm: a token's sides along x, y, z.
        sigma_mm: width of the soft answer; None takes half of a token's mean side.
        temperature: of the cosines (ours: 0.1, as in SAM's training).

    Raises:
        AliceError: for a width below half of a token's side, or a temperature that is not positive.
    """

    METERS = ("place/hits", "place/chance", "place/mm", "place/valid", "place/index_share")

    def __init__(
        self, pitch_mm: Sequence[float], sigma_mm: float | None = None, temperature: float = 0.1
    ) -> None:
        super().__init__()
        half = sum(pitch_mm) / len(pitch_mm) / 2
        self.settings = {"sigma_mm": sigma_mm, "temperature": temperature}
        self.sigma_mm = half if sigma_mm is None else float(sigma_mm)
        if self.sigma_mm < 0.999 * half:
            raise AliceError(
                f"sigma_mm must be at least half of a token's side, {half:g} mm here; got {sigma_mm}."
            )
        if not temperature > 0:
            raise AliceError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.pitch_mm = tuple(float(p) for p in pitch_mm)
        self.register_buffer("_pitch", torch.tensor(self.pitch_mm), persistent=False)

    _pitch: Tensor

    def forward(
        self, student: Tensor, teacher: Tensor, places: Tensor, centres: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        """The term, and meters without gradient.

        Args:
            student: (B, V, D) of the crop's visible tokens.
            teacher: (B, N, D) of all tokens of the other crop.
            places: (B, V, 3) mm in the other crop, where each visible token's place lies; NaN where nobody knows.
            centres: (B, N, 3) mm in the other crop, what each of the teacher's tokens shows.
            counted: bool (B, V), False for tokens of air.

        Returns:
            ``l_place``, the mean over crops of each crop's mean over tokens that count; and ``METERS``: the share of tokens whose best match is the one nearest to their place, the chance
            of that, how far the best match lies off, the share of visible tokens that count, and the share of the
            teacher's variance that a token's index explains (1: only the place in the crop is told).
        """
        known = torch.isfinite(places).all(dim=-1)
        offset = torch.nan_to_num(places)[:, :, None] - centres[:, None]  # (B, V, N, 3)
        squared = offset.square().sum(dim=-1)
        nearest = squared.argmin(dim=-1, keepdim=True)
        apart = offset.abs().gather(2, nearest[..., None].expand(-1, -1, -1, 3))[:, :, 0]
        valid = known & counted & (apart <= NEAR * self._pitch).all(dim=-1)  # (B, V)

        log_answer = torch.log_softmax(-squared / (2 * self.sigma_mm**2), dim=-1)
        cosines = F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).transpose(1, 2)
        log_match = torch.log_softmax(cosines / self.temperature, dim=-1)
        divergence = (log_answer.exp() * (log_answer - log_match)).sum(dim=-1)  # (B, V)
        l_place = masked_mean(
            divergence, valid
        )  # by crop, so that processes with unequal counts agree with one
        with torch.no_grad():
            best = cosines.argmax(dim=-1, keepdim=True)
            off_mm = squared.gather(2, best)[..., 0].sqrt()
            share = valid.sum().clamp(min=1)
            nothing = torch.where(valid.any(), 0.0, math.nan)
            meters = {
                "place/hits": ((best == nearest)[..., 0] & valid).sum() / share + nothing,
                "place/chance": off_mm.new_full((), 1 / centres.shape[1]),
                "place/mm": (off_mm * valid).sum() / share + nothing,
                "place/valid": valid.float().mean(),
                "place/index_share": index_share(teacher),
            }
        return {"l_place": l_place, **meters}


def index_share(tokens: Tensor) -> Tensor:
    """Share of the variance of tokens (B, N, D) that lies between indices; NaN for a single crop.

    The mean over crops of one index varies by chance, too, which is subtracted. 1: a token tells its index and no more.
    """
    crops = len(tokens)
    if crops < 2:
        return tokens.new_tensor(math.nan)
    tokens = tokens.float()
    within = tokens.var(dim=0).mean()
    between = (tokens.mean(dim=0).var(dim=0).mean() - within / crops).clamp(min=0)
    return between / (between + within).clamp(min=1e-12)
