"""Intensity profiles: how the values of a scan become the int16 of a store, and these become [0, 1]."""

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
MR_SCALE = 10000  # stored steps from the low to the high percentile (ours)
Z_SCALE = 1000  # stored steps in a standard deviation (ours)
PERCENTILES = (0.2, 99.8)  # of the body (ours)
_SAMPLE = 4_000_000  # voxels that statistics are taken from


class ProfileError(AliceError):
    """Intensities of one profile were given to something made for another; the message names both and the way out."""


@dataclass(frozen=True)
class Profile:
    """What the numbers in a store mean.

    Attributes:
        name: as in ``alice scan --profile``.
        units: of the stored int16.
        air: stored value outside of the scan.
        window: the stored values that become 0 and 1; None takes the run's ``window_hu``.
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
        ProfileError: for an unknown name; the message lists the known ones.
    """
    if name not in PROFILES:
        raise ProfileError(f"profile must be one of {', '.join(PROFILES)}; got {name!r}.")
    return PROFILES[name]


def window_of(profile: str, window_hu: Sequence[float]) -> tuple[float, float]:
    """The stored values that become 0 and 1: for CT the run's ``window_hu``, else the profile's own."""
    low, high = profile_of(profile).window or window_hu
    return float(low), float(high)


def require_ct(profile: str, where: str | Path, what: str, allow: bool = False) -> None:
    """Refuse to use something that was trained on CT with a store of another profile.

    Raises:
        ProfileError: unless ``allow``.
    """
    if profile != "ct" and not allow:
        raise ProfileError(
            f"{where}: holds intensities of profile {profile!r}, and {what} was made for CT. Use the aligner "
            "'coordinate', which does not look at intensities, or set allow_profile if you know that it works."
        )


class Values:
    """The range of a scan's values, collected while the scan is read part by part."""

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
        """Refuse a scan whose values cannot be an image of this profile.

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
    """The value above which a voxel is tissue: -500 HU for CT, else Otsu's threshold (IEEE Trans. SMC 9:62, 1979)."""
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
    """How values are stored: ``stored = (value - offset) * scale``; and the stored value of air.

    Args:
        volume: float32 (X, Y, Z).
        body: bool mask with cells of ``steps`` voxels, see ``body_mask``.
        steps: voxels in a cell along x, y, z.
        profile: mr or zscore.

    Raises:
        ScanError: if every voxel of the body has the same value.
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
        raise ScanError("every voxel of the body has the same value.")
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
    """Map stored values to float32: ``low`` becomes 0, ``high`` becomes 1, values beyond are clipped."""
    scaled: np.ndarray = volume.astype(np.float32)
    scaled -= low
    scaled /= high - low
    return np.clip(scaled, 0.0, 1.0, out=scaled)
