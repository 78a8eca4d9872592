"""Transforms that stop at a case which cannot be right, and name its file."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from importlib import metadata
from typing import Any

import nibabel
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation
from nibabel.orientations import aff2axcodes

from .files import holds_dicom, is_damaged
from .layouts import IMAGE_SUFFIXES
from .refusals import name_of, refuse

# Corners of image and label may lie this share of a voxel apart; as in alice datalist.
_APART = 0.05
# CT shows air or fat: this share of a scan lies below this value (ours; MR that dips below 0 does not)
_AIR_OR_FAT_HU, _AIR_OR_FAT = -50.0, 0.005
# as alice scan: mm of a voxel's sides, of the scan's two shortest sides and its longest, and the cosine between two axes
_STEP_MM, _SIDES_MM, _SLANT = (0.02, 50.0), (2.0, 20.0, 4000.0), 0.01


class CheckFile(MapTransform):
    """Stop at a file that is not there, is cut short, or is none that is read. What is no path is let pass.

    Args:
        keys: of the file.

    Raises:
        ValueError: naming the file.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if isinstance(data[key], (str, os.PathLike)) and (problem := file_problem(str(data[key]))):
                raise refuse(str(data[key]), f" {problem}.")
        return data


def file_problem(path: str) -> str:
    """Why a file cannot be read, in words that follow its name; "" if it can."""
    if holds_dicom(path):
        return f"holds DICOM; dcm2niix -z y -o IMAGES {path if os.path.isdir(path) else 'FOLDER'} makes NIfTI of it"
    if not os.path.isfile(path):
        return "is a folder" if os.path.isdir(path) else "does not exist"
    if is_damaged(path):
        return "is cut short or damaged; copy it again"
    if not path.lower().endswith(IMAGE_SUFFIXES):
        return f"is none of the files that are read ({', '.join(IMAGE_SUFFIXES)})"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if re.search("[.]nii([.]gz)?$", path):  # MONAI makes axes of its own where a header's cannot be
        return _direction_problem(torch.as_tensor(nibabel.load(path).affine[:3, :3]))
    if path.lower().endswith((".nrrd", ".nhdr")):
        return _space_problem(path)
    return ""


def _space_problem(path: str) -> str:
    """ITK before 5.4.7 reads a NRRD in left-anterior-superior as if it were turned by half a turn."""
    with open(path, "rb") as file:
        header = file.read(4096).split(b"\n\n")[0]
    found = re.search(rb"^space:\s*(LAS|left-anterior-superior)\s*$", header, re.IGNORECASE | re.MULTILINE)
    if not found:
        return ""
    try:
        version = metadata.version("itk")
    except metadata.PackageNotFoundError:  # MONAI reads it by another package
        return ""
    if [int(n) for n in re.findall(r"\d+", version)[:3]] >= [5, 4, 7]:
        return ""
    return "is a NRRD in left-anterior-superior, which ITK before 5.4.7 turns; pip install -U itk"


class CheckScan(MapTransform):
    """Stop at an image that is no CT in Hounsfield units, too thin, or on a grid that no scanner makes.

    Args:
        keys: of the image (1, X, Y, Z).
        air_hu: an image without any value above this shows nothing but air.
        min_voxels: an image with fewer along an axis is too thin.

    Raises:
        ValueError: naming the file.
    """

    def __init__(self, keys: KeysCollection, air_hu: float, min_voxels: int = 1) -> None:
        super().__init__(keys)
        self.air_hu, self.min_voxels = air_hu, min_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if problem := self._problem(data[key]):
                raise refuse(name_of(data[key]), f" {problem}.")
        return data

    def _problem(self, image: MetaTensor) -> str:
        if image.ndim != 4:
            return f"has {image.ndim - 1} dimensions, not 3"
        if image.shape[0] != 1:
            return f"has {image.shape[0]} channels"
        if min(image.shape[1:]) < self.min_voxels:
            return f"is too thin: {list(image.shape[1:])} voxels; at least {self.min_voxels} are needed (min_voxels)"
        return _axes_problem(image) or self._value_problem(image)

    def _value_problem(self, image: torch.Tensor) -> str:
        if not torch.isfinite(image).all():
            return "holds values that are no numbers"
        low, high = float(image.min()), float(image.max())
        if low >= 0:
            return "has no value below 0: it is no CT, or not in Hounsfield units"
        if high <= self.air_hu:
            return "shows nothing but air"
        share = float((image < _AIR_OR_FAT_HU).float().mean())
        if share >= _AIR_OR_FAT:
            return ""
        return (
            f"shows neither air nor fat (values {low:g} to {high:g}, {share:.2%} of them below {_AIR_OR_FAT_HU:g}): it is "
            "no CT, or not in Hounsfield units"
        )


