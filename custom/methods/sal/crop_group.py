"""SAL's draw: several slabs of one scan, one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.methods.draws import InTurn
from custom.methods.sal.losses import exact, near


class CropGroup(InTurn):
    """K crops of one scan that share x and y and differ along z (ours; the paper takes slices).

    The first crop, the anchor, shows the body. The second one is near it: drawn from all places whose relative position
    differs by less than ``t``, and which share tissue with it. The others lie anywhere along z. Patients take turns.

    A position is the height of a crop's centre, from 0 at the lower end of the body's box to 1 at its upper end. It
    travels as a fraction of whole numbers, so that it is compared exactly.

    A scan that is too thin for a second crop gives the anchor twice. Such a pair says nothing, so no loss uses it; its
    share is logged as ``pairs_trivial``.

    Args:
        store: volumes on one grid.
        crop_size: voxels along x, y, z.
        t: positions that differ by less than this are near (0.1: the lineage's value for CT; 0.35 for short-axis
            cardiac MR).
        crops_per_scan: K (ours: 4).
        views_per_crop: how often each crop is repeated, each time with a view of its own (2: the lineage).
        options: of :class:`custom.methods.draws.Draws`.

    Raises:
        AliceError: for settings out of range.
    """

    crop_keys = ()

    def __init__(
        self,
        store: VolumeStore,
        crop_size: Sequence[int],
        t: float = 0.1,
        crops_per_scan: int = 4,
        views_per_crop: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(store, crop_size, **options)
        if crops_per_scan < 2:
            raise AliceError(
                f"crops_per_scan must be at least 2, got {crops_per_scan}: SAL compares crops of one scan."
            )
        if views_per_crop < 1:
            raise AliceError(f"views_per_crop must be at least 1, got {views_per_crop}.")
        self.t, self.threshold = t, exact(t)
        self.crops_per_scan, self.views_per_crop = crops_per_scan, views_per_crop
        self.crops = crops_per_scan * views_per_crop

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return super().summary() | {
            "t": self.t,
            "crops_per_scan": self.crops_per_scan,
            "views_per_crop": self.views_per_crop,
        }

    def count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """How many scans were drawn, and how many were too thin for a second crop."""
        return {"groups": len(batch["trivial"]), "trivial": int(batch["trivial"].sum())}

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The share of scans that were too thin."""
        return {"pairs_trivial": counts["trivial"] / counts["groups"]}

    def place(self, index: int, without: tuple[str, ...] = ()) -> tuple[str, np.ndarray, bool]:
        """Scan of a sample, first voxels (K, 3) of its crops, and whether the scan is too thin for a second crop."""
        name, rng = self._draw_scan(index, without), self._rng(index, 0, without)
        anchor = self._draw_start(name, rng)
        room = int(self.store.shape(name)[2] - self.crop_size[2])
        heights = np.arange(room + 1) if room > 0 else anchor[2:]
        partners = heights[self._pairs(name, anchor[2:], heights)[0]]
        second = rng.choice(partners) if len(partners) else anchor[2]
        others = rng.choice(heights, self.crops_per_scan - 2)
        chosen = np.array([anchor[2], second, *others]).repeat(self.views_per_crop)
        return name, np.stack([np.array([*anchor[:2], z]) for z in chosen]), not len(partners)

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        name, starts, trivial = self.place(index, without)
        self.quarantine.examine(name, self.store.verify)
        heights = starts[:, 2]
        return {
            "crops": torch.stack([self._crop(name, start) for start in starts]),  # (K, 1, X, Y, Z)
            "start": torch.from_numpy(starts),
            "position": self._positions(name, heights),  # (K, 2) numerators and denominators
            "pairs": torch.from_numpy(
                self._pairs(name, heights, heights)
            ),  # bool (K, K): whose tokens are compared
            "threshold": torch.tensor([self.threshold.numerator, self.threshold.denominator]),
            "trivial": trivial,
            "scan": name,
            "patient": self.store.patient(name),
        } | self._about(index, without)

    def _positions(self, name: str, heights: np.ndarray) -> torch.Tensor:
        """First voxels along z (n,) -> relative positions of the crops' centres, (n, 2)."""
        low, high = self.store.body_box_mm(name)[:, 2]  # in voxels: halves
        above = 2 * heights + self.crop_size[2] - 1 - round(2 * low)
        return torch.from_numpy(np.stack([above, np.full_like(above, round(2 * (high - low)))], axis=1))

    def _pairs(self, name: str, heights: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Bool (n, m): near each other, sharing tissue, and not at the same place."""
        apart = np.abs(heights[:, None] - others)
        alike = near(self._positions(name, heights), self._positions(name, others), self.threshold)
        found: np.ndarray = alike.numpy() & (apart < self.crop_size[2]) & (apart > 0)
        return found
