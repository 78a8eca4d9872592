"""Draw segmentations over their scan, on the slice where they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

_REFERENCE_RGB, _PREDICTION_RGB = (0.30, 0.85, 0.45), (1.0, 0.45, 0.75)
_MARGIN_MM, _LEAST_FIELD_MM = 25.0, 120.0  # so that even a small organ is shown with its surroundings (ours)


@dataclass(frozen=True)
class Overlay:
    """A case to show: one organ of a scan, with the reference and both predictions.

    Attributes:
        caption: the case, the organ and its scores.
        volume: intensities in [0, 1] (X, Y, Z); x towards Right, y Anterior, z Superior.
        reference: mask of the organ (X, Y, Z).
        prediction_a: the same from run A.
        prediction_b: the same from run B.
        spacing: millimetres per voxel along x, y, z.
    """

    caption: str
    volume: ArrayLike
    reference: ArrayLike
    prediction_a: ArrayLike
    prediction_b: ArrayLike
    spacing: Sequence[float] = (1.0, 1.0, 1.0)


def overlay_pictures(overlay: Overlay) -> tuple[int, list[NDArray[np.float64]]]:
    """The worst slice, and pictures (H, W, 3) of it around the organ: one with A's outline, one with B's."""
    masks = [
        np.asarray(m, dtype=bool) for m in (overlay.reference, overlay.prediction_a, overlay.prediction_b)
    ]
    z = worst_slice(*masks)
    field = field_around(np.any([mask[..., z] for mask in masks], axis=0), overlay.spacing[:2])
    image, reference, *predictions = (part[..., z][field] for part in (np.asarray(overlay.volume), *masks))
    return z, [axial_overlay(image, reference, p, overlay.spacing[:2]) for p in predictions]


def worst_slice(reference: ArrayLike, *predictions: ArrayLike) -> int:
    """The axial slice where predictions and reference differ in most voxels."""
    masks = [np.asarray(mask, dtype=bool) for mask in (reference, *predictions)]
    differing = [(masks[0] ^ mask).sum(axis=(0, 1)) for mask in masks[1:]]
    # where nothing differs, show the organ's largest slice
    return int(np.argmax(sum(differing) if np.any(differing) else masks[0].sum(axis=(0, 1))))


def field_around(mask: NDArray[np.bool_], spacing: Sequence[float]) -> tuple[slice, slice]:
    """The part of a slice (X, Y) to show: the mask with a margin, square where the slice allows; all if empty."""
    if not mask.any():
        return slice(None), slice(None)
    low, high = (
        np.array([edge(np.flatnonzero(mask.any(axis=1 - a))) for a in (0, 1)]) for edge in (min, max)
    )
    step = np.asarray(spacing, dtype=float)
    side_mm = max(float(((high - low + 1) * step).max()) + 2 * _MARGIN_MM, _LEAST_FIELD_MM)
    size = np.minimum(np.ceil(side_mm / step).astype(int), mask.shape)
    start = np.clip((low + high + 1) // 2 - size // 2, 0, np.array(mask.shape) - size)
    x, y = (slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True))
    return x, y


def axial_overlay(
    image: ArrayLike, reference: ArrayLike, prediction: ArrayLike, spacing: Sequence[float] = (1.0, 1.0)
) -> NDArray[np.float64]:
    """A slice as radiologists view it, with the outlines of reference (green) and prediction (pink).

    Args:
        image: intensities in [0, 1] (X, Y), x towards Right and y Anterior.
        reference: mask (X, Y).
        prediction: mask (X, Y).
        spacing: millimetres per pixel along x, y.

    Returns:
        Colours in [0, 1] (H, W, 3), square pixels, anterior on top and the patient's right on the left.
    """
    grey = np.clip(np.asarray(image, dtype=float), 0, 1)
    extent_mm = np.array(grey.shape) * np.asarray(spacing, dtype=float)
    size = np.maximum(1, np.round(extent_mm * max(384 / extent_mm.max(), 1e-6))).astype(int)

    columns, rows = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(int)[::-1]
        for new, old in zip(size, grey.shape, strict=True)
    )
    enlarged = (np.asarray(part)[np.ix_(columns, rows)].T for part in (grey, reference, prediction))
    shown, mask_r, mask_p = enlarged
    colours = np.repeat(shown[..., None], 3, axis=2).astype(float)
    for mask, colour in ((mask_p, _PREDICTION_RGB), (mask_r, _REFERENCE_RGB)):
        inside = mask.astype(bool)
        colours[inside & ~ndimage.binary_erosion(inside, iterations=2)] = colour
    return colours
