"""The box around the body, over which inference lays its windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d


class Body:
    """Select the body, without thin things such as the table: tissue that is left when its surface is taken off.

    Args:
        body_hu: what is denser is tissue.
        margin: voxels along x, y, z that are taken off.
    """

    def __init__(self, body_hu: float, margin: Sequence[int]) -> None:
        self.body_hu, self.margin = body_hu, list(margin)

    def __call__(self, volume: Tensor) -> Tensor:
        """Bool (1, X, Y, Z) of a volume in HU. It is all tissue, if nothing is left."""
        tissue = volume > self.body_hu
        size = [2 * m + 1 for m in self.margin]
        core: torch.Tensor = avg_pool3d(tissue[None].float(), size, 1, self.margin)[0] > 0.99
        return core if core.any() else tissue
