"""Tissues of the phantom, and shapes in canonical mm that are painted onto the voxels of a scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

from custom.data.organs import BTCV_ORGANS, FLARE22_ORGANS

Array = NDArray[Any]  # of floats; float32 if it covers a scan
Shape = Callable[[Array, Array, Array], Array]
"""Maps canonical x, y, z in mm to roughly the distance from its surface in mm: below 0 inside, above 0 outside."""


class Tissue(IntEnum):
    """The tissue of a voxel; 1 to 13 are the labels of FLARE22."""

    AIR = 0
    LIVER = 1
    RIGHT_KIDNEY = 2
    SPLEEN = 3
    PANCREAS = 4
    AORTA = 5
    VENA_CAVA = 6
    RIGHT_ADRENAL = 7
    LEFT_ADRENAL = 8
    GALLBLADDER = 9
    ESOPHAGUS = 10
    STOMACH = 11
    DUODENUM = 12
    LEFT_KIDNEY = 13
    RIGHT_MEDULLA = 14
    LEFT_MEDULLA = 15
    LIVER_VEIN = 16
    ESOPHAGUS_GAS = 17
    STOMACH_FLUID = 18
    STOMACH_GAS = 19
    DUODENUM_FLUID = 20
    SKIN = 21
    FAT = 22
    MUSCLE = 23
    VISCERAL_FAT = 24
    LUNG = 25
    MEDIASTINUM = 26
    MYOCARDIUM = 27
    HEART_BLOOD = 28
    TRACHEA = 29
    CORTICAL = 30
    TRABECULAR = 31
    CARTILAGE = 32
    CORD = 33
    ARTERY = 34
    VEIN = 35
    PORTAL_VEIN = 36
    BOWEL_WALL = 37
    BOWEL_FLUID = 38
    BOWEL_CONTRAST = 39
    BOWEL_GAS = 40
    STOOL = 41
    BLADDER = 42
    TABLE = 43


_BTCV_TISSUES = (Tissue.SPLEEN, Tissue.RIGHT_KIDNEY, Tissue.LEFT_KIDNEY, Tissue.GALLBLADDER, Tissue.ESOPHAGUS,
                 Tissue.LIVER, Tissue.STOMACH, Tissue.AORTA, Tissue.VENA_CAVA, Tissue.PORTAL_VEIN, Tissue.PANCREAS,
                 Tissue.RIGHT_ADRENAL, Tissue.LEFT_ADRENAL)  # fmt: skip
_INSIDE = {  # tissues that belong to an organ
    Tissue.RIGHT_MEDULLA: Tissue.RIGHT_KIDNEY,
    Tissue.LEFT_MEDULLA: Tissue.LEFT_KIDNEY,
    Tissue.LIVER_VEIN: Tissue.LIVER,
    Tissue.ESOPHAGUS_GAS: Tissue.ESOPHAGUS,
    Tissue.STOMACH_FLUID: Tissue.STOMACH,
    Tissue.STOMACH_GAS: Tissue.STOMACH,
    Tissue.DUODENUM_FLUID: Tissue.DUODENUM,
}


def _label_table(organs: Sequence[Tissue]) -> NDArray[np.uint8]:
    """The label of every tissue: the number of its organ in ``organs``, from 1; 0 if it belongs to none."""
    label_of = {organ: label for label, organ in enumerate(organs, start=1)}
    return np.array([label_of.get(_INSIDE.get(t, t), 0) for t in Tissue], dtype=np.uint8)


LABEL_OF_TISSUE = {"flare22": _label_table(list(Tissue)[1:14]), "btcv": _label_table(_BTCV_TISSUES)}
ORGANS_OF = {"flare22": FLARE22_ORGANS, "btcv": BTCV_ORGANS}


class Canvas:
    """The tissues of a scan, painted shape after shape.

    A shape is evaluated only inside its bounding box, so sixty shapes cost a few passes over the scan.

    Args:
        canonical: float32 (X, Y, Z, 3), canonical mm of every voxel.
    """

    def __init__(self, canonical: Array) -> None:
        self.x, self.y, self.z = (np.ascontiguousarray(canonical[..., axis]) for axis in range(3))
        self.tissue = np.zeros(canonical.shape[:3], dtype=np.uint8)
        self._coarse = canonical[::4, ::4, ::4]
        steps = [np.abs(np.diff(self._coarse, axis=axis)).max(initial=0.0) for axis in range(3)]
        self._margin = float(max(steps))  # a shape may lie between two coarse samples

    def block(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """Slices that hold every voxel with canonical coordinates in the box; None if there is no such voxel."""
        box_low = np.asarray(low, dtype=np.float32) - self._margin
        box_high = np.asarray(high, dtype=np.float32) + self._margin
        within = (self._coarse > box_low) & (self._coarse < box_high)
        inside = within[..., 0] & within[..., 1] & within[..., 2]
        if not inside.any():
            return None
        slices = []
        for axis in range(3):
            hit = np.flatnonzero(np.moveaxis(inside, axis, 0).reshape(inside.shape[axis], -1).any(axis=1))
            slices.append(slice(max(0, 4 * (int(hit[0]) - 1)), 4 * (int(hit[-1]) + 2)))
        return slices[0], slices[1], slices[2]

    def paint(
        self,
        tissue: int,
        shape: Shape,
        low: Sequence[float],
        high: Sequence[float],
        over: Sequence[int] | None = None,
    ) -> None:
        """Set ``tissue`` wherever ``shape`` is negative inside the box ``low``..``high`` (mm).

        ``over``: paint only over these tissues; by default over everything but air.
        """
        where = self.block(low, high)
        if where is None:
            return
        give_way = np.zeros(len(Tissue), dtype=bool)
        give_way[list(over) if over is not None else slice(1, None)] = True
        current = self.tissue[where]
        inside = give_way[current]
        for axis, coordinate in enumerate((self.x[where], self.y[where], self.z[where])):
            inside &= (coordinate >= low[axis]) & (coordinate <= high[axis])
        index = np.nonzero(inside)
        value = shape(self.x[where][index], self.y[where][index], self.z[where][index])
        current[index] = np.where(value < 0, tissue, current[index])

    def paint_tube(self, tissue: int, tube: Tube, over: Sequence[int] | None = None) -> None:
        """Set ``tissue`` inside a tube, in the tube's own bounding box."""
        self.paint(tissue, tube, tube.low, tube.high, over)


