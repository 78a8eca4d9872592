"""How well a segmentation fits its reference: DSC, NSD and HD95 per organ, by a named protocol."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

# Label value 1, 2, ... in the order of FLARE22's official evaluation.
FLARE22_ORGANS = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
BTCV_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
STATUSES = ("ok", "absent", "missed", "spurious", "unscored")


@dataclass(frozen=True)
class ScoringRule:
    """A protocol: which organs, and what its authors decided where the formulas leave room.

    Attributes:
        name: printed beside every number.
        organs: names of the label values 1, 2, ...
        tolerances_mm: tolerance of the NSD, one per organ.
        labelled_slices_only: organs scored on slices [z_min, z_max) of the reference only.
        absent_score: DSC and NSD of an organ that neither map holds (nan: left out of means, and counted).
        least_dsc_for_nsd: below this DSC the NSD is 0.
        decimals: DSC and NSD are rounded to so many, or not at all.
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
            raise ValueError(
                f"Rule '{self.name}' has {len(self.organs)} organs and {len(self.tolerances_mm)} tolerances; "
                "give one tolerance per organ."
            )


# FLARE22's official evaluation script, all numbers.
FLARE22 = ScoringRule(
    name="FLARE22",
    organs=FLARE22_ORGANS,
    tolerances_mm=(5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3),
    labelled_slices_only=frozenset({"aorta", "inferior vena cava", "esophagus"}),
    absent_score=1.0,
    least_dsc_for_nsd=0.2,
    decimals=4,
)
# The DSC is that of the UNETR and Swin UNETR repositories, which give an organ the reference does not hold 0.
# BTCV defines no NSD: the tolerances are FLARE22's for the same organ, 2 mm for the veins (ours).
BTCV = ScoringRule(
    name="BTCV",
    organs=BTCV_ORGANS,
    tolerances_mm=(3, 3, 3, 2, 3, 5, 5, 2, 2, 2, 5, 2, 2),
    absent_score=0.0,
)


def plain_rule(organs: Sequence[str], tolerance_mm: float) -> ScoringRule:
    """No challenge's rules: one tolerance, every slice, no rounding, and absent organs are nan."""
    return ScoringRule("plain", tuple(organs), (tolerance_mm,) * len(organs))


# -- one mask against another -----------------------------------------------------------------------


def dice(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Dice similarity coefficient 2|A∩B| / (|A| + |B|) of two masks of one shape; nan if both are empty."""
    prediction, reference = _mask_pair(prediction, reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else math.nan


def nsd(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Normalised surface Dice as DeepMind's surface-distance defines it, with nothing of FLARE22's rules.

    Surface elements sit between voxels and weigh their area (marching cubes on 2x2x2 neighbourhoods); the
    outside of the volume is background, so an organ cut by the volume's border has a surface there.

    Args:
        prediction: bool (X, Y, Z), or integers 0 and 1.
        reference: the same, on the same grid.
        spacing: millimetres per voxel along x, y, z.
        tolerance_mm: a surface element counts as found within this distance, bounds included.

    Returns:
        Share of both surfaces' area within the tolerance of the other, in [0, 1]. 0 if one mask is
        empty, nan if both are.

    Raises:
        ValueError: for masks of different shape, other values than 0 and 1, a bad spacing or tolerance.
    """
    prediction, reference = _mask_pair(prediction, reference)
    spacing = _checked_spacing(spacing)
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"The tolerance must be a distance in mm, 0 or more, got {tolerance_mm}.")
    if not prediction.any() and not reference.any():
        return math.nan
    if not prediction.any() or not reference.any():
        return 0.0

    table, kernel = create_table_neighbour_code_to_surface_area(spacing)
    prediction, reference = _cropped_pair(prediction, reference)
    border_p, area_p = _surface_elements(prediction, table.double().numpy(), kernel.numpy()[0, 0])
    border_r, area_r = _surface_elements(reference, table.double().numpy(), kernel.numpy()[0, 0])
    # scipy's own float64 distances: a surface at exactly the tolerance is within it
    found_p = ndimage.distance_transform_edt(~border_r, sampling=spacing)[border_p] <= tolerance_mm
    found_r = ndimage.distance_transform_edt(~border_p, sampling=spacing)[border_r] <= tolerance_mm
    return float((area_p[found_p].sum() + area_r[found_r].sum()) / (area_p.sum() + area_r.sum()))


