"""Draws: what a sample of a run is. Every sample is a function of its number and the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from custom.data.errors import DamagedScan, StoreError
from custom.data.grid.profiles import window
from custom.data.store.quarantine import Quarantine
from custom.data.store.records import pack, unpack
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError


class Draws(Dataset):
    """Sample number ``i`` of an endless, reproducible sequence of crops.

    Every sample is a function of ``(seed, i)`` alone: workers, processes and restarts change nothing. A subclass
    writes ``_item`` and says how many crops a sample has.

    A scan is verified whole before its first crop is cut. A damaged one (``DamagedScan``) is in no sample. Samples
    that would use it are drawn anew from the other scans, from ``(seed, i, number of scans set aside for it)``: they
    depend on the store alone, not on what another worker has met before. The scan is counted and named in
    ``quarantine``.

    Args:
        store: volumes on one grid.
        crop_size: voxels along x, y, z.
        window_hu: intensities from here to there become [0, 1], the rest is clipped; stores of other profiles
            than ct have a window of their own.
        length: how many samples the dataset pretends to have.
        seed: of the whole sequence.
        names: volumes to use; None for all.
        bad_scans_allowed: how many scans may turn out to be damaged before the run is stopped.

    Attributes:
        crops: crops a sample.
        crop_keys: keys of crops that are masked, each of shape (1, X, Y, Z); see ``MaskedBatch``.
        least_patients: how many patients the draw needs.

    Raises:
        AliceError: for settings out of range, or too few patients.
    """

    crops = 1
    crop_keys: tuple[str, ...] = ("crop",)
    least_patients = 1

    def __init__(
        self,
        store: VolumeStore,
        crop_size: Sequence[int],
        window_hu: Sequence[float] = (-175.0, 250.0),
        length: int = 1 << 40,
        seed: int = 0,
        names: Sequence[str] | None = None,
        bad_scans_allowed: int = 0,
    ) -> None:
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise AliceError(f"crop_size must be three positive numbers of voxels, got {list(crop_size)}.")
        if len(window_hu) != 2 or not window_hu[0] < window_hu[1]:
            raise AliceError(f"window_hu must be two rising numbers, got {list(window_hu)}.")
        self.store, self.length, self.seed = store, length, seed
        self.crop_size = np.array(crop_size)
        self.window = store.window(window_hu)
        self._names = pack(store.names if names is None else names)
        self._group()
        if len(self.patients) < self.least_patients:
            raise AliceError(
                f"{store.path} offers scans of {len(self.patients)} patient(s); this draw needs {self.least_patients}."
            )
        used = [name for scans in self.scans_of.values() for name in scans]
        self.quarantine = Quarantine(used, bad_scans_allowed)

    def _group(self) -> None:
        self.scans_of: dict[str, list[str]] = {}
        for name in unpack(self._names):
            self.scans_of.setdefault(self.store.patient(name), []).append(name)
        self.patients = sorted(self.scans_of)

    def __getstate__(self) -> dict[str, Any]:
        """A worker groups the names itself: there may be 100,000, and a tensor of names costs nothing to send."""
        return {k: v for k, v in self.__dict__.items() if k not in ("scans_of", "patients")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._group()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Crops in [0, 1] and bookkeeping of sample ``index``.

        Keys that begin with ``crop`` hold crops (1, X, Y, Z), those that begin with ``scan`` and ``patient`` names.
        ``seed`` is what masks and views of the sample are drawn from, wherever they are drawn.

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

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return {"kind": type(self).__name__}

    def count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """What is added up over a run, of one batch."""
        return {}

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """What the log shows of the counts so far."""
        return {}

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        raise NotImplementedError

    def _about(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        """What every sample carries."""
        seed = int(self._rng(index, 1).integers(1 << 62))
        return {"set_aside": len(without), "seed": seed}  # damaged scans that this sample would have used

    def _rng(self, index: int, stream: int, without: tuple[str, ...] = ()) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, index] + ([len(without)] if without else []))

    def _scans(self, without: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
        """Patients in order, and their scans."""
        if not without:
            return self.patients, self.scans_of
        left = {who: [s for s in scans if s not in without] for who, scans in self.scans_of.items()}
        left = {who: scans for who, scans in left.items() if scans}
        if len(left) < self.least_patients:
            raise StoreError(
                f"{self.store.path}: without the damaged scans {', '.join(without)} fewer than "
                f"{self.least_patients} patient(s) are left. Build the store again."
            )
        return [p for p in self.patients if p in left], left

    def _draw_scan(self, index: int, without: tuple[str, ...] = ()) -> str:
        """A patient, and one of their scans."""
        rng, (patients, scans_of) = self._rng(index, 2, without), self._scans(without)
        scans = scans_of[patients[rng.integers(len(patients))]]
        return scans[rng.integers(len(scans))]

    def _draw_start(self, name: str, rng: np.random.Generator) -> np.ndarray:
        """First voxel of a crop around a point of the body, moved into the volume where that is large enough."""
        voxels, room = self.store.body_voxels(name), np.array(self.store.shape(name)) - self.crop_size
        point = voxels[rng.integers(len(voxels))]
        start: np.ndarray = np.clip(point - self.crop_size // 2, np.minimum(0, room), np.maximum(0, room))
        return start

    def _crop(self, name: str, start: np.ndarray, size: np.ndarray | None = None) -> torch.Tensor:
        """A box in [0, 1], (1, X, Y, Z); of ``crop_size`` unless another size is given."""
        low, high = self.window
        # what lies outside becomes 0, as air does
        air = int(np.floor(max(low, -1024))) if self.store.profile == "ct" else None
        crop = self.store.read_crop(
            name, start.tolist(), (self.crop_size if size is None else size).tolist(), fill=air
        )
        return torch.from_numpy(window(crop, low, high))[None]


class InTurn(Draws):
    """Draws whose patients take turns in random order.

    A batch seldom holds a patient twice: only where one turn ends and the next begins.
    """

    _turn: tuple[tuple[int, tuple[str, ...]], np.ndarray] | None = None

    def _draw_scan(self, index: int, without: tuple[str, ...] = ()) -> str:
        patients, scans_of = self._scans(without)
        turn, place = divmod(index, len(patients))
        if self._turn is None or self._turn[0] != (turn, without):
            self._turn = (turn, without), self._rng(turn, 3, without).permutation(len(patients))
        scans = scans_of[patients[self._turn[1][place]]]
        return scans[self._rng(index, 2, without).integers(len(scans))]


class TwoCrops(InTurn):
    """Two crops of one scan, the second moved by a random shift (MoCo v3, DINO, iBOT, SIM, CMAE).

    Patients take turns: another crop of the same patient would be a wrong negative.

    Args:
        store: volumes on one grid.
        crop_size: voxels along x, y, z.
        max_shift: largest shift along each axis, as a share of the crop's side; at most ``max_voxels``.
        max_voxels: None for no such limit.
        masked: which crops get masks, ``crop_1`` or ``crop_2`` or both.
        options: of :class:`Draws`.

    Raises:
        AliceError: for settings out of range.
    """

    crops = 2

    def __init__(
        self,
        store: VolumeStore,
        crop_size: Sequence[int],
        max_shift: float = 0.5,
        max_voxels: int | None = None,
        masked: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(store, crop_size, **options)
        if not 0.0 <= max_shift <= 1.0:
            raise AliceError(f"max_shift must be in [0, 1], got {max_shift}.")
        if not set(masked) <= {"crop_1", "crop_2"}:
            raise AliceError(f"masked names crop_1, crop_2 or both, got {list(masked)}.")
        self.crop_keys = tuple(masked)
        self.max_shift, self.max_voxels = max_shift, max_voxels
        reach = np.floor(max_shift * self.crop_size).astype(int)
        self._reach = reach if max_voxels is None else np.minimum(reach, max_voxels)

    def summary(self) -> dict[str, Any]:
        """Settings that make the sequence what it is, as plain values."""
        return super().summary() | {"max_shift": self.max_shift, "max_voxels": self.max_voxels}

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        name, rng = self._draw_scan(index, without), self._rng(index, 0, without)
        first = self._draw_start(name, rng)
        room = np.array(self.store.shape(name)) - self.crop_size
        second = first + rng.integers(-self._reach, self._reach + 1)
        second = np.clip(second, np.minimum(0, room), np.maximum(0, room))
        self.quarantine.examine(name, self.store.verify)
        about = {"scan": name, "patient": self.store.patient(name), "shift": torch.from_numpy(second - first)}
        crops = {"crop_1": self._crop(name, first), "crop_2": self._crop(name, second)}
        return crops | about | self._about(index, without)


class OneCrop(Draws):
    """One crop of one scan (MAE, SimMIM), somewhere in its body."""

    def _item(self, index: int, without: tuple[str, ...]) -> dict[str, Any]:
        name = self._draw_scan(index, without)
        start = self._draw_start(name, self._rng(index, 0, without))
        self.quarantine.examine(name, self.store.verify)
        about = {"scan": name, "patient": self.store.patient(name)}
        return {"crop": self._crop(name, start)} | about | self._about(index, without)
