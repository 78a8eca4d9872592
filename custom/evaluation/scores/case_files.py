"""Match files to cases, and read their voxels on their own grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from custom.data.errors import ScanError
from custom.data.folder_walk import scan_files
from custom.data.grid.orientation import apart_mm, is_same_place, turn_like
from custom.data.layouts import IMAGE_SUFFIXES, is_label, stem
from custom.data.scans import list_scans, read_volume
from custom.errors import AliceError
from custom.files import read_json

# what MONAI's SaveImaged, challenges and people add to a case's name
_POSTFIX = re.compile(r"[_\-.](trans|seg|segmentation|pred|prediction|labels?|mask)$", re.IGNORECASE)
_PREFIX = re.compile(r"^(img|image|labels?|mask|pred)[_\-]?(?=\d)", re.IGNORECASE)
# endings of image names: nnU-Net's first channel, which FLARE22 uses as well, and common words
_IMAGE_TAIL = re.compile(r"_(0000|ct|image|img)$", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """A label map to score against; ``names`` are the names that a prediction of the case may have."""

    case: str
    path: Path
    fold: int | None = None
    names: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Volume:
    """Voxels (X, Y, Z) as stored, their affine to RAS mm, and millimetres per voxel along each axis."""

    path: Path
    voxels: NDArray
    affine: NDArray[np.float64]
    spacing: tuple[float, ...]


def possible_cases(path: Path) -> list[str]:
    """Cases that a file may belong to, likeliest first: its name, then shorter forms of it."""
    names = [stem(path)]
    while (shorter := _POSTFIX.sub("", names[-1])) != names[-1]:
        names.append(shorter)
    names += [_IMAGE_TAIL.sub("", name) for name in names]  # late, since a case may be called 0000 itself
    names += [_PREFIX.sub("", name) for name in names]
    return list(dict.fromkeys(name for name in names if name))


def find_references(source: str | Path) -> list[Reference]:
    """Label maps of a folder, a datalist, or one file, sorted by case.

    If a folder also holds images, only its labels are taken (``labelsTr/``, ``*_seg.nii.gz`` and similar).
    The ``fold`` of a datalist is kept.

    Raises:
        AliceError: if there is none, or two files belong to the same case.
    """
    source = Path(source).expanduser()
    if source.suffix == ".json":
        found = [
            _reference(scan.label, scan.extra.get("fold"), possible_cases(scan.image))
            for scan in list_scans(source)
            if scan.label
        ]
    else:
        files = _files(source)
        labels = [path for path in files if is_label(path)]
        found = [_reference(path) for path in labels or files]
    if not found:
        raise ScanError(f"{source}: no reference segmentation found ({', '.join(IMAGE_SUFFIXES)}).")
    _refuse_doubles((reference.case, reference.path) for reference in found)
    return sorted(found, key=lambda reference: reference.case)


def match_files(
    folder: str | Path, references: Sequence[Reference], images: bool = False
) -> tuple[dict[str, Path], list[Path]]:
    """Find the file of each case, also in subfolders.

    Args:
        folder: of predictions, as MONAI's SaveImaged writes them with or without a folder per case; or one
            file.
        references: the cases.
        images: look for scans instead; label maps are skipped.

    Returns:
        ``{case: file}`` for the cases that have a file, and the files that belong to no case.

    Raises:
        AliceError: if no file belongs to a case, or two belong to the same one.
    """
    folder = Path(folder).expanduser()
    files = [path for path in _files(folder) if not (images and is_label(path))]
    by_name = {name: reference.case for reference in references for name in reference.names}
    by_name |= {reference.case: reference.case for reference in references}
    pairs, strangers = [], []
    for path in files:
        case = next((by_name[name] for name in possible_cases(path) if name in by_name), None)
        if case is None:
            strangers.append(path)
        else:
            pairs.append((case, path))
    _refuse_doubles(pairs)
    if not pairs:
        seen = f"{files[0].name!r}" if files else "no image file"
        raise ScanError(
            f"{folder}: no file is named after a case. It holds {seen}; the first case is "
            f"{references[0].case!r} ({references[0].path}). Name files CASE.nii.gz or CASE_seg.nii.gz."
        )
    return dict(pairs), strangers


def read_case_file(path: Path) -> Volume:
    """A volume with the spacing its file states.

    Raises:
        AliceError: naming the file, if it cannot be read, or its NIfTI zooms contradict its affine.
    """
    voxels, affine = read_volume(path)
    spacing = tuple(float(step) for step in nib.affines.voxel_sizes(affine))
    if path.name.lower().endswith((".nii", ".nii.gz")):
        # FLARE22's evaluation uses the zooms; their last digit matters to a surface exactly at the tolerance
        zooms = tuple(float(step) for step in nib.load(path).header.get_zooms()[:3])
        if not np.allclose(zooms, spacing, rtol=1e-3):
            raise ScanError(
                f"{path}: the header's zooms {zooms} mm and its affine's {spacing} mm differ; "
                "save the file again from a tool that sets both."
            )
        spacing = zooms
    return Volume(path, voxels, affine, spacing)


def on_grid_of(volume: Volume, reference: Volume) -> Volume:
    """The volume with its axes turned as those of the reference.

    Raises:
        AliceError: naming both files, unless they lie on the same grid then.
    """
    voxels, affine = turn_like(volume.voxels, volume.affine, reference.affine)
    spacing = tuple(float(step) for step in nib.affines.voxel_sizes(affine))
    if voxels is not volume.voxels and voxels.shape == reference.voxels.shape:
        volume = replace(volume, voxels=voxels, affine=affine, spacing=spacing)
    _refuse_other_grid(volume, reference)
    return volume


def _refuse_other_grid(volume: Volume, reference: Volume) -> None:
    if volume.voxels.shape != reference.voxels.shape:
        raise ScanError(
            f"{volume.path} has shape {volume.voxels.shape}, {reference.path} has {reference.voxels.shape}; "
            "write predictions on the grid of the original image (Invertd, or resample with nearest neighbour)."
        )
    if not is_same_place(volume.voxels.shape, volume.affine, reference.affine):
        apart = apart_mm(volume.voxels.shape, volume.affine, reference.affine)
        raise ScanError(
            f"{volume.path} and {reference.path} have the same shape but lie up to {apart:.3g} mm apart (origin, "
            "spacing or direction differ); write predictions with the original image's affine."
        )


def named_cases(references: Sequence[Reference], cases: Iterable[str]) -> list[Reference]:
    """The references of these cases.

    Raises:
        AliceError: naming a case that has no reference.
    """
    by_case: Mapping[str, Reference] = {reference.case: reference for reference in references}
    wanted = list(dict.fromkeys(cases))
    if unknown := [case for case in wanted if case not in by_case]:
        raise AliceError(f"No reference for the case(s) {unknown}; there are {sorted(by_case)[:5]} ...")
    return [by_case[case] for case in wanted]


def with_folds(references: Sequence[Reference], split: str | Path) -> list[Reference]:
    """The references with the folds of a bundle's folds.json, ``{"folds": [[case, ...], ...]}``.

    Raises:
        AliceError: if the file is not such a split, or a case is in none of its folds or in two.
    """
    try:
        folds = read_json(split, advice="Give a bundle's folds.json.")["folds"]
        listed = [(str(case), fold) for fold, cases in enumerate(folds) for case in cases]
    except (KeyError, TypeError) as error:
        raise AliceError(f'{split}: not a split, {{"folds": [[case, ...], ...]}} ({error!r}).') from error
    home = dict(listed)
    if twice := sorted(case for case, fold in listed if home[case] != fold):
        raise AliceError(f"{split}: in two folds: {', '.join(twice)}; a case is held back once.")
    folded = []
    for reference in references:
        found = [home[name] for name in possible_cases(reference.path) if name in home]
        if not found:
            raise AliceError(f"{split}: case '{reference.case}' ({reference.path}) is in none of its folds.")
        folded.append(replace(reference, fold=found[0]))
    return folded


def _reference(path: Path, fold: object = None, image_names: Sequence[str] = ()) -> Reference:
    name = stem(path)
    while (shorter := _POSTFIX.sub("", name)) != name:
        name = shorter
    case = _PREFIX.sub("", name)
    if fold is not None and (isinstance(fold, bool) or not isinstance(fold, int)):
        raise AliceError(f"{path}: the datalist gives fold {fold!r}; a fold is a whole number.")
    return Reference(case, path, fold, frozenset({stem(path), name, case, *image_names[:1]}))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ScanError(f"{source}: no such file or folder.")
    return scan_files(source)


def _refuse_doubles(pairs: Iterable[tuple[str, Path]]) -> None:
    first: dict[str, Path] = {}
    for case, path in pairs:
        if case in first:
            raise ScanError(
                f"{first[case]} and {path} both belong to case {case!r}. Keep one of them, or name them after their patients."
            )
        first[case] = path