def hd95(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm, as MONAI defines it: the larger of the two directed ones.

    Distances run between the centres of border voxels (those with a face neighbour outside). inf if one
    mask is empty, so that a missed organ cannot improve a mean; nan if both are. See :func:`nsd`.
    """
    prediction, reference = _mask_pair(prediction, reference)
    spacing = _checked_spacing(spacing)
    if not prediction.any() and not reference.any():
        return math.nan
    if not prediction.any() or not reference.any():
        return math.inf

    prediction, reference = _cropped_pair(prediction, reference)
    border_p = prediction ^ ndimage.binary_erosion(prediction)
    border_r = reference ^ ndimage.binary_erosion(reference)
    distance_p = ndimage.distance_transform_edt(~border_r, sampling=spacing)[border_p]
    distance_r = ndimage.distance_transform_edt(~border_p, sampling=spacing)[border_r]
    return float(max(np.percentile(distance_p, 95), np.percentile(distance_r, 95)))


# -- one case ---------------------------------------------------------------------------------------


def flare_scores(
    prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """DSC and NSD of each organ by the rules of FLARE22's official evaluation.

    Tolerance per organ; 1 if an organ is absent from both maps, 0 if from exactly one; aorta, inferior
    vena cava and esophagus only on the reference's slices [z_min, z_max), the last labelled one excluded;
    NSD 0 where DSC < 0.2; four decimals. If such an organ has one labelled slice, no slice is left and the
    official script stops with an error: both scores are nan here (0 if the prediction lacks the organ).

    Args:
        prediction: integer labels 0..13 (X, Y, Z) in FLARE22 order, numpy or torch.
        reference: the same, on the same grid.
        spacing: millimetres per voxel along x, y, z: the zooms of the reference's file.

    Returns:
        ``{organ: (dsc, nsd)}`` in label order, named as in :data:`FLARE22_ORGANS`.

    Raises:
        ValueError: for maps of different shape, labels that are no integers in 0..13, or a bad spacing.
    """
    rows = case_rows(prediction, reference, spacing, FLARE22, with_hd95=False)
    return {row["organ"]: (row["dsc"], row["nsd"]) for row in rows}


def btcv_scores(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float]) -> dict[str, float]:
    """DSC of BTCV's 13 organs and their ``mean``, as the UNETR and Swin UNETR repositories count them.

    An organ absent from the reference scores 0 and stays in the mean. See :func:`flare_scores`.
    """
    rows = case_rows(prediction, reference, spacing, BTCV, with_hd95=False, with_nsd=False)
    scores = {row["organ"]: row["dsc"] for row in rows}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def case_rows(
    prediction: ArrayLike,
    reference: ArrayLike,
    spacing: Sequence[float],
    rule: ScoringRule,
    *,
    case: str = "",
    with_nsd: bool = True,
    with_hd95: bool = True,
) -> list[dict[str, Any]]:
    """Score one case, one row per organ.

    Args:
        prediction: integer labels (X, Y, Z) of the rule's organs, on the original image's grid.
        reference: the same.
        spacing: millimetres per voxel along x, y, z.
        rule: the protocol, such as :data:`FLARE22`.
        case: name of the case, kept in its rows.
        with_nsd: False saves the time, and leaves nan.
        with_hd95: the same.

    Returns:
        Rows with ``case, protocol, organ, label, status, dsc, nsd, hd95`` (mm) and, of the whole volume,
        ``reference_ml, prediction_ml``. ``status`` is ``ok``; ``absent`` from both maps; ``missed`` by the
        prediction; ``spurious``, not in the reference; or ``unscored``, as the rule leaves no slice.

    Raises:
        ValueError: as :func:`flare_scores`.
    """
    spacing = _checked_spacing(spacing)
    prediction = _label_map(prediction, "prediction", rule)
    reference = _label_map(reference, "reference", rule)
    _refuse_other_shape(prediction, reference)
    boxes_p = ndimage.find_objects(prediction, len(rule.organs))
    boxes_r = ndimage.find_objects(reference, len(rule.organs))

    rows = []
    for label, organ in enumerate(rule.organs, start=1):
        box = _union(boxes_p[label - 1], boxes_r[label - 1])
        organ_p, organ_r = prediction[box] == label, reference[box] == label
        row = {"case": case, "protocol": rule.name, "organ": organ, "label": label}
        row |= _score_organ(organ_p, organ_r, spacing, rule, label, with_nsd, with_hd95)
        voxel_ml = math.prod(spacing) / 1000
        row["reference_ml"] = np.count_nonzero(organ_r) * voxel_ml
        row["prediction_ml"] = np.count_nonzero(organ_p) * voxel_ml
        rows.append(row)
    return rows


def _score_organ(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    rule: ScoringRule,
    label: int,
    with_nsd: bool,
    with_hd95: bool,
) -> dict[str, Any]:
    """The part of a row that the rule decides, from an organ's two masks."""
    if not prediction.any() and not reference.any():
        return {"status": "absent", "dsc": rule.absent_score, "nsd": rule.absent_score, "hd95": math.nan}
    if not reference.any():
        return {"status": "spurious", "dsc": 0.0, "nsd": 0.0, "hd95": math.inf}
    if prediction.any() and rule.organs[label - 1] in rule.labelled_slices_only:
        labelled = np.flatnonzero(reference.any(axis=(0, 1)))
        if len(labelled) == 1:  # [z_min, z_max) is empty
            return {"status": "unscored", "dsc": math.nan, "nsd": math.nan, "hd95": math.nan}
        prediction = prediction[..., labelled[0] : labelled[-1]]
        reference = reference[..., labelled[0] : labelled[-1]]
    if not prediction.any():
        return {"status": "missed", "dsc": 0.0, "nsd": 0.0, "hd95": math.inf}

    dsc = dice(prediction, reference)
    surface = math.nan
    if with_nsd:
        tolerance_mm = rule.tolerances_mm[label - 1]
        surface = 0.0 if dsc < rule.least_dsc_for_nsd else nsd(prediction, reference, spacing, tolerance_mm)
    if rule.decimals is not None:  # numpy's rounding, as in the official script: it differs on ties
        dsc, surface = (float(np.round(score, rule.decimals)) for score in (dsc, surface))
    distance = hd95(prediction, reference, spacing) if with_hd95 else math.nan
    return {"status": "ok", "dsc": dsc, "nsd": surface, "hd95": distance}


# -- rows in a file ---------------------------------------------------------------------------------

_NUMBERS: dict[str, type] = dict.fromkeys(("label", "fold", "seed"), int) | dict.fromkeys(
    ("dsc", "nsd", "hd95", "reference_ml", "prediction_ml"), float
)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with every digit, all or nothing.

    Raises:
        ValueError: if there are no rows, or their keys differ.
    """
    if not rows:
        raise ValueError(f"No rows to write to '{path}': score at least one case first.")
    for index, row in enumerate(rows):
        if set(row) != set(rows[0]):
            different = sorted(set(row) ^ set(rows[0]))
            raise ValueError(
                f"Row {index} and row 0 differ in the columns {different}; give all rows the same."
            )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read what :func:`write_rows` wrote; scores are numbers again, unknown columns stay text.

    Raises:
        ValueError: naming file, line and column of a value that is no number, or a line of other length.
    """
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"'{path}', line {reader.line_num}: not as many values as the header has columns."
                )
            for column in set(row) & set(_NUMBERS):
                try:
                    row[column] = _NUMBERS[column](row[column])
                except ValueError:
                    raise ValueError(
                        f"'{path}', line {reader.line_num}: {column} is '{row[column]}', which is no number."
                    ) from None
            rows.append(row)
    return rows


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text so that ``path`` holds all of it or what it held before."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename must stay on one disk
    try:
        draft.write_text(text, encoding="utf-8", newline="")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# -- checks and boxes -------------------------------------------------------------------------------


