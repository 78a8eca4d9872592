"""Transforms that stop at a case which cannot be right, and name its file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

# Corners of image and label may lie this share of a voxel apart; as in alice datalist.
_APART = 0.05


class CheckScan(MapTransform):
    """Stop at an image that is no CT in Hounsfield units.

    Args:
        keys: of the image (1, X, Y, Z).
        air_hu: an image without any value above this shows nothing but air.

    Raises:
        ValueError: naming the file.
    """

    def __init__(self, keys: KeysCollection, air_hu: float) -> None:
        super().__init__(keys)
        self.air_hu = air_hu

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if problem := self._problem(data[key]):
                raise ValueError(f"{name_of(data[key])} {problem}.")
        return data

    def _problem(self, image: torch.Tensor) -> str:
        if image.shape[0] != 1:
            return f"has {image.shape[0]} channels"
        if not torch.isfinite(image).all():
            return "holds values that are no numbers"
        if image.min() >= 0:
            return "has no value below 0: it is no CT, or not in Hounsfield units"
        return "shows nothing but air" if image.max() <= self.air_hu else ""


class CheckLabel(MapTransform):
    """Stop at a label that does not lie on its image's grid, holds unknown values, or is empty.

    Args:
        keys: of the label (1, X, Y, Z).
        image_key: of its image.
        num_classes: label values are 0 to ``num_classes - 1``.
        allow_empty: let a label without any organ pass.

    Raises:
        ValueError: naming the label's file.
    """

    def __init__(self, keys: KeysCollection, image_key: str, num_classes: int, allow_empty: bool) -> None:
        super().__init__(keys)
        self.image_key, self.num_classes, self.allow_empty = image_key, num_classes, allow_empty

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if problem := _grid_problem(data[self.image_key], data[key]) or self._value_problem(data[key]):
                raise ValueError(f"{name_of(data[key])}: {problem}.")
        return data

    def _value_problem(self, label: torch.Tensor) -> str:
        if unknown := sorted(set(torch.unique(label).tolist()) - set(range(self.num_classes)))[:5]:
            return f"label values {unknown}, this bundle knows 0 to {self.num_classes - 1}"
        return (
            ""
            if self.allow_empty or label.any()
            else "the label is empty; allow_empty: true lets such cases pass"
        )


def _grid_problem(image: MetaTensor, label: MetaTensor) -> str:
    if image.shape != label.shape:
        return f"image and label lie on different grids, {list(image.shape[1:])} and {list(label.shape[1:])}"
    sides = [torch.tensor([0.0, n - 1.0]) for n in image.shape[1:]]
    corners = torch.cartesian_prod(*sides, torch.ones(1)).double()
    apart = torch.matmul((image.affine - label.affine).double(), corners.T)[:3].norm(dim=0).max()
    allowed = _APART * float(image.affine[:3, :3].norm(dim=0).min())
    return "" if apart <= allowed else f"image and label are placed differently, up to {apart:.2f} mm apart"


def name_of(image: MetaTensor) -> str:
    """File that an image was read from."""
    return str(image.meta.get("filename_or_obj", "the image"))
