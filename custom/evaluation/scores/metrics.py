"""Score a segmentation against its reference: DSC, NSD and HD95 for each organ, by a named protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from custom.evaluation.scores.masks import checked_spacing, label_map, mask_pair, refuse_other_shape, union
from custom.evaluation.scores.rules import FLARE22, ScoringRule
from custom.evaluation.scores.surfaces import hd95, nsd

STATUSES = ("ok", "absent", "missed", "spurious", "unscored", "failed")


def dice(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Dice similarity coefficient 2|A∩B| / (|A| + |B|) of two masks of one shape; nan if both are empty."""
    prediction, reference = mask_pair(prediction, reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else math.nan


def flare_scores(
    prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """DSC and NSD of each organ by the rules of FLARE22's official evaluation.

    Each organ has its tolerance. An organ that is absent from both maps scores 1, from exactly one 0. Aorta,
    inferior vena cava and esophagus are scored only on the reference's slices [z_min, z_max), without the
    last labelled one. NSD is 0 where DSC < 0.2. Scores have four decimals. If one of these three organs has a
    single labelled slice, no slice is left and the official script stops with an error; here both scores are
    nan (0 if the prediction lacks the organ).

    Args:
        prediction: integer labels 0..13 (X, Y, Z) in FLARE22 order, numpy or torch.
        reference: the same, on the same grid.
        spacing: millimetres per voxel along x, y, z: the zooms of the reference's file.

    Returns:
        ``{organ: (dsc, nsd)}`` in label order, named as in
        :data:`custom.evaluation.scores.rules.FLARE22_ORGANS`.

    Raises:
        AliceError: for maps of different shape, labels other than the integers 0 to 13, or a bad spacing.
    """
    rows = case_rows(prediction, reference, spacing, FLARE22, with_hd95=False)
    return {row["organ"]: (row["dsc"], row["nsd"]) for row in rows}


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
    """Score one case; returns one row for each organ.

    Args:
        prediction: integer labels (X, Y, Z) of the rule's organs, on the original image's grid.
        reference: the same.
        spacing: millimetres per voxel along x, y, z.
        rule: the protocol, such as :data:`FLARE22`.
        case: name of the case, kept in its rows.
        with_nsd: False skips the NSD, which is then nan.
        with_hd95: the same for HD95.

    Returns:
        Rows with ``case, protocol, organ, label, status, dsc, nsd, hd95`` (mm) and, of the whole volume,
        ``reference_ml, prediction_ml``. ``status`` is ``ok``; ``absent`` from both maps; ``missed`` by the
        prediction; ``spurious``, not in the reference; or ``unscored``, if the rule leaves no slice to score.
        (``failed``, the last of :data:`STATUSES`, means a case without prediction; see
        :mod:`custom.evaluation.scores.score_folder`.)

    Raises:
        AliceError: as :func:`flare_scores`.
    """
    spacing = checked_spacing(spacing)
    prediction = label_map(prediction, "prediction", rule)
    reference = label_map(reference, "reference", rule)
    refuse_other_shape(prediction, reference)
    boxes_p = ndimage.find_objects(prediction, len(rule.organs))
    boxes_r = ndimage.find_objects(reference, len(rule.organs))

    rows = []
    for label, organ in enumerate(rule.organs, start=1):
        box = union(boxes_p[label - 1], boxes_r[label - 1])
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
    """Status and scores of one organ from its two masks, by the rule."""
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
