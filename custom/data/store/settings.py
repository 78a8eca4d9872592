"""What a build is asked for, and what a store keeps of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.data.arguments import number, voxel_size, whole_number, worker_count
from custom.data.errors import StoreError
from custom.data.formats.voxels import MOST_BYTES
from custom.data.grid.profiles import profile_of
from custom.errors import AliceError

logger = logging.getLogger(__name__)

SPACING = (1.5, 1.5, 2.0)  # mm
MARGIN_MM = 10.0  # of air kept around the body (ours)


@dataclass(frozen=True)
class BuildSettings:
    """How scans are made into a store.

    Attributes:
        spacing: voxel size in mm along x, y, z.
        bad_scans_allowed: how many scans may be unusable before the build is refused.
        workers: processes that read and resample; None takes :func:`custom.data.arguments.default_workers`.
        patient_pattern: see ``list_scans``; None takes the pattern that the store was built with.
        progress: show a progress bar.
        profile: of intensities: ct, mr or zscore; None takes the manifest's, else the store's, else ct.
        crop_body: cut volumes to the body's box, so that air needs no room; None takes the store's, else True.
        margin_mm: air kept around that box; None takes the store's, else 10.
        remove_table: set everything that is not near the body to air; None takes the store's, else False.
        check_disk: refuse a disk that is too small before anything is written.
        most_bytes: of voxels in a scan, in its file and in the store; a larger one is refused before it is read.

    Raises:
        AliceError: for a value that cannot be used; the message names it.
    """

    spacing: Sequence[float] = SPACING
    bad_scans_allowed: int = 0
    workers: int | None = 1
    patient_pattern: str | None = None
    progress: bool = True
    profile: str | None = None
    crop_body: bool | None = None
    margin_mm: float | None = None
    remove_table: bool | None = None
    check_disk: bool = True
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        object.__setattr__(self, "spacing", tuple(voxel_size(self.spacing)))
        whole_number("bad_scans_allowed", self.bad_scans_allowed, 0)
        whole_number("most_bytes", self.most_bytes, 1)
        worker_count(self.workers)
        if self.profile is not None:
            profile_of(self.profile)
        if self.margin_mm is not None:
            object.__setattr__(self, "margin_mm", number("margin_mm", self.margin_mm, 0, 1000))
            if self.crop_body is False:
                raise AliceError(
                    f"margin_mm = {self.margin_mm:g} has no effect without crop_body. Leave one of them out."
                )

    def stored(
        self, store: Path, there: dict[str, Any] | None, manifest_profile: str | None
    ) -> dict[str, Any]:
        """The settings that decide every volume, as the store keeps them.

        Args:
            store: its folder, for the error message.
            there: what the store keeps already; None for a new one.
            manifest_profile: profile of the manifest that the scans come from, if they come from one.

        Raises:
            StoreError: if the store was built with other settings; the message names what differs.
        """
        known = there or {
            "crop_margin_mm": MARGIN_MM,
            "remove_table": False,
            "profile": manifest_profile or "ct",
        }
        margin = known["crop_margin_mm"] if self.margin_mm is None else self.margin_mm
        if self.crop_body is False:
            margin = None
        elif self.crop_body and margin is None:
            margin = MARGIN_MM
        profile = profile_of(self.profile or manifest_profile or known["profile"])
        if self.profile and manifest_profile and self.profile != manifest_profile:
            logger.warning(
                "The manifest's profile is %s; the store is built as %s, as asked.",
                manifest_profile,
                self.profile,
            )
        settings = {
            "spacing": list(self.spacing),
            "orientation": "RAS",
            "units": profile.units,
            "profile": profile.name,
            "crop_margin_mm": margin,
            "remove_table": known["remove_table"] if self.remove_table is None else bool(self.remove_table),
        }
        if there and there != settings:
            differing = [key for key in settings if there.get(key) != settings[key]]
            then, now = ({key: one.get(key) for key in differing} for one in (there, settings))
            raise StoreError(
                f"{store}: was built with {then}, now {now} is asked for. "
                f"Ask for the same settings ({_options(then)}), or choose another store (store_dir)."
            )
        return settings


def _options(settings: dict[str, Any]) -> str:
    """Settings of a store as they are written on a command line."""
    words = []
    for key, value in settings.items():
        if key == "crop_margin_mm":
            words.append("--crop_body false" if value is None else f"--margin_mm {value:g}")
        elif key in ("spacing", "profile", "remove_table"):  # the others follow from these
            text = json.dumps(value).replace('"', "")
            words.append(f'--{key} "{text}"' if isinstance(value, list) else f"--{key} {text}")
    return " ".join(words)
