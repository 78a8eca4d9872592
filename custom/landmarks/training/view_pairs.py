"""Two views of the same anatomy for training SAM, and which of their cells show the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from custom.data.grid.profiles import require_ct
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.landmarks.sam.scan_grid import CENTRES_ZYX, SPACING_MM, STRIDES_ZYX, Level, hu_to_units
from custom.landmarks.training.look import CURVE_HU, Look, rotation_matrix, see
from custom.landmarks.training.places import Places
from custom.landmarks.training.view_cells import Cells, cell_indices, matched_cells
from custom.space import to_voxels, to_world

Array = NDArray[Any]
FOUND_MM = 15.0  # a place found no nearer than this lies outside of the scan (samples are up to 12 mm apart)
AXES = np.diag([-1.0, -1.0, 1.0])  # a view's x, y, z grow towards Left, Posterior, Superior; the world is RAS


class ViewPairs(Dataset):
    """Pair number ``i`` of an endless, reproducible sequence of two views of the same anatomy (SAM, arXiv 2012.02383).

    Both views show one scan, each at its own scale, turned a little and with its own intensities; or, where
    ``places`` knows the scans (phantoms), they may show the same place of two subjects. Every position is
    exact and in float32 mm: of the world for one scan, of the shared space for scans in ``places``.

    Args:
        store: scans on a grid of about 2 mm.
        names: scans to use; None for all.
        crop_size: voxels of a view along x, y, z.
        length: how many pairs the dataset pretends to have.
        seed: of the whole sequence.
        places: a shared space, None if there is none.
        across: share of pairs that show two subjects, where ``places`` allows.
        scale: least and largest size of a view's voxels, over 2 mm (the authors': 0.8 to 1.2).
        rotation: degrees, largest turn about each axis (ours; the authors commented theirs out).
        jitter: of a view's extent, by which its centre may lie off the common point.
        contrast: 0 keeps intensities, 1 bends and shifts those of soft tissue strongly (ours).
        blur: voxels, largest standard deviation.
        noise: HU, largest standard deviation.
        anchors: matched cells of a pair, at most (the authors: 100 of 2,000 tried).
        candidates: fine cells of both views together among which negatives are looked for (ours: drawn at
            random, which costs less than the authors' search of all).
        match_mm: a fine cell's counterpart is nearer than this (the authors: 2).
        coarse_match_mm, coarse_match_z_mm: and a coarse cell's (the authors: 25, and 8 along z).

    Raises:
        AliceError: for settings out of range, or names the store does not hold.
    """

    def __init__(
        self,
        store: VolumeStore,
        names: Sequence[str] | None = None,
        crop_size: Sequence[int] = (96, 96, 32),
        length: int = 1 << 40,
        seed: int = 0,
        places: Places | None = None,
        across: float = 0.0,
        scale: Sequence[float] = (0.8, 1.2),
        rotation: float = 10.0,
        jitter: float = 0.25,
        contrast: float = 1.0,
        blur: float = 1.0,
        noise: float = 20.0,
        anchors: int = 100,
        candidates: int = 4096,
        match_mm: float = 2.0,
        coarse_match_mm: float = 25.0,
        coarse_match_z_mm: float = 8.0,
    ) -> None:
        given = ("self", "store", "names", "places", "length", "seed")
        self.settings = {k: v for k, v in locals().items() if k not in given and k != "given"}
        if len(crop_size) != 3 or crop_size[2] < 4 or min(crop_size[:2]) < 16:
            raise AliceError(f"crop_size must be at least 16, 16, 4 voxels, got {list(crop_size)}.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise AliceError(f"scale must be two positive numbers that rise, got {list(scale)}.")
        if not 0.0 <= jitter < 0.5 or not 0.0 <= across <= 1.0 or min(rotation, contrast, blur, noise) < 0:
            raise AliceError(
                f"View settings out of range: {jitter=}, {across=}, {rotation=}, {contrast=}, {blur=}, {noise=}."
            )
        require_ct(getattr(store, "profile", "ct"), store.path, "SAM")  # whose input is HU
        if any(abs(s - SPACING_MM) > 1e-3 for s in store.spacing):
            raise AliceError(
                f"{store.path}: has voxels of {store.spacing} mm; SAM sees 2 mm. Choose another store_dir; "
                'alice build makes one with --spacing "[2,2,2]".'
            )
        self.store, self.length, self.seed = store, length, seed
        self.names = list(store.names if names is None else names)
        if not self.names or (unknown := sorted(set(self.names) - set(store.names))):
            raise AliceError(
                f"{store.path}: no scans to train on, or unknown ones: {unknown if self.names else ''}"
            )
        self.size = np.array(crop_size, dtype=int)
        self.places, self.across = places, across
        self.shared = [name for name in self.names if places is not None and name in places]
        self.scale, self.rotation, self.jitter = (float(scale[0]), float(scale[1])), rotation, jitter
        self.contrast, self.blur, self.noise = contrast, blur, noise
        self.anchors, self.candidates, self.match_mm = anchors, candidates, match_mm
        self.coarse_match_mm, self.coarse_match_z_mm = coarse_match_mm, coarse_match_z_mm
        self._body: dict[str, Array] = {}

    def __len__(self) -> int:
        return self.length

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return {"kind": type(self).__name__} | self.settings

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pair ``index``: two views stacked, their cells' positions, and matched cells.

        Returns:
            ``crop`` (2, 1, Z, Y, X); ``scan_1``, ``scan_2`` names; ``space`` int; for both levels (N cells, flattened z, y, x)
            ``<level>_mm`` (2, N, 3), ``<level>_inside`` bool (2, N), ``<level>_match`` int64 (2, N or A, 2):
            rows of (cell of this view, its counterpart in the other), -1 where there are fewer; and
            ``fine_candidates`` int64 (M,), cells of both views, the second's counted on from the first's.
        """
        rng = np.random.default_rng([self.seed, index])
        first = self.names[rng.integers(len(self.names))]
        voxels = self.store.body_voxels(first)
        point = to_world(self.store.affine(first), voxels[rng.integers(len(voxels))])
        second, other_point = self._partner(first, point, rng)
        points = [point, other_point]

        item: dict[str, Any] = {"space": 0 if first in self.shared else 1 + self.names.index(first)}
        looks = [
            self._draw_look(name, point, rng) for name, point in zip((first, second), points, strict=True)
        ]
        crops = [
            see(self.store, name, look, self.size) for name, look in zip((first, second), looks, strict=True)
        ]
        item |= {"scan_1": first, "scan_2": second}
        item["crop"] = torch.stack([hu_to_units(torch.from_numpy(crop))[None] for crop in crops])
        for level in ("fine", "coarse"):
            cells = [
                self._cells(name, look.affine, level)
                for name, look in zip((first, second), looks, strict=True)
            ]
            matches = [self._matches(level, cells[i], cells[1 - i], rng) for i in (0, 1)]
            item[f"{level}_mm"] = torch.from_numpy(np.stack([c.places_mm for c in cells]).astype(np.float32))
            item[f"{level}_inside"] = torch.from_numpy(np.stack([c.inside for c in cells]))
            item[f"{level}_match"] = torch.from_numpy(np.stack(matches))
        within = np.flatnonzero(item["fine_inside"].numpy().ravel())
        drawn = rng.choice(within, self.candidates, replace=len(within) < self.candidates)
        item["fine_candidates"] = torch.from_numpy(drawn)
        return item

    def _partner(self, first: str, point: Array, rng: np.random.Generator) -> tuple[str, Array]:
        """Whom the second view shows, and where: another subject whose scan holds the place, or the same."""
        others = [name for name in self.shared if name != first]
        if self.places is not None and first in self.shared and others and rng.random() < self.across:
            place = self.places.at(first, point[None])[0]
            for _ in range(5):
                second = others[rng.integers(len(others))]
                found = self.places.find(second, place)
                if np.linalg.norm(self.places.at(second, found[None])[0] - place) < FOUND_MM:
                    return second, found
        return first, point

    def _draw_look(self, name: str, point_mm: Array, rng: np.random.Generator) -> Look:
        step_mm = SPACING_MM * rng.uniform(*self.scale)
        extent_mm = self.size * step_mm
        turn = rotation_matrix(np.deg2rad(rng.uniform(-self.rotation, self.rotation, 3)))
        centre = point_mm + AXES @ (rng.uniform(-self.jitter, self.jitter, 3) * extent_mm)
        centre = self._pull_in(name, centre, extent_mm, rng)
        affine = np.eye(4)
        affine[:3, :3] = turn @ AXES * step_mm
        affine[:3, 3] = centre - affine[:3, :3] @ ((self.size - 1) / 2)
        slopes = np.exp(self.contrast * rng.uniform(-0.6, 0.6, len(CURVE_HU) - 1))
        curve = CURVE_HU[0] + np.r_[0.0, np.cumsum(slopes * np.diff(CURVE_HU))]
        # bends are free, but water stays near 0 HU
        curve += self.contrast * rng.uniform(-25, 25) - np.interp(0.0, CURVE_HU, curve)
        return Look(
            affine,
            curve,
            self.blur * rng.uniform() * (rng.random() < 0.5),
            self.noise * rng.uniform() ** 2,
            int(rng.integers(1 << 31)),
        )

    def _pull_in(self, name: str, centre_mm: Array, extent_mm: Array, rng: np.random.Generator) -> Array:
        """Move a view's centre so that the view stays in its scan where the scan is large enough."""
        affine, shape = self.store.affine(name), np.array(self.store.shape(name))
        half = extent_mm / np.array(self.store.spacing) / 2
        room = shape / 2 - half
        low, high = shape / 2 - 0.5 - np.maximum(room, 0), shape / 2 - 0.5 + np.maximum(room, 0)
        # a scan smaller than the view lies anywhere within it
        slack = np.maximum(-room, 0) * rng.uniform(-0.5, 0.5, 3)
        return to_world(affine, np.clip(to_voxels(affine, centre_mm), low, high) + slack)

    def _cells(self, name: str, affine: Array, level: Level) -> Cells:
        index = cell_indices(self.size, level)
        points = to_world(
            affine, index[:, ::-1] * STRIDES_ZYX[level][::-1] + np.array(CENTRES_ZYX[level])[::-1]
        )
        voxels = to_voxels(self.store.affine(name), points)
        within = (voxels >= -0.5) & (voxels <= np.array(self.store.shape(name)) - 0.5)
        inside = np.logical_and.reduce(within, axis=1)
        places = self.places.at(name, points) if self.places is not None and name in self.shared else points
        return Cells(places, inside, inside & self._in_body(name, voxels))

    def _in_body(self, name: str, voxels: Array) -> Array:
        step = np.array(self.store.records[name].body_step)
        if name not in self._body:
            body = self.store.body_voxels(name) // step
            self._body[name] = np.zeros(-(-np.array(self.store.shape(name)) // step), dtype=bool)
            self._body[name][tuple(body.T)] = True
        mask = self._body[name]
        cell = np.clip(np.rint(voxels).astype(int) // step, 0, np.array(mask.shape) - 1)
        return mask[tuple(cell.T)]

    def _matches(self, level: Level, here: Cells, there: Cells, rng: np.random.Generator) -> Array:
        """Rows (cell here, cell there) of a level; padded with -1 to a fixed number."""
        if level == "fine":
            found = matched_cells(here, there, self.match_mm, rng=rng, tried=2000)[: self.anchors]
            rows = self.anchors
        else:
            found = matched_cells(here, there, self.coarse_match_mm, self.coarse_match_z_mm)
            rows = len(here.inside)
        return np.concatenate([found, np.full((rows - len(found), 2), -1)]).astype(np.int64)