def _direction_problem(axes: torch.Tensor) -> str:
    """What is wrong with the axes (3, 3) of an affine, in words that follow the file's name."""
    steps = axes.norm(dim=0)
    if not torch.isfinite(axes).all() or (steps == 0).any() or abs(float((axes / steps).det())) < 1e-6:
        return "has axes that cannot be told from its header: convert it again from its source"
    axes = axes / steps
    if float((axes.T @ axes - torch.eye(3)).abs().max()) > _SLANT:
        return "has axes that are not at right angles; dcm2niix -z y -o IMAGES FOLDER straightens a tilted gantry"
    return ""


def _axes_problem(image: MetaTensor) -> str:
    if problem := _direction_problem(image.affine[:3, :3].double()):
        return problem
    steps = image.affine[:3, :3].double().norm(dim=0)
    sides = (steps * torch.tensor(image.shape[1:])).sort().values.tolist()
    fits = all(_STEP_MM[0] <= step <= _STEP_MM[1] for step in steps.tolist())
    if fits and sides[0] >= _SIDES_MM[0] and sides[1] >= _SIDES_MM[1] and sides[2] <= _SIDES_MM[2]:
        return ""
    told = " x ".join(f"{step:.3g}" for step in steps.tolist())
    return f"has a size that no patient has: {list(image.shape[1:])} voxels of {told} mm"


class CheckLabel(MapTransform):
    """Stop at a label that does not lie on its image's grid, holds unknown values, or is empty.

    A label whose axes point otherwise is turned as its image first: an LPS image and an RAS label may lie at one place.

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
        turned = dict(data)
        for key in self.key_iterator(turned):
            turned[key] = _turned_like(data[key], data[self.image_key])
            if problem := _grid_problem(data[self.image_key], turned[key]) or self._value_problem(
                turned[key]
            ):
                raise refuse(name_of(data[key]), f": {problem}.")
        return turned

    def _value_problem(self, label: torch.Tensor) -> str:
        if unknown := sorted(set(torch.unique(label).tolist()) - set(range(self.num_classes)))[:5]:
            return f"label values {unknown}, this bundle knows 0 to {self.num_classes - 1}; a setting label_map maps them"
        return (
            ""
            if self.allow_empty or label.any()
            else "the label is empty; allow_empty: true lets such cases pass"
        )


def _turned_like(label: MetaTensor, image: MetaTensor) -> MetaTensor:
    """The label, its axes flipped and swapped as those of its image."""
    codes = [aff2axcodes(one.affine.numpy()) for one in (label, image)]
    if codes[0] == codes[1] or None in codes[0] + codes[1]:
        return label
    return Orientation(axcodes="".join(codes[1]), labels=None)(label)


def _grid_problem(image: MetaTensor, label: MetaTensor) -> str:
    if image.shape != label.shape:
        return f"image and label lie on different grids, {list(image.shape[1:])} and {list(label.shape[1:])}"
    sides = [torch.tensor([0.0, n - 1.0]) for n in image.shape[1:]]
    corners = torch.cartesian_prod(*sides, torch.ones(1)).double()
    apart = torch.matmul((image.affine - label.affine).double(), corners.T)[:3].norm(dim=0).max()
    allowed = _APART * float(image.affine[:3, :3].norm(dim=0).min())
    return "" if apart <= allowed else f"image and label are placed differently, up to {apart:.2f} mm apart"