def _array(values: Any) -> NDArray[Any]:
    """Numpy from numpy, lists or torch on any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _refuse_other_shape(prediction: NDArray[Any], reference: NDArray[Any]) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape}, the reference {reference.shape}; "
            "resample the prediction to the reference's grid (nearest neighbour) first."
        )
    if prediction.ndim != 3:
        raise ValueError(
            f"Expected volumes (X, Y, Z), got shape {prediction.shape}; drop batch and channel axes."
        )


def _mask_pair(prediction: Any, reference: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    prediction, reference = _array(prediction), _array(reference)
    _refuse_other_shape(prediction, reference)
    for mask, name in ((prediction, "prediction"), (reference, "reference")):
        if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
            other = mask[~np.isin(mask, (0, 1))][0]
            raise ValueError(
                f"The {name} holds {other}, expected a mask of 0 and 1; compare a map with its label."
            )
    return prediction.astype(bool), reference.astype(bool)


def _label_map(values: Any, name: str, rule: ScoringRule) -> NDArray[np.integer]:
    """Labels as small integers, refused where they are none of the rule's."""
    labels = _array(values)
    if labels.dtype != bool and not np.issubdtype(labels.dtype, np.integer):
        broken = labels[labels != np.rint(labels)]  # nan differs from itself
        if broken.size:
            raise ValueError(
                f"The {name} holds the label {broken[0]}, which is no integer; "
                "resample label maps with nearest neighbour, and take the argmax of probabilities."
            )
    if labels.size and (labels.min() < 0 or labels.max() > len(rule.organs)):
        unknown = labels[(labels < 0) | (labels > len(rule.organs))][0]
        raise ValueError(
            f"The {name} holds the label {unknown:g}, but {rule.name} has 0 to {len(rule.organs)}; "
            "map its labels to this order, and what the protocol does not know to 0."
        )
    return labels.astype(np.uint8 if len(rule.organs) < 256 else np.int32)


def _checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(step) for step in spacing)
    if len(values) != 3 or not all(0 < step < math.inf for step in values):
        raise ValueError(
            f"The spacing must be three positive numbers, mm along x, y, z, got {values}; "
            "take the zooms of the reference's file."
        )
    return values


def _union(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The smallest box around both; None is no box."""
    if first is None or second is None:
        return first or second or (slice(0, 0),) * 3
    return tuple(
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True)
    )


def _cropped_pair(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks in their common box, with one voxel of background all around."""
    (box,) = ndimage.find_objects((prediction | reference).view(np.uint8), 1)
    return np.pad(prediction[box], 1), np.pad(reference[box], 1)


def _surface_elements(
    mask: NDArray[np.bool_], table: NDArray[np.float64], kernel: NDArray[np.integer]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Where the surface runs, at the corners between voxels, and the area of each of its elements in mm²."""
    code = np.zeros([size - 1 for size in mask.shape], np.uint8)
    for (i, j, k), bit in np.ndenumerate(kernel):
        code += bit.astype(np.uint8) * mask[i:, j:, k:][tuple(slice(size) for size in code.shape)]
    border = (code != 0) & (code != 255)
    return border, table[code[border]]
