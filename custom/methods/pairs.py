"""Pairs of crops at the same anatomy of two patients: Q and K."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.landmarks.aligners.protocol import Aligner
from custom.methods.draws import Draws
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


class AlignedPair(Draws):
    """Pairs of crops around one anatomical point of two patients (Alice, Sec. 3.1).

    A query scan, a point in its body and a key scan of another patient are drawn; the aligner finds the point
    in the key; both crops are cut on the stores' common spacing with *one* random offset from the matched
    points. A match below the aligner's threshold, or a crop that leaves its volume further than it must, is
    drawn again; after ``max_redraws`` the pair that needs least padding is taken, or, if no match scored
    enough, the query's own scan serves as the key.

    Args:
        store: volumes on one grid.
        aligner: finds the point in the key.
        crop_size: voxels along x, y, z.
        max_offset: share of the crop's half side by which its centre may lie off the matched point (ours: 0.5).
        max_redraws: tries before padding or fallback (the paper leaves it open; the authors' code: 100).
        queue_length: 0 draws any key; M > 0 takes it from the queries of the last M pairs (the authors' code: 1).
        options: of :class:`Draws`.

    Raises:
        AliceError: for settings out of range, or fewer than two patients.
    """

    crops = 2
    crop_keys = ("crop_q", "crop_k")
    least_patients = 2

    def __init__(
        self,
        store: VolumeStore,
        aligner: Aligner,
        crop_size: Sequence[int],
        *,
        max_offset: float = 0.5,
        max_redraws: int = 100,
        queue_length: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(store, crop_size, **options)
        if not 0.0 <= max_offset <= 1.0:
            raise AliceError(f"max_offset must be in [0, 1], got {max_offset}.")
        self.aligner = aligner
        self.max_offset, self.max_redraws, self.queue_length = max_offset, max_redraws, queue_length

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return super().summary() | {
            "aligner": self.aligner.name,
            "threshold": self.aligner.threshold,
            "max_cycle_mm": getattr(self.aligner, "max_cycle_mm", None),
            "sam_weights": getattr(getattr(self.aligner, "embeddings", None), "weights_sha256", None),
            "max_offset": self.max_offset,
            "max_redraws": self.max_redraws,
            "queue_length": self.queue_length,
        }

    def count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Pairs seen, and how they came about."""
        counted = {name: int(batch[name].sum()) for name in ("fallback", "redraws", "rejected")}
        return {"seen": len(batch["score"]), **counted}

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Shares of the pairs so far."""
        seen = max(counts["seen"], 1)
        return {
            "fallback_pairs": counts["fallback"] / seen,
            "redraws_per_pair": counts["redraws"] / seen,
            "accepted_matches": seen / (seen + counts["rejected"]),
        }

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        return self._pair(index, self.place(index, without), without)

    def _pair(self, index: int, place: Placement, without: tuple[str, ...]) -> dict[str, Any]:
        """Both crops and their bookkeeping."""
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
        } | self._about(index, without)

    def place(self, index: int, without: tuple[str, ...] = ()) -> Placement:
        """Draw pair ``index`` without reading a voxel, and without some scans."""
        rng = self._rng(index, 0, without)
        query = self._draw_scan(index, without)
        best: tuple[int, Placement] | None = None
        rejected = 0
        for redraws in range(self.max_redraws + 1):
            key = self._draw_key(index, query, rng, without)
            point_q, offset = self._draw_point(query, rng)
            match = self.aligner.align(query, point_q, key, rng)
            if match.score < self.aligner.threshold:
                rejected += 1
                continue
            candidate = self._cut(
                query, key, point_q, match.point_mm, offset, match.score, redraws, False, rng
            )
            fault = self._fault(candidate)
            if best is None or fault < best[0]:
                best = fault, candidate
            if fault == 0:
                break
        if best is not None:
            return best[1]._replace(redraws=redraws, rejected=rejected)
        point_q, offset = self._draw_point(query, rng)  # an intra-volume pair, and counted
        itself = self._cut(query, query, point_q, point_q, offset, 1.0, self.max_redraws, True, rng)
        return itself._replace(rejected=rejected)

    def _draw_key(
        self, index: int, query: str, rng: np.random.Generator, without: tuple[str, ...] = ()
    ) -> str:
        """A scan of another patient than the query's."""
        own = self.store.patient(query)
        if self.queue_length and index > 0:
            back = 1 + int(rng.integers(min(self.queue_length, index)))
            queued = self._draw_scan(index - back)
            if self.store.patient(queued) != own and queued not in without:
                return queued
        patients, scans_of = self._scans(without)
        place = bisect_left(patients, own)  # the query's patient is passed over without a list of the others
        drawn = int(rng.integers(len(patients) - 1))
        scans = scans_of[patients[drawn + (drawn >= place)]]
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
        rng: np.random.Generator,
    ) -> Placement:
        starts = [
            np.rint(to_voxels(self.store.affine(name), point)).astype(int) + offset - self.crop_size // 2
            for name, point in ((query, point_q), (key, point_k))
        ]
        return Placement(
            query, key, point_q, point_k, starts[0], starts[1], float(score), redraws, 0, fallback
        )

    def _fault(self, place: Placement) -> int:
        """How many voxels the crops lie outside their volumes; 0 is a good pair. What a too small volume makes unavoidable does not count."""
        total = 0
        for name, start in ((place.scan_q, place.start_q), (place.scan_k, place.start_k)):
            shape = np.array(self.store.shape(name))
            outside = np.maximum(-start, 0) + np.maximum(start + self.crop_size - shape, 0)
            total += int((outside - np.maximum(self.crop_size - shape, 0)).sum())
        return total