class Tube:
    """A tube of varying radius along a smooth path.

    Args:
        path: control points (x, y, z, radius) in mm.
        lumps: height in mm of a fixed bumpiness of the wall.
        shrink: mm taken off every radius (the lumen of a tube with a wall).
    """

    def __init__(self, path: Sequence[Sequence[float]], lumps: float = 0.0, shrink: float = 0.0) -> None:
        control = np.asarray(path, dtype=np.float64)
        knots = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(control[:, :3], axis=0), axis=1))])
        self.arc = np.linspace(0.0, knots[-1], max(int(knots[-1] / 2.0), 8))
        self.axis = CubicSpline(knots, control[:, :3])(self.arc)
        self.radius = np.interp(self.arc, knots, control[:, 3]) - shrink
        self.lumps = lumps
        reach = self.radius.max() + lumps
        self.low = tuple(self.axis.min(axis=0) - reach)
        self.high = tuple(self.axis.max(axis=0) + reach)
        self._tree = cKDTree(self.axis)
        self._reach = float(reach) + 1.0

    def nearest(self, x: Array, y: Array, z: Array) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Distance to the path in mm (inf if far), and the index of its nearest sample."""
        return self._tree.query(np.stack([x, y, z], axis=-1), distance_upper_bound=self._reach)

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        distance, index = self.nearest(x, y, z)
        radius = np.append(self.radius, 0.0)[index]
        return (distance - radius).astype(np.float32) + bumps(x, y, z, self.lumps)


def bumps(x: Array, y: Array, z: Array, height: float) -> Array | float:
    """A fixed pattern of bumps of about 2 cm, between ``-height`` and ``height``."""
    if height == 0:
        return 0.0
    return height * np.sin(x / 5.3 + 1) * np.sin(y / 4.7 + 2) * np.sin(z / 5.9)


def superellipse(x: Array, y: Array, a: float, b: float, power: float = 2.4) -> Array:
    """Relative radius of a rounded box with semi-axes a, b: 1 on its edge."""
    return ((np.abs(x) / a) ** power + (np.abs(y) / b) ** power) ** (1 / power)


def ellipsoid(
    centre: Sequence[float], semi: Sequence[float], tilt_deg: Sequence[float] = (0.0, 0.0), lumps: float = 0.0
) -> Shape:
    """An ellipsoid, turned by ``tilt_deg`` about y (first) and about x (second)."""
    about_y, about_x = np.radians(tilt_deg)
    cos_y, sin_y, cos_x, sin_x = np.cos(about_y), np.sin(about_y), np.cos(about_x), np.sin(about_x)

    def shape(x: Array, y: Array, z: Array) -> Array:
        u, v, w = x - centre[0], y - centre[1], z - centre[2]
        u, w = cos_y * u + sin_y * w, -sin_y * u + cos_y * w
        v, w = cos_x * v + sin_x * w, -sin_x * v + cos_x * w
        radius = np.sqrt((u / semi[0]) ** 2 + (v / semi[1]) ** 2 + (w / semi[2]) ** 2)
        return (radius - 1) * min(semi) + bumps(x, y, z, lumps)

    return shape


def box_around(centre: Sequence[float], reach: float) -> tuple[list[float], list[float]]:
    """Lower and upper corner of the cube of half-width ``reach`` mm."""
    return [c - reach for c in centre], [c + reach for c in centre]


def smooth_max(softness: float, *values: Array) -> Array:
    """A maximum with its corner rounded over about ``softness`` mm: an intersection with a blunt edge."""
    top = values[0]
    for value in values[1:]:
        gap = np.maximum(softness - np.abs(top - value), 0) / softness
        top = np.maximum(top, value) + gap * gap * (softness / 4)
    return top
