"""Feature maps as images, with an affine that says where each token lies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform


class PlaceFeaturesd(MapTransform):
    """Give a feature map the affine of its image, scaled by the stride: token ``i`` covers voxels ``i*s`` to ``i*s+s-1``.

    Args:
        keys: feature maps (C, gx, gy, gz).
        image: key of the MetaTensor that they were computed from.
        stride: voxels per token along x, y, z.
    """

    def __init__(self, keys: KeysCollection, image: Hashable, stride: Sequence[int]) -> None:
        super().__init__(keys)
        self.image, self.stride = image, np.array(stride, dtype=float)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        affine = np.asarray(data[self.image].affine, dtype=float)
        placed = affine.copy()
        placed[:3, :3] = affine[:3, :3] * self.stride
        placed[:3, 3] = affine[:3, :3] @ ((self.stride - 1) / 2) + affine[:3, 3]
        for key in self.keys:
            meta = {"filename_or_obj": data[self.image].meta.get("filename_or_obj", "features")}
            out[key] = MetaTensor(
                torch.as_tensor(data[key]).float().cpu(), affine=torch.from_numpy(placed), meta=meta
            )
        return out
