"""The local losses of ACE: binary cross entropy of matches, far fewer than what does not match."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_bce(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Mean over all entries of the binary cross entropy, weighted by ``alpha t + (1 - alpha)(1 - t)`` (the authors' code).

    Args:
        logits: of any shape.
        labels: t in [0, 1], of the same shape.
        alpha: weight of a match; ``1 - alpha`` is that of a pair that does not match.
    """
    logits, labels = logits.float(), labels.float()
    error = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (_weight(labels, alpha) * error).mean()


def least_bce(labels: Tensor, alpha: float) -> Tensor:
    """What :func:`weighted_bce` cannot fall below: soft labels have an entropy."""
    labels = labels.float()
    unsure = -(torch.xlogy(labels, labels) + torch.xlogy(1 - labels, 1 - labels))
    return (_weight(labels, alpha) * unsure).mean()


def _weight(labels: Tensor, alpha: float) -> Tensor:
    return alpha * labels + (1 - alpha) * (1 - labels)


def hits(logits: Tensor, labels: Tensor, inside: Tensor) -> Tensor:
    """Share of the tokens inside whose highest logit is their match's; NaN where no token is inside.

    Args:
        logits, labels: (B, N, M).
        inside: bool (B, N).
    """
    right = (logits.argmax(dim=-1) == labels.argmax(dim=-1)) & inside
    return right.sum() / inside.sum()
