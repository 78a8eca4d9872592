"""Read the worst cases of two runs from their files, to show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from custom.errors import AliceError
from custom.evaluation.compare.overlays import Overlay
from custom.evaluation.scores.case_files import (
    Volume,
    find_references,
    match_files,
    named_cases,
    on_grid_of,
    read_case_file,
)
from custom.evaluation.statistics.paired_rows import Row, key_of
from custom.evaluation.statistics.per_organ import worst_rows

WINDOW_HU = (-175.0, 250.0)  # the segmentation recipes' window


@dataclass(frozen=True)
class Pictures:
    """Where the scans and label maps of two runs lie."""

    images: str | Path
    references: str | Path
    predictions_a: str | Path
    predictions_b: str | Path


def make_pictures(output: str | Path | None, **folders: str | Path | None) -> Pictures | None:
    """Make :class:`Pictures` from its folders; None if no folder is given.

    Raises:
        AliceError: if only some folders are given, naming the others, or if there is no ``output`` for the
            page.
    """
    missing = [f"--{name}" for name, folder in folders.items() if folder is None]
    if len(missing) == len(folders):
        return None
    if missing:
        raise AliceError(f"To show the worst cases give {', '.join(missing)} as well.")
    if output is None:
        raise AliceError("Pictures need a page to be on: give a folder with -o.")
    return Pictures(**{name: folder for name, folder in folders.items() if folder is not None})


def worst_overlays(
    rows_a: Sequence[Row], rows_b: Sequence[Row], pictures: Pictures, count: int
) -> list[Overlay]:
    """The worst organ, in A or in B, of each of the worst cases, worst first.

    Raises:
        AliceError: if a scan or reference of these cases is missing or lies on another grid.
    """
    by_run = [{(*key_of(row), row["organ"]): row for row in rows} for rows in (rows_a, rows_b)]
    chosen: dict[str, Row] = {}
    for row in worst_rows([*rows_a, *rows_b], "dsc", len(rows_a) + len(rows_b)):
        shared = all((*key_of(row), row["organ"]) in run for run in by_run)
        if shared and row["case"] not in chosen and len(chosen) < count:
            chosen[str(row["case"])] = row
    references = named_cases(find_references(pictures.references), chosen)
    images, _ = match_files(pictures.images, references, images=True)
    found_a, _ = match_files(pictures.predictions_a, references)
    found_b, _ = match_files(pictures.predictions_b, references)

    overlays = []
    for reference in references:
        row = chosen[reference.case]
        if reference.case not in images:
            raise AliceError(
                f"{pictures.images}: no scan of case '{reference.case}'; add it, or leave out --images."
            )
        truth = read_case_file(reference.path)
        masks = [_mask(truth.path, truth, row["label"])]
        masks += [_mask(found.get(reference.case), truth, row["label"]) for found in (found_a, found_b)]
        scan = on_grid_of(read_case_file(images[reference.case]), truth)
        volume, *turned = (_canonical(part, truth.affine) for part in (scan.voxels, *masks))
        axes = np.argsort(nib.io_orientation(truth.affine)[:, 0])
        spacing = [truth.spacing[axis] for axis in axes]
        scores = [_score(run.get((*key_of(row), row["organ"]))) for run in by_run]
        caption = f"{reference.case}, {row['organ']}: DSC {scores[0]} in A, {scores[1]} in B"
        overlays.append(Overlay(caption, _window(volume), turned[0], turned[1], turned[2], spacing))
    return overlays


def _mask(path: Path | None, truth: Volume, label: int) -> NDArray[np.bool_]:
    """True where a file has the label; all False if there is no file."""
    if path is None:
        return np.zeros(truth.voxels.shape, bool)
    volume = truth if path == truth.path else on_grid_of(read_case_file(path), truth)
    return volume.voxels == label


def _canonical(voxels: NDArray, affine: NDArray[np.float64]) -> NDArray:
    """Flip and swap axes until they point towards Right, Anterior and Superior as closely as possible."""
    return nib.apply_orientation(voxels, nib.io_orientation(affine))


def _window(volume: NDArray) -> NDArray[np.float32]:
    """HU in the abdomen's window; other intensities between their 1st and 99th percentile."""
    low, high = WINDOW_HU if volume.min() < -200 else np.percentile(volume, (1, 99))
    return np.clip((volume.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)


def _score(row: Row | None) -> str:
    if row is None or math.isnan(row["dsc"]):
        return "–"
    return f"{row['dsc']:.3f}" + ("" if row.get("status", "ok") == "ok" else f" ({row['status']})")
