"""Score a folder of predictions against a folder of references; every case counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from custom.data.label_names import refuse_other_names
from custom.errors import AliceError, shown
from custom.evaluation.scores.case_files import (
    Reference,
    Volume,
    find_references,
    match_files,
    named_cases,
    on_grid_of,
    read_case_file,
    with_folds,
)
from custom.evaluation.scores.masks import label_map
from custom.evaluation.scores.metrics import case_rows
from custom.evaluation.scores.rules import BTCV, FLARE22, ScoringRule, plain_rule
from custom.evaluation.statistics.markdown import summary_markdown
from custom.evaluation.statistics.per_organ import summarise
from custom.files import read_json, read_text

RULES = {"flare22": FLARE22, "btcv": BTCV}
PLAIN_TOLERANCE_MM = 2.0  # between FLARE22's strictest organs and its usual ones (ours)


@dataclass(frozen=True)
class Scored:
    """What :func:`score_folder` found.

    Attributes:
        rows: of :func:`custom.evaluation.scores.metrics.case_rows`, case by case, with ``fold`` and ``seed``
            if known.
        failed: cases without a prediction; their rows have the status ``failed``.
        strangers: prediction files that belong to no case.
    """

    rows: list[dict[str, Any]]
    failed: list[str]
    strangers: list[Path]


def make_rule(
    name: str, organs: Sequence[str] | str | None = None, tolerance_mm: float | Sequence[float] | None = None
) -> ScoringRule:
    """The scoring rule with this name.

    Args:
        name: ``flare22`` or ``btcv``, which fix everything, or ``plain``.
        organs: for ``plain``, the names of the labels 1, 2, ..., or the metadata.json of a bundle that names
            them.
        tolerance_mm: for ``plain``, one number for all organs or one for each.

    Raises:
        AliceError: for an unknown name, for organs or tolerances that the rule fixes already, or for
            ``plain`` without organs.
    """
    if name in RULES:
        if organs is not None or tolerance_mm is not None:
            raise AliceError(
                f"The rules '{name}' fix organs and tolerances; to choose your own, use --rules plain."
            )
        return RULES[name]
    if name != "plain":
        raise AliceError(f"There are no rules '{name}'; choose among {', '.join([*RULES, 'plain'])}.")
    if not organs:
        raise AliceError(
            "The plain rules need the organs in label order: --names liver,spleen or --names BUNDLE/configs/metadata.json."
        )
    listed = _organ_names(organs)
    if len(set(listed)) < len(listed):
        raise AliceError(f"Two labels have one name in {listed}; name every label differently.")
    if tolerance_mm is None or isinstance(tolerance_mm, (int, float)):
        return plain_rule(listed, PLAIN_TOLERANCE_MM if tolerance_mm is None else float(tolerance_mm))
    return ScoringRule("plain", listed, tuple(float(mm) for mm in tolerance_mm))


def read_cases(cases: str | Sequence[Any] | None) -> list[str] | None:
    """Names of cases from a list, a comma-separated text, or a text file with one name per line.

    Raises:
        AliceError: if a file holds none.
    """
    if cases is None:
        return None
    if isinstance(cases, str) and Path(cases).is_file():
        listed = read_text(cases).split()
    else:
        listed = cases.split(",") if isinstance(cases, str) else [str(case) for case in cases]
    named = [case.strip() for case in listed if case.strip()]
    if not named:
        raise AliceError(f"{cases}: names no case.")
    return named


def score_folder(
    predictions: str | Path,
    references: str | Path,
    rule: ScoringRule,
    *,
    cases: Sequence[str] | None = None,
    fold: int | None = None,
    split: str | Path | None = None,
    seed: int | None = None,
    mapped: Mapping[int, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Score every reference. A case without a prediction is a failure: its DSC and NSD are 0.

    Args:
        predictions: folder of label maps on the original images' grids.
        references: folder or datalist of label maps; decides which cases there are.
        rule: the protocol.
        cases: only these.
        fold: written into the rows. If the split or the datalist has folds, only the cases of this one are
            scored.
        split: the folds.json of a bundle.
        seed: of the training, written into the rows.
        mapped: value of the references -> value of the rule, for references that number organs otherwise; values that it
            does not name are background.
        progress: called with cases done and cases in all.

    Raises:
        AliceError: naming the file, for another grid, a label the rule does not know, a ``dataset.json`` that names the
            labels otherwise, or a reference without any label; if no prediction matches a case, or the fold holds no case.
    """
    everyone = find_references(references)
    if not mapped:
        refuse_other_names(
            references,
            (reference.path for reference in everyone),
            rule.organs,
            "Map them with --label_map, or score with the data's own names, --rules plain --names {names}.",
        )
    if split is not None:
        everyone = with_folds(everyone, split)
    wanted = _wanted(everyone, str(references), cases, fold)
    found, strangers = match_files(predictions, everyone)
    if not any(reference.case in found for reference in wanted):
        raise AliceError(
            f"{predictions}: none of its files belongs to a case to score ({wanted[0].case}, ...); they belong to "
            f"{', '.join(sorted(found)[:5])}; check the fold."
        )
    folds = [reference.fold if fold is None else fold for reference in wanted]
    rows: list[dict[str, Any]] = []
    for done, (reference, its_fold) in enumerate(zip(wanted, folds, strict=True), start=1):
        more: dict[str, Any] = {}
        if None not in folds:
            more["fold"] = its_fold
        if seed is not None:
            more["seed"] = seed
        scored = score_case(found.get(reference.case), reference.path, rule, reference.case, mapped)
        rows += [{"case": row["case"]} | more | row for row in scored]
        progress(done, len(wanted))
    failed = [reference.case for reference in wanted if reference.case not in found]
    return Scored(rows, failed, strangers)


