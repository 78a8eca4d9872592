"""Intensity profiles: how a scan's values become the int16 of a store, and the stored values [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from custom.data.errors import ScanError
from custom.data.grid.body import BODY_HU
from custom.data.scans import refuse_hu
from custom.errors import AliceError

LOW_HU, HIGH_HU = -1024, 3071
MR_SCALE, Z_SCALE = (
    10000,
    1000,
)  # stored steps from the low to the high percentile, and a standard deviation (ours)
PERCENTILES = (0.2, 99.8)  # of the body (issue: MR)
_SAMPLE = 4_000_000  # voxels that statistics are taken from


class ProfileError(AliceError):
    """Intensities of another kind than what they are given to; the message names both and the way out."""


@dataclass(frozen=True)
class Profile:
    """What a store's numbers mean.

    Attributes:
        name: as in ``alice scan --profile``.
        units: of the stored int16.
        air: stored value outside of the scan.
        window: stored values that become 0 and 1; None leaves it to the run's ``window_hu``.
    """

    name: str
    units: str
    air: int
    window: tuple[float, float] | None


PROFILES = {
    "ct": Profile("ct", "HU", LOW_HU, None),
    "mr": Profile("mr", f"1/{MR_SCALE} of the body's 0.2 to 99.8 percentile", 0, (0.0, float(MR_SCALE))),
    # 3 standard deviations around the body's mean hold 99.7 % of a normal distribution (ours)
    "zscore": Profile("zscore", f"1/{Z_SCALE} of the body's standard deviation", -3 * Z_SCALE,
                      (-3.0 * Z_SCALE, 3.0 * Z_SCALE)),
}  # fmt: skip


def profile_of(name: str) -> Profile:
    """A profile by its name.

    Raises:
        ProfileError: naming the ones there are.
    """
    if name not in PROFILES:
        raise ProfileError(f"profile must be one of {', '.join(PROFILES)}; got {name!r}.")
    return PROFILES[name]


def window_of(profile: str, window_hu: Sequence[float]) -> tuple[float, float]:
    """The stored values that become 0 and 1: the run's ``window_hu`` for CT, else the profile's own."""
    low, high = profile_of(profile).window or window_hu
    return float(low), float(high)


def require_ct(profile: str, where: str | Path, what: str, allow: bool = False) -> None:
    """Refuse a store of another profile than CT to what was trained on CT.

    Raises:
        ProfileError: unless ``allow``.
    """
    if profile != "ct" and not allow:
        raise ProfileError(
            f"{where}: holds intensities of profile {profile!r}, and {what} was made for CT. Take what does not look "
            "at intensities (aligner 'coordinate'), or set allow_profile if you know that it works."
        )


class Values:
    """What is seen of a scan's values while they are read part by part."""

    def __init__(self, path: Path) -> None:
        self.path, self.low, self.high, self.bad = path, np.inf, -np.inf, 0

    def see(self, part: np.ndarray) -> None:
        """Take a part into account."""
        if part.dtype.kind == "f":
            finite = np.isfinite(part)
            if not finite.all():
                self.bad += int(part.size - finite.sum())
                part = part[finite]
        if part.size:
            self.low, self.high = min(self.low, float(part.min())), max(self.high, float(part.max()))

    def judge(self, profile: str) -> None:
        """Refuse a scan that holds no image of this profile.

        Raises:
            ScanError: for NaN or infinite voxels, an empty scan, or values that cannot be Hounsfield units.
        """
        if self.bad:
            raise ScanError(
                f"{self.path}: {self.bad} voxels are NaN or infinite. Repair the scan or leave it out."
            )
        if self.low == self.high:
            raise ScanError(f"{self.path}: every voxel is {self.low:g}. The scan is empty.")
        if profile == "ct":
            refuse_hu(self.path, self.low, self.high)


def to_hu(part: np.ndarray) -> np.ndarray:
    """Values as int16 HU, clipped to what CT can measure."""
    if part.dtype.kind == "f":
        part = np.rint(part)
    return np.clip(part, LOW_HU, HIGH_HU).astype(np.int16)


def body_threshold(volume: np.ndarray, profile: str) -> float:
    """The value above which a voxel is tissue: -500 HU, or Otsu's between the dark and the bright voxels."""
    if profile == "ct":
        return BODY_HU
    sample = _few(volume.reshape(-1))
    low, high = np.percentile(sample, PERCENTILES)
    if not low < high:
        return float(low)
    counts, edges = np.histogram(np.clip(sample, low, high), bins=256, range=(low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[::-1][1:]
    sums = np.cumsum(counts * middles)
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = below * above * (mean_below - mean_above) ** 2
    return float(edges[1 + int(between.argmax())])


def scaling(volume: np.ndarray, body: np.ndarray, steps: Sequence[int], profile: str) -> dict[str, float]:
    """How values become stored ones: ``stored = (value - offset) * scale``, and what air is stored as.

    Args:
        volume: float32 (X, Y, Z).
        body: bool, cells of ``steps`` voxels, see ``body_mask``.
        steps: voxels of a cell.
        profile: mr or zscore.

    Raises:
        ScanError: if the body is of one value.
    """
    cells = np.argwhere(body)
    places = cells * np.array(steps) + np.array(steps) // 2
    inside = _few(volume[tuple(places.T)])
    if profile == "mr":
        low, high = (float(v) for v in np.percentile(inside, PERCENTILES))
        spread, offset, steps_per = high - low, low, MR_SCALE
    else:
        spread, offset, steps_per = float(inside.std(dtype=np.float64)), float(inside.mean()), Z_SCALE
    if not spread > 0:
        raise ScanError("every voxel of the body has one value.")
    scale = steps_per / spread
    darkest = (float(np.percentile(_few(volume.reshape(-1)), PERCENTILES[0])) - offset) * scale
    low, high = stored_range(profile)
    return {"offset": offset, "scale": scale, "air": float(round(min(max(darkest, low), high)))}


def stored_range(profile: str) -> tuple[int, int]:
    """Lowest and highest stored value."""
    if profile == "ct":
        return LOW_HU, HIGH_HU
    return (0, MR_SCALE) if profile == "mr" else (-32000, 32000)


def to_stored(part: np.ndarray, scaled: dict[str, float], profile: str) -> np.ndarray:
    """Values of a scan as the int16 of a store."""
    if profile == "ct":
        return part
    low, high = stored_range(profile)
    out = (part - np.float32(scaled["offset"])) * np.float32(scaled["scale"])
    return np.clip(np.rint(out, out=out), low, high, out=out).astype(np.int16)


def _few(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // _SAMPLE)]


def window(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """HU, or stored values of another profile, to float32 in [0, 1], clipped."""
    scaled: np.ndarray = volume.astype(np.float32)
    scaled -= low
    scaled /= high - low
    return np.clip(scaled, 0.0, 1.0, out=scaled)
