"""Learning from labels that show some of the organs only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MarginalLoss:
    """A loss in which organs that nobody annotated count as background: their probabilities are added up.

    Args:
        loss: of logits (B, C, X, Y, Z) and labels (B, 1, X, Y, Z).
        annotated: label values that are annotated.
        num_classes: with background.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], annotated: Sequence[int], num_classes: int
    ) -> None:
        self.loss, self.annotated = loss, list(annotated)
        self.unseen = [value for value in range(num_classes) if value not in self.annotated]

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        unseen = logits[:, self.unseen].float().logsumexp(1, keepdim=True)
        merged = torch.cat([unseen, logits[:, self.annotated].float()], 1)
        renamed: Any = sum((label == value).float() * i for i, value in enumerate(self.annotated, 1))
        return self.loss(merged, renamed)


def annotated_only(annotated: Sequence[int]) -> Callable[[list[dict[str, Tensor]]], tuple[Any, ...]]:
    """Function that gives a metric the annotated channels of prediction and label, item by item."""
    channels = list(annotated)
    return lambda items: tuple([item[key][channels] for item in items] for key in ("pred", "label"))
