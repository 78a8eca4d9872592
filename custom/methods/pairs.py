"""Pairs of crops at the same anatomy of two patients: Q and K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from custom.data.errors import DamagedScan, StoreError
from custom.data.grid.profiles import window
from custom.data.store.quarantine import Quarantine
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.landmarks.aligners.match import Aligner
from custom.space import to_voxels, to_world


class Placement(NamedTuple):
    """Where the two crops of a pair are cut."""

    scan_q: str
    scan_k: str
    point_q: np.ndarray  # RAS mm
    point_k: np.ndarray
    start_q: np.ndarray  # first voxel along x, y, z
    start_k: np.ndarray
    score: float
    redraws: int  # points or partners refused before this one
    rejected: int  # of these, for a low score
    fallback: bool  # no partner scored enough: K is Q's own scan


class PairDataset(Dataset):
    """Pair number ``i`` of an endless, reproducible sequence (Alice, Sec. 3.1).

    A query scan, a point in its body and a key scan of another patient are drawn; the aligner finds the point
    in the key; both crops are cut on the stores' common spacing with *one* random offset from the matched
    points. A match below the aligner's threshold, or a crop that leaves its volume further than it must, is
    drawn again; after ``max_redraws`` the pair that needs least padding is taken, or, if no match scored
    enough, the query's own scan serves as the key. Every pair is a function of ``(seed, i)`` alone: workers,
    ranks and restarts change nothing.

    A scan is verified whole before its first crop is cut. One that is damaged anywhere (``DamagedScan``) is in no
    pair: those that would use it are drawn anew from the other scans, from ``(seed, i, number of scans set aside for
    it)``: which pairs those are depends on the store alone, not on what another worker has met before. The scan is
    counted and named in ``quarantine``.

    Args:
        store: volumes on one grid.
        aligner: finds the point in the key.
        crop_size: voxels along x, y, z.
        window_hu: intensities from here to there become [0, 1], the rest is clipped; stores of other profiles
            than ct have a window of their own.
        length: how many pairs the dataset pretends to have.
        seed: of the whole sequence.
        names: volumes to use; None for all.
        max_offset: share of the crop's half side by which its centre may lie off the matched point (ours: 0.5).
        max_redraws: tries before padding or fallback (the paper leaves it open; the authors' code: 100).
        queue_length: 0 draws any key; M > 0 takes it from the queries of the last M pairs (the authors' code: 1).
        bad_scans_allowed: how many scans may turn out to be damaged before the run is stopped.

    Raises:
        ValueError: for settings out of range, or fewer than two patients.
    """

    def __init__(
        self,
        store: VolumeStore,
        aligner: Aligner,
        crop_size: Sequence[int],
        window_hu: Sequence[float] = (-175.0, 250.0),
        length: int = 1 << 40,
        seed: int = 0,
        names: Sequence[str] | None = None,
        max_offset: float = 0.5,
        max_redraws: int = 100,
        queue_length: int = 0,
        bad_scans_allowed: int = 0,
    ) -> None:
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise AliceError(f"crop_size must be three positive numbers of voxels, got {list(crop_size)}.")
        if len(window_hu) != 2 or not window_hu[0] < window_hu[1]:
            raise AliceError(f"window_hu must be two rising numbers, got {list(window_hu)}.")
        if not 0.0 <= max_offset <= 1.0:
            raise AliceError(f"max_offset must be in [0, 1], got {max_offset}.")
        self.store, self.aligner = store, aligner
        self.crop_size = np.array(crop_size)
        self.window = store.window(window_hu)
        self.length, self.seed = length, seed
        self.max_offset, self.max_redraws, self.queue_length = max_offset, max_redraws, queue_length
        self.scans_of: dict[str, list[str]] = {}
        for name in names if names is not None else store.names:
            self.scans_of.setdefault(store.patient(name), []).append(name)
        self.patients = sorted(self.scans_of)
        if len(self.patients) < 2:
            raise AliceError(
                f"A pair is two different patients' scans; {store.path} offers {len(self.patients)} patient(s)."
            )

        used = [name for scans in self.scans_of.values() for name in scans]
        self.quarantine = Quarantine(used, bad_scans_allowed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Crops (1, X, Y, Z) in [0, 1], points, score and bookkeeping of pair ``index``.

        Raises:
            StoreError: if more scans are damaged than allowed.
        """
        without: tuple[str, ...] = ()
        while True:
            try:
                return self._item(index, without)
            except DamagedScan as error:
                self.quarantine.add(error)
                if error.scan in without:  # it was not to be read
                    raise
                without += (error.scan,)

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        place = self.place(index, without)
        for name in (place.scan_q, place.scan_k):
            self.quarantine.examine(name, self.store.verify)
        return {
            "crop_q": self._crop(place.scan_q, place.start_q),
            "crop_k": self._crop(place.scan_k, place.start_k),
            "point_q": torch.from_numpy(place.point_q),
            "point_k": torch.from_numpy(place.point_k),
            "score": place.score,
            "redraws": place.redraws,
            "rejected": place.rejected,
            "fallback": place.fallback,
            "scan_q": place.scan_q,
            "scan_k": place.scan_k,
            "patient_q": self.store.patient(place.scan_q),
            "patient_k": self.store.patient(place.scan_k),
            "set_aside": len(without),  # damaged scans that this pair would have used
            # what masks and views of this pair are drawn from, wherever they are drawn
            "seed": int(self._rng(index, 1).integers(1 << 62)),
        }

    def place(self, index: int, without: tuple[str, ...] = ()) -> Placement:
        """Draw pair ``index`` without reading a voxel, and without some scans."""
        rng = self._rng(index, 0, without)
        query = self._draw_query(index, without)
        best: tuple[int, Placement] | None = None
        rejected = 0
        for redraws in range(self.max_redraws + 1):
            key = self._draw_key(index, query, rng, without)
            point_q, offset = self._draw_point(query, rng)
            match = self.aligner.align(query, point_q, key, rng)
            if match.score < self.aligner.threshold:
                rejected += 1
                continue
            candidate = self._cut(query, key, point_q, match.point_mm, offset, match.score, redraws, False)
            padding = self._needless_padding(candidate)
            if best is None or padding < best[0]:
                best = padding, candidate
            if padding == 0:
                break
        if best is not None:
            return best[1]._replace(redraws=redraws, rejected=rejected)
        point_q, offset = self._draw_point(query, rng)  # an intra-volume pair, counted by the trainer
        itself = self._cut(query, query, point_q, point_q, offset, 1.0, self.max_redraws, True)
        return itself._replace(rejected=rejected)

    def _rng(self, index: int, stream: int, without: tuple[str, ...] = ()) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, index] + ([len(without)] if without else []))

    def _scans(self, without: tuple[str, ...]) -> dict[str, list[str]]:
        """Patients in order, and their scans."""
        if not without:
            return self.scans_of
        left = {who: [s for s in scans if s not in without] for who, scans in self.scans_of.items()}
        left = {who: scans for who, scans in left.items() if scans}
        if len(left) < 2:
            raise StoreError(
                f"{self.store.path}: without the damaged scans {', '.join(without)} fewer than two patients are left. "
                "Build the store again."
            )
        return left

    def _draw_query(self, index: int, without: tuple[str, ...] = ()) -> str:
        rng, scans_of = self._rng(index, 2, without), self._scans(without)
        patients = [p for p in self.patients if p in scans_of] if without else self.patients
        scans = scans_of[patients[rng.integers(len(patients))]]
        return scans[rng.integers(len(scans))]

    def _draw_key(
        self, index: int, query: str, rng: np.random.Generator, without: tuple[str, ...] = ()
    ) -> str:
        own = self.store.patient(query)
        if self.queue_length and index > 0:
            back = 1 + int(rng.integers(min(self.queue_length, index)))
            queued = self._draw_query(index - back)
            if self.store.patient(queued) != own and queued not in without:
                return queued
        scans_of = self._scans(without)
        others = [p for p in self.patients if p != own and p in scans_of]
        scans = scans_of[others[rng.integers(len(others))]]
        return scans[rng.integers(len(scans))]

    def _draw_point(self, name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A point of the body, and the offset (voxels) of the crops' centres from it and its match.

        The crop's place is drawn first, inside the volume where the volume is large enough; the point is one of
        the body's in the middle part of the crop.
        """
        voxels, shape = self.store.body_voxels(name), np.array(self.store.shape(name))
        reach = np.floor(self.max_offset * self.crop_size / 2).astype(int)
        for _ in range(20):
            point = voxels[rng.integers(len(voxels))]
            offset = rng.integers(-reach, reach + 1)
            start = point + offset - self.crop_size // 2
            room = shape - self.crop_size
            if np.all((start >= np.minimum(0, room)) & (start <= np.maximum(0, room))):
                break
        return to_world(self.store.affine(name), point), offset

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
    ) -> Placement:
        starts = [
            np.rint(to_voxels(self.store.affine(name), point)).astype(int) + offset - self.crop_size // 2
            for name, point in ((query, point_q), (key, point_k))
        ]
        return Placement(
            query, key, point_q, point_k, starts[0], starts[1], float(score), redraws, 0, fallback
        )

    def _needless_padding(self, place: Placement) -> int:
        """Voxels by which the crops leave their volumes, beyond what a small volume makes unavoidable."""
        total = 0
        for name, start in ((place.scan_q, place.start_q), (place.scan_k, place.start_k)):
            shape = np.array(self.store.shape(name))
            outside = np.maximum(-start, 0) + np.maximum(start + self.crop_size - shape, 0)
            total += int((outside - np.maximum(self.crop_size - shape, 0)).sum())
        return total

    def _crop(self, name: str, start: np.ndarray) -> torch.Tensor:
        low, high = self.window
        # what lies outside becomes 0, as air does
        air = int(np.floor(max(low, -1024))) if self.store.profile == "ct" else None
        crop = self.store.read_crop(name, start.tolist(), self.crop_size.tolist(), fill=air)
        return torch.from_numpy(window(crop, low, high))[None]
