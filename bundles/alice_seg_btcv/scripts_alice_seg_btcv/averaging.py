"""Inferers that average probabilities, window by window: over mirrored windows, or over several networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .weights import fitting, read_state

Network = Callable[[Tensor], Tensor]


class Flips:
    """Mean over mirrored windows.

    Args:
        inferer: sliding windows; called with an image (B, 1, X, Y, Z) and a network.
        flips: axes of (B, C, X, Y, Z) to mirror, one list a window.
    """

    def __init__(self, inferer: Callable[..., Tensor], flips: Sequence[Sequence[int]]) -> None:
        self.inferer, self.flips = inferer, [list(axes) for axes in flips]

    def __call__(self, image: Tensor, network: Network) -> Tensor:
        """Logarithm of the mean probabilities (B, K, X, Y, Z)."""

        def mean(x: Tensor) -> Tensor:
            found = (network(x.flip(axes)).float().softmax(1).flip(axes) for axes in self.flips)
            return _log_mean(found, len(self.flips))

        return self.inferer(image, mean)


class Ensemble:
    """Mean over several networks. The network that it is called with is not asked.

    Args:
        inferer: as in :class:`Flips`.
        network: what the networks look like.
        checkpoints: weights of each.
        device: where they compute.
    """

    def __init__(
        self, inferer: Callable[..., Tensor], network: nn.Module, checkpoints: Sequence[str], device: Any
    ) -> None:
        self.inferer, self.networks = inferer, []
        for path in checkpoints:
            member = copy.deepcopy(network)
            member.load_state_dict(fitting(member, read_state(str(path))), strict=True)
            self.networks.append(member.to(device).eval())

    def __call__(self, image: Tensor, network: Network) -> Tensor:
        """Logarithm of the mean probabilities (B, K, X, Y, Z)."""

        def mean(x: Tensor) -> Tensor:
            found = (member(x).float().softmax(1) for member in self.networks)
            return _log_mean(found, len(self.networks))

        return self.inferer(image, mean)


def _log_mean(probabilities: Iterable[Tensor], count: int) -> Tensor:
    total: Any = sum(probabilities)
    return (total / count).clamp_min(1e-8).log()
