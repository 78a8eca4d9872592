"""Aligned pairs whose crops have offsets of their own, with every token's place in the other patient's crop (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.landmarks.aligners.protocol import Aligner, Map, MapAligner
from custom.methods.pairs import AlignedPair, Placement
from custom.space import to_voxels, to_world

_ITERATIONS, _INVERTED_MM = 6, 1.0  # of the inversion of a map, and how exact it must be


class PlacedPair(AlignedPair):
    """Pairs of crops around one anatomical point, each cut with an offset of its own and moved into its volume.

    Every token of a crop gets its place in the other crop: by the aligner's map of the two scans where it has one
    (``map_of``), else by the shift that the two offsets and the matched point make. Tokens where the map folds, or cannot be
    inverted, have no place. A pair with too few tokens that have their place in the other crop is drawn again, and counted.

    Args:
        store: volumes on one grid.
        aligner: finds the point in the key.
        crop_size: voxels along x, y, z.
        patch: voxels of a token along x, y, z.
        min_overlap: share of tokens that must have their place in the other crop.
        options: of :class:`AlignedPair`.

    Raises:
        AliceError: for settings out of range, or fewer than two patients.
    """

    def __init__(
        self,
        store: VolumeStore,
        aligner: Aligner,
        crop_size: Sequence[int],
        patch: Sequence[int],
        *,
        min_overlap: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(store, aligner, crop_size, **options)
        if any(side % p for side, p in zip(crop_size, patch, strict=True)):
            raise AliceError(f"crop_size {list(crop_size)} is no multiple of the patch {list(patch)}.")
        if not 0.0 <= min_overlap <= 1.0:
            raise AliceError(f"min_overlap must be in [0, 1], got {min_overlap}.")
        self.patch, self.min_overlap = np.array(patch), min_overlap
        grid = self.crop_size // self.patch
        cells = np.stack(np.meshgrid(*[np.arange(g) for g in grid], indexing="ij"), axis=-1)
        self._grid = tuple(int(g) for g in grid)
        self._latest: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None
        self._centres = (cells.reshape(-1, 3) + 0.5) * self.patch - 0.5  # voxels of the crop

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return super().summary() | {"patch": self.patch.tolist(), "min_overlap": self.min_overlap}

    def count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Pairs seen, how they came about, and tokens whose map could not be trusted."""
        lost = (
            torch.isnan(batch["place_q"]).any(dim=-1).sum() + torch.isnan(batch["place_k"]).any(dim=-1).sum()
        )
        return super().count(batch) | {"lost_tokens": int(lost) / (2 * batch["place_q"].shape[1])}

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Shares of the pairs so far."""
        return super().rates(counts) | {"untrusted_tokens": counts["lost_tokens"] / max(counts["seen"], 1)}

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        place = self.place(index, without)
        place_q, place_k = self._places_of(place)
        item = self._pair(index, place, without)
        return item | {
            "place_q": torch.from_numpy(place_q.astype(np.float32)),
            "place_k": torch.from_numpy(place_k.astype(np.float32)),
        }

    def places(self, place: Placement) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of Q lie in K's crop, and those of K in Q's: (N, 3) mm from the crop's corner, NaN if unknown."""
        affine_q, affine_k = self.store.affine(place.scan_q), self.store.affine(place.scan_k)
        world_q, world_k = (
            to_world(affine, self._centres + start)
            for affine, start in ((affine_q, place.start_q), (affine_k, place.start_k))
        )
        there = self._map(place)
        if there is None:
            move = place.point_k - place.point_q
            q_in_k, k_in_q = world_q + move, world_k - move
        else:
            q_in_k, k_in_q = there(world_q), inverse(there, world_k, world_q)
        q_in_k[_folded(q_in_k, world_q, self._grid)] = np.nan
        k_in_q[_folded(k_in_q, world_k, self._grid)] = np.nan
        return self._in_crop(q_in_k, affine_k, place.start_k), self._in_crop(k_in_q, affine_q, place.start_q)

    def _places_of(self, place: Placement) -> tuple[np.ndarray, np.ndarray]:
        """As ``places``. The latest pair's answer is kept, since a pair is looked at twice."""
        key = (place.scan_q, place.scan_k, *map(bytes, place[2:6]))
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self.places(place)
        return self._latest[1]

    def _map(self, place: Placement) -> Map | None:
        if place.scan_q == place.scan_k or not isinstance(self.aligner, MapAligner):
            return None
        return self.aligner.map_of(place.scan_q, place.point_q, place.scan_k)

    def _in_crop(self, world: np.ndarray, affine: np.ndarray, start: np.ndarray) -> np.ndarray:
        # a voxel's centre is half a voxel from the corner
        inside: np.ndarray = (to_voxels(affine, world) - start + 0.5) * np.array(self.store.spacing)
        return inside

    def _cut(
        self,
        query: str,
        key: str,
        point_q: np.ndarray,
        point_k: np.ndarray,
        offset: np.ndarray,
        score: float,
        redraws: int,
        fallback: bool,
        rng: np.random.Generator,
    ) -> Placement:
        reach = np.floor(self.max_offset * self.crop_size / 2).astype(int)
        offsets = (offset, rng.integers(-reach, reach + 1))
        starts: list[np.ndarray] = []
        for name, point, own in zip((query, key), (point_q, point_k), offsets, strict=True):
            room = np.array(self.store.shape(name)) - self.crop_size
            start = np.rint(to_voxels(self.store.affine(name), point)).astype(int) + own - self.crop_size // 2
            starts.append(np.clip(start, np.minimum(0, room), np.maximum(0, room)))
        start_q, start_k = starts
        return Placement(query, key, point_q, point_k, start_q, start_k, float(score), redraws, 0, fallback)

    def _fault(self, place: Placement) -> int:
        """How many more tokens need a place in the other crop to reach ``min_overlap``."""
        sides = self.crop_size * np.array(self.store.spacing)
        inside = [np.all((p >= 0) & (p <= sides), axis=1).sum() for p in self._places_of(place)]
        wanted = int(np.ceil(self.min_overlap * len(self._centres)))
        return int(max(0, wanted - min(inside)))


def inverse(there: Map, targets: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Points that a smooth map takes to given ones, by Newton's steps with one matrix for all.

    Args:
        there: the map.
        targets: (m, 3) mm, in the map's image.
        around: (n, 3) mm, points of its domain near the ones that are looked for; the matrix is fitted to them.

    Returns:
        (m, 3) mm; NaN where the map does not come within a millimetre of the target.
    """
    image = there(around)
    middle, image_middle = around.mean(axis=0), image.mean(axis=0)
    slope, *_ = np.linalg.lstsq(around - middle, image - image_middle, rcond=None)
    back = np.linalg.pinv(slope)
    found: np.ndarray = middle + (targets - image_middle) @ back
    for _ in range(_ITERATIONS):
        found = found - (there(found) - targets) @ back
    off = np.linalg.norm(there(found) - targets, axis=1)
    found[~(off <= _INVERTED_MM)] = np.nan
    return found


def _folded(mapped: np.ndarray, points: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """True where a map turns a grid's cells inside out, or squeezes them to nothing: (N,)."""
    if min(grid) < 2:
        return np.zeros(len(points), dtype=bool)
    steps = [np.stack(np.gradient(p.reshape(*grid, 3), axis=(0, 1, 2)), axis=-1) for p in (mapped, points)]
    ratio = np.linalg.det(steps[0]) / np.linalg.det(steps[1])
    folded: np.ndarray = (ratio < 0.05).reshape(-1)  # NaN compares False and stays NaN
    return folded