def score_case(
    prediction: Path | None,
    reference: Path,
    rule: ScoringRule,
    case: str,
    mapped: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one case; without a prediction it is a failure.

    A failure scores 0 on every organ of the reference. It also scores 0 on absent organs, unless the rule
    leaves those out of its means.
    """
    truth = read_case_file(reference)
    if mapped:
        truth = replace(truth, voxels=_renumbered(truth.voxels, mapped))
    labels_r = _labels(truth, rule)
    if not labels_r.any():
        raise AliceError(f"{reference}: the reference holds no organ at all; repair it or leave it out.")
    if prediction is None:
        rows = case_rows(np.zeros_like(labels_r), labels_r, truth.spacing, rule, case=case)
        for row in rows:
            absent = row["status"] == "absent"
            score = math.nan if absent and math.isnan(rule.absent_score) else 0.0
            row |= {"status": "failed", "dsc": score, "nsd": score, "hd95": math.nan if absent else math.inf}
        return rows
    guess = on_grid_of(read_case_file(prediction), truth)
    labels_p = _labels(guess, rule)
    # rules mean axial slices, which challenges store along the last axis; other files get their axes moved,
    # never flipped
    axes = np.argsort(nib.io_orientation(truth.affine)[:, 0])
    spacing = [truth.spacing[axis] for axis in axes]
    return case_rows(labels_p.transpose(axes), labels_r.transpose(axes), spacing, rule, case=case)


def score_markdown(scored: Scored, rule: ScoringRule) -> str:
    """A table of the run with one line per organ, after sentences about what was not measured."""
    num_cases = len({row["case"] for row in scored.rows})
    said = [f"**{rule.name}**, {num_cases} cases, {len(scored.failed)} of them without a prediction."]
    if scored.failed:
        said.append(f"Failed, counted as 0: {', '.join(scored.failed)}.")
    if scored.strangers:
        names = ", ".join(shown(path) for path in scored.strangers[:5])
        more = ", ..." if len(scored.strangers) > 5 else ""
        said.append(
            f"Left out, since no reference belongs to them: {len(scored.strangers)} files ({names}{more})."
        )
    summaries = {metric: summarise(scored.rows, metric) for metric in ("dsc", "nsd", "hd95")}
    return "\n\n".join([*said, summary_markdown(summaries)])


def _renumbered(voxels: NDArray[Any], mapped: Mapping[int, int]) -> NDArray[np.integer]:
    found = np.zeros(voxels.shape, np.int32)
    for value, to in mapped.items():
        found[voxels == value] = to
    return found


def _labels(volume: Volume, rule: ScoringRule) -> NDArray[np.integer]:
    return label_map(volume.voxels, f"file {volume.path}", rule)


def _wanted(
    references: Sequence[Reference], source: str, cases: Sequence[str] | None, fold: int | None
) -> list[Reference]:
    chosen = list(references) if cases is None else named_cases(references, cases)
    if fold is not None and any(reference.fold is not None for reference in references):
        chosen = [reference for reference in chosen if reference.fold == fold]
    if not chosen:
        known = sorted({reference.fold for reference in references if reference.fold is not None})
        raise AliceError(f"{source}: no case to score in fold {fold}; its folds are {known}.")
    return chosen


def _organ_names(organs: Sequence[str] | str) -> tuple[str, ...]:
    if not isinstance(organs, str):
        return tuple(str(organ) for organ in organs)
    if not organs.endswith(".json"):
        return tuple(organ.strip() for organ in organs.split(","))
    try:
        channels: Mapping[str, str] = read_json(organs)["network_data_format"]["outputs"]["pred"][
            "channel_def"
        ]
        return tuple(channels[str(label)] for label in range(1, len(channels)))
    except (KeyError, TypeError) as error:
        raise AliceError(
            f"{organs}: not the metadata.json of a bundle with network_data_format.outputs.pred.channel_def ({error!r})."
        ) from error
