"""Check label maps and masks before they are scored, and crop them to what matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from custom.errors import AliceError
from custom.evaluation.scores.rules import ScoringRule


def _array(values: Any) -> NDArray[Any]:
    """A numpy array from numpy, lists, or torch on any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def refuse_other_shape(prediction: NDArray[Any], reference: NDArray[Any]) -> None:
    """Raise AliceError unless both are volumes (X, Y, Z) of the same shape."""
    if prediction.shape != reference.shape:
        raise AliceError(
            f"The prediction has shape {prediction.shape}, the reference {reference.shape}; "
            "resample the prediction to the reference's grid (nearest neighbour) first."
        )
    if prediction.ndim != 3:
        raise AliceError(
            f"Expected volumes (X, Y, Z), got shape {prediction.shape}; drop batch and channel axes."
        )


def mask_pair(prediction: Any, reference: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks of the same shape as bool; AliceError for anything else."""
    prediction, reference = _array(prediction), _array(reference)
    refuse_other_shape(prediction, reference)
    for mask, name in ((prediction, "prediction"), (reference, "reference")):
        if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
            other = mask[~np.isin(mask, (0, 1))][0]
            raise AliceError(
                f"The {name} holds {other}, expected a mask of 0 and 1; compare a map with its label."
            )
    return prediction.astype(bool), reference.astype(bool)


def label_map(values: Any, name: str, rule: ScoringRule) -> NDArray[np.integer]:
    """Labels as small integers; AliceError for labels that the rule does not have."""
    labels = _array(values)
    if labels.dtype != bool and not np.issubdtype(labels.dtype, np.integer):
        broken = labels[labels != np.rint(labels)]  # nan differs from itself
        if broken.size:
            raise AliceError(
                f"The {name} holds the label {broken[0]}, which is not an integer; "
                "resample label maps with nearest neighbour, and take the argmax of probabilities."
            )
    if labels.size and (labels.min() < 0 or labels.max() > len(rule.organs)):
        unknown = labels[(labels < 0) | (labels > len(rule.organs))][0]
        raise AliceError(
            f"The {name} holds the label {unknown:g}, but {rule.name} has 0 to {len(rule.organs)}; "
            "map its labels to this order, and labels of other structures to 0."
        )
    return labels.astype(np.uint8 if len(rule.organs) < 256 else np.int32)


def checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    """The spacing as three floats, mm along x, y, z; AliceError if it is not three positive numbers."""
    values = tuple(float(step) for step in spacing)
    if len(values) != 3 or not all(0 < step < math.inf for step in values):
        raise AliceError(
            f"The spacing must be three positive numbers, mm along x, y, z, got {values}; "
            "take the zooms of the reference's file."
        )
    return values


def union(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The smallest box around two boxes; None stands for no box."""
    if first is None or second is None:
        return first or second or (slice(0, 0),) * 3
    return tuple(
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True)
    )


def cropped_pair(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks in their common box, with one voxel of background all around."""
    (box,) = ndimage.find_objects((prediction | reference).view(np.uint8), 1)
    return np.pad(prediction[box], 1), np.pad(reference[box], 1)
