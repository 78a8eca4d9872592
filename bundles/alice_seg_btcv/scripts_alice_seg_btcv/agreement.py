"""Settings that must agree with each other, checked before anything is built or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layouts import organ_of

# a crop's sides are multiples of this: the patches of MONAI's UNETR; five times half in SwinUNETR
_SIDES = {"UNETR": 16, "SwinUNETR": 32}
OTHER_TOLERANCE_MM = 2.0  # of organs without an official one; as the plain rules of alice score


def grid_problems(
    spacing: Sequence[float], window_hu: Sequence[float], roi_size: Sequence[int], network: str
) -> list[str]:
    """Say what training and inference cannot be given.

    Args:
        spacing: mm along x, y, z.
        window_hu: lowest and highest value.
        roi_size: voxels of a crop or window.
        network: the network's class, such as ``UNETR``.
    """
    told = []
    if not _are_numbers(spacing, 3) or min(spacing) <= 0:
        told.append(f"spacing: {spacing!r} are not three lengths in mm along x, y, z.")
    if not _are_numbers(window_hu, 2) or window_hu[0] >= window_hu[1]:
        told.append(f"window_hu: {window_hu!r} are not a lower and a higher value.")
    side = _SIDES.get(network.rsplit(".", 1)[-1], 1)
    if not _are_numbers(roi_size, 3) or any(n <= 0 or n % side for n in roi_size):
        told.append(f"roi_size: {network} takes three multiples of {side} along x, y, z, not {roi_size!r}.")
    return told


def label_list_problems(labels: Sequence[str], annotated: Sequence[int] | None = None) -> list[str]:
    """Say what is wrong with the organs, and with ``annotated`` of ``partial.yaml``: label values of some of them."""
    organs = list(map(organ_of, map(str, labels)))
    told = []
    if not organs or "background" in organs:
        told.append(f"labels: {list(labels)} must name the organs from value 1 on, without background.")
    if twice := sorted({name for name in organs if organs.count(name) > 1}):
        told.append(f"labels: {', '.join(twice)} is there twice.")
    if annotated is not None and (
        not annotated or any(type(v) is not int or not 1 <= v <= len(organs) for v in annotated)
    ):
        told.append(f"annotated: {annotated!r} are not label values; labels have 1 to {len(organs)}.")
    return told


def training(
    roi_size: Sequence[int], rotate90_probability: float, epochs: int, val_interval: int, warmup_epochs: int
) -> list[str]:
    """Say which settings of training do not fit each other."""
    told = []
    if rotate90_probability and roi_size[0] != roi_size[1]:
        told.append(
            f"rotate90_probability: crops that are turned must be as long along x as along y; roi_size is {list(roi_size)}."
        )
    if not 1 <= val_interval <= epochs:
        told.append(
            f"val_interval: with {val_interval} and {epochs} epochs no network would be validated and kept; take 1 to {epochs}."
        )
    if not 0 <= warmup_epochs <= epochs:
        told.append(f"warmup_epochs: {warmup_epochs} do not fit into {epochs} epochs.")
    return told


def tolerances(labels: Sequence[str], official_mm: Mapping[str, float]) -> list[float]:
    """Tolerance of each organ in mm: the official one, else 2 mm."""
    known = {organ_of(name): float(mm) for name, mm in official_mm.items()}
    return [known.get(organ_of(str(name)), OTHER_TOLERANCE_MM) for name in labels]


def tolerance_problems(labels: Sequence[str], tolerances_mm: Sequence[float]) -> list[str]:
    """Say if there is not one tolerance for each organ."""
    if len(tolerances_mm) == len(labels) and all(mm >= 0 for mm in tolerances_mm):
        return []
    return [
        f"tolerances_mm: {list(tolerances_mm)} are {len(tolerances_mm)} for {len(labels)} labels; give one length in mm for "
        "each, or none."
    ]


def told_tolerances(labels: Sequence[str], tolerances_mm: Sequence[float]) -> str:
    """The tolerances in words."""
    pairs = zip(labels, tolerances_mm, strict=True)
    return "tolerances in mm: " + ", ".join(f"{name} {mm:g}" for name, mm in pairs)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    )
