"""The draw of ACE: a small crop, and a large one around it on the same lattice of cells."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from custom.data.store.records import unpack
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.methods.ace.lattice import tokens_along
from custom.methods.draws import Draws

logger = logging.getLogger(__name__)

HELD = 0.9  # share of volumes that must hold the large crop along an axis (ours)


class NestedPlace(NamedTuple):
    """Where a pair lies: first voxels along x, y, z, outside of the volume where it is padded."""

    scan: str
    small: np.ndarray
    large: np.ndarray


class NestedPair(Draws):
    """A small crop, and a large crop of ``zoom`` times its sides that contains it, averaged down to its size.

    Both lie on one lattice of cells; a cell is a token's patch. Each sample has a lattice of its own, which begins
    somewhere in the first cell, so that all voxels are seen. The large crop begins a multiple of ``zoom`` cells before the
    small one. So a token of the large crop shows exactly ``prod(zoom)`` tokens of the small one, or none. Where a volume
    is smaller than the large crop, it is padded with air, and the pair is counted as padded.

    The window is applied before the average, so that the mean of a token of the large crop is the mean of its cells.

    Args:
        store: volumes on one grid.
        crop_size: voxels along x, y, z.
        patch: voxels of a token along x, y, z.
        zoom: 1, 2 or ``auto`` along each axis, or ``auto`` for all. ``auto`` takes 2 where at least 90 % of the volumes
            are as large as the large crop and the number of tokens is even, else 1.
        options: of :class:`Draws`.

    Attributes:
        zoom: 1 or 2 along x, y, z.
        cells: tokens of a crop along x, y, z.
        large_size: voxels of the large crop before it is averaged.

    Raises:
        AliceError: for settings out of range, or volumes that are too small along all axes.
    """

    crops = 2
    crop_keys = ()

    def __init__(
        self,
        store: VolumeStore,
        crop_size: Sequence[int],
        patch: Sequence[int] = (16, 16, 16),
        zoom: str | Sequence[int | str] = (2, 2, 2),
        **options: Any,
    ) -> None:
        super().__init__(store, crop_size, **options)
        names = unpack(self._names)
        self.patch = np.array(patch)
        shapes = np.array([store.shape(name) for name in names])
        self.zoom = _zoom(zoom, shapes, self.crop_size, self.patch)
        self.cells = tokens_along(self.crop_size.tolist(), self.patch.tolist(), self.zoom)
        self.large_size = self.crop_size * np.array(self.zoom)
        boxes = np.array([np.diff(store.body_box_mm(name), axis=0)[0] for name in names])  # voxels
        body = np.median(boxes, axis=0)
        if (self.large_size > body).sum() >= 2:
            spans = [" x ".join(f"{side:g}" for side in sides) for sides in (self.large_size, body)]
            logger.warning(
                "ACE's large crop of %s voxels is larger than most bodies (median %s): much of it shows air. "
                "Take a smaller crop_size, such as [96, 96, 96] or [64, 64, 64].",
                *spans,
            )

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return super().summary() | {"zoom": list(self.zoom), "patch": self.patch.tolist()}

    def count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Pairs seen, and those whose large crop leaves its volume."""
        return {"seen": len(batch["padded"]), "padded": int(batch["padded"].sum())}

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The share of padded pairs so far."""
        return {"padded_pairs": counts["padded"] / max(counts["seen"], 1)}

    def place(self, index: int, without: tuple[str, ...] = ()) -> NestedPlace:
        """Which voxels sample ``index`` shows."""
        name, rng = self._draw_scan(index, without), self._rng(index, 0, without)
        near = self._draw_start(name, rng)
        sizes = zip(self.crop_size.tolist(), self.patch.tolist(), self.zoom, strict=True)
        placed = [
            _place(int(start), side, crop, patch, zoom, rng)
            for start, side, (crop, patch, zoom) in zip(near, self.store.shape(name), sizes, strict=True)
        ]
        small, large = (np.array(starts) for starts in zip(*placed, strict=True))
        return NestedPlace(name, small, large)

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        name, small, large = self.place(index, without)
        self.quarantine.examine(name, self.store.verify)
        wide, shape = self._crop(name, large, self.large_size)[None], self.store.shape(name)
        return {
            "crop_small": self._crop(name, small),
            "crop_large": F.avg_pool3d(wide, self.zoom)[0],
            "o_small": torch.from_numpy(small // self.patch),  # the lattice begins at voxel small % patch
            "o_large": torch.from_numpy(large // self.patch),
            "zoom": torch.tensor(self.zoom),
            "padded": bool((large < 0).any() or (large + self.large_size > shape).any()),
            "scan": name,
            "patient": self.store.patient(name),
        } | self._about(index, without)


def _place(
    near: int, side: int, crop: int, patch: int, zoom: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Along one axis: first voxels of the small and the large crop, a multiple of ``zoom`` patches apart.

    The large crop contains the small one, and lies in the volume (or around it, where it is the smaller of the two). Where
    no multiple fits, the small crop moves by at most half of one.
    """
    large, step = zoom * crop, zoom * patch
    room = side - large
    low, high = max(min(0, room), near + crop - large), min(max(0, room), near)
    first = low + (near - low) % step
    if first <= high:
        return near, first + step * int(rng.integers((high - first) // step + 1))
    start = int(rng.integers(low, high + 1))
    return start + step * math.floor((near - start) / step + 0.5), start


def _zoom(
    asked: str | Sequence[int | str], shapes: np.ndarray, crop_size: np.ndarray, patch: np.ndarray
) -> tuple[int, int, int]:
    """Whole numbers for what was asked; shapes (n, 3) of the volumes."""
    each = [asked] * 3 if isinstance(asked, str) else list(asked)
    each = each * 3 if each == ["auto"] else each  # as a command line writes it
    if len(each) != 3 or any(k not in (1, 2, "auto") for k in each):
        raise AliceError(f"zoom must be auto, or 1, 2 or auto along x, y, z; got {asked!r}.")
    held = (shapes >= 2 * crop_size).mean(axis=0)
    automatic = 1 + ((held >= HELD) & (crop_size % (2 * patch) == 0))
    found = [int(own if k == "auto" else k) for k, own in zip(each, automatic, strict=True)]
    for axis, k, share, made in zip("xyz", each, held, found, strict=True):
        if k == "auto":
            logger.info(
                "ACE's zoom along %s is %d: %.0f %% of the volumes hold the large crop.",
                axis,
                made,
                100 * share,
            )
    if found == [1, 1, 1]:
        median = " x ".join(f"{n:g}" for n in np.median(shapes, axis=0))
        raise AliceError(
            f"zoom is 1 along all axes, so that both crops would be the same. The large crop would have "
            f"{' x '.join(str(2 * n) for n in crop_size)} voxels, the volumes have {median} (median): take a smaller "
            "crop_size, or set train::dataset::zoom to [2, 2, 2], which pads the volumes with air."
        )
    x, y, z = found
    return x, y, z
