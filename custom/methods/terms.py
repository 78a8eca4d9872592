"""Loss terms that several methods share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over samples of each sample's mean over the chosen tokens; a sample without any counts as 0."""
    weights = weights.to(values.dtype)
    return ((values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).mean()


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """``2 - 2 cos(a, stopgrad(b))`` over the last axis (BYOL, SimSiam)."""
    return 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=-1)
