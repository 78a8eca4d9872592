"""Scoring protocols: organs in label order, their tolerances, and the score of an absent organ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from custom.data.organs import BTCV_ORGANS, FLARE22_ORGANS
from custom.errors import AliceError


@dataclass(frozen=True)
class ScoringRule:
    """A scoring protocol: its organs, and its choices where the formulas leave room.

    Attributes:
        name: printed beside every number.
        organs: names of the label values 1, 2, ...
        tolerances_mm: tolerance of the NSD, one per organ.
        labelled_slices_only: organs scored on slices [z_min, z_max) of the reference only.
        absent_score: DSC and NSD of an organ that is in neither map; nan leaves it out of means and counts
            it.
        least_dsc_for_nsd: below this DSC the NSD is 0.
        decimals: DSC and NSD are rounded to this many; None does not round.
    """

    name: str
    organs: tuple[str, ...]
    tolerances_mm: tuple[float, ...]
    labelled_slices_only: frozenset[str] = frozenset()
    absent_score: float = math.nan
    least_dsc_for_nsd: float = 0.0
    decimals: int | None = None

    def __post_init__(self) -> None:
        if len(self.organs) != len(self.tolerances_mm):
            raise AliceError(
                f"Rule '{self.name}' has {len(self.organs)} organs and {len(self.tolerances_mm)} tolerances; "
                "give one tolerance per organ."
            )


# All numbers are those of FLARE22's official evaluation script.
FLARE22 = ScoringRule(
    name="FLARE22",
    organs=FLARE22_ORGANS,
    tolerances_mm=(5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3),
    labelled_slices_only=frozenset({"aorta", "inferior vena cava", "esophagus"}),
    absent_score=1.0,
    least_dsc_for_nsd=0.2,
    decimals=4,
)
# The UNETR and Swin UNETR repositories score an organ that is absent from the reference 0.
# BTCV defines no NSD: the tolerances are FLARE22's for the same organ, 2 mm for the veins (ours).
BTCV = ScoringRule(
    name="BTCV",
    organs=BTCV_ORGANS,
    tolerances_mm=(3, 3, 3, 2, 3, 5, 5, 2, 2, 2, 5, 2, 2),
    absent_score=0.0,
)


def plain_rule(organs: Sequence[str], tolerance_mm: float) -> ScoringRule:
    """A rule of no challenge: one tolerance, every slice, no rounding; absent organs score nan."""
    return ScoringRule("plain", tuple(organs), (tolerance_mm,) * len(organs))
