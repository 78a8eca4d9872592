"""Synthetic CT-like torsos with labelled organs and an exact, dense correspondence between all of them.

Every phantom is the same canonical body, deformed by a smooth map of its own. So anatomy is a function of the
canonical coordinate: two voxels of two subjects with equal coordinates are the same place. (Only the loops of
small bowel and the content of the bowel are drawn anew for each subject.)
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from custom.data.phantom.correspondence import FoundPoints, find_places
from custom.data.phantom.imaging import PHASES, acquire
from custom.data.phantom.organs import paint_organs
from custom.data.phantom.placement import COVERAGES, add_arms_and_table, place_scan
from custom.data.phantom.pose import draw_pose, sample_knots, spread_knots
from custom.data.phantom.shapes import FLARE22_ORGANS, LABEL_OF_TISSUE, ORGANS_OF, Canvas
from custom.data.phantom.surroundings import paint_surroundings
from custom.errors import AliceError
from custom.files import replacing, write_text

__all__ = [
    "COVERAGES",
    "FLARE22_ORGANS",
    "PHASES",
    "FoundPoints",
    "Phantom",
    "find_canonical",
    "make_phantom",
    "read_canonical",
    "write_cohort",
]

SIZES = ("standard", "small")
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LPI", "RAI", "ASR")


class Phantom(NamedTuple):
    """One synthetic subject; the array axes point towards Right, Anterior, Superior.

    Attributes:
        image: int16 (X, Y, Z), HU.
        label: uint8 (X, Y, Z), 0 or one of the 13 labels asked for.
        canonical: float32 (X, Y, Z, 3), coordinates in mm of every voxel in the body shared by all subjects.
        affine: float64 (4, 4), voxel to world mm (RAS).
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    canonical: NDArray[np.float32]
    affine: NDArray[np.float64]


def make_phantom(
    seed: int | Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    phase: str | None = None,
    coverage: str | None = None,
    size: str = "standard",
    labels: str = "flare22",
) -> Phantom:
    """Make one subject; equal arguments give equal arrays.

    Args:
        seed: a number, or several (a cohort uses ``[seed, index]``).
        shape: voxels X, Y, Z; by default about 160 x 160 x 128, or 96 x 80 x 80 for a small one.
        spacing: voxel size in mm; by default it follows from the field of view.
        phase: one of ``PHASES``; drawn by default.
        coverage: a key of ``COVERAGES``, the part of the trunk in the scan; drawn by default, but "full" for a
            small one. "full" holds all 13 organs. If both ``shape`` and ``spacing`` are given, it only decides
            where the middle of the scan lies.
        size: "standard", or "small" for tests (3 to 5 mm voxels).
        labels: "flare22" or "btcv": which organs are labelled, and in which order.

    Returns:
        Image, label, canonical coordinates and affine.

    Raises:
        AliceError: if phase, coverage, size or labels are unknown, the shape is below 24 voxels, or the spacing not above 0.
    """
    return _make(seed, shape, spacing, phase, coverage, size, labels)[0]


def find_canonical(phantom: Phantom, canonical_mm: ArrayLike) -> FoundPoints:
    """Find where canonical coordinates lie in a phantom.

    Args:
        phantom: the subject to search; only ``canonical`` and ``affine`` are read.
        canonical_mm: (N, 3), for example ``other.canonical[voxels]``.

    Returns:
        ``points_mm`` (N, 3) in world mm and ``residual_mm`` (N,): near 0 if the place is in the scan, more than a
        millimetre if it lies outside of the field of view.

    Raises:
        AliceError: if ``canonical_mm`` is not (N, 3).
    """
    return find_places(phantom.canonical, phantom.affine, canonical_mm)


def write_cohort(
    folder: str | os.PathLike[str],
    n: int = 24,
    seed: int = 0,
    *,
    size: str = "standard",
    canonical: bool = True,
    labels: str = "flare22",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``n`` subjects in the layout of FLARE22 or BTCV. Subjects that are complete are not written again.

    Writes ``images/FLARE22_Tr_0001_0000.nii.gz`` (int16 HU) and ``labels/FLARE22_Tr_0001.nii.gz`` (uint8), or
    ``imagesTr/img0001.nii.gz`` and ``labelsTr/label0001.nii.gz``; the maps ``canonical/FLARE22_Tr_0001.npz`` or
    ``canonical/img0001.npz`` (see :func:`read_canonical`); and ``README.txt``. Phase, field of view, voxel size, body and
    the order of the files' axes vary.

    Args:
        folder: where to write; made if absent.
        n: number of subjects. More can be added later; the first ones stay the same.
        seed: seed of the cohort.
        size: "standard" or "small", see :func:`make_phantom`.
        canonical: whether to write the coordinate maps (about 1 MB each).
        labels: "flare22" or "btcv": the organs, their order, and the layout of the files.
        progress: called with (subjects done, n) after each.

    Returns:
        Paths of the n images.

    Raises:
        AliceError: if ``n`` is below 1, ``size`` or ``labels`` is unknown, or the folder holds a cohort with another seed,
            size or labels.
    """
    if n < 1:
        raise AliceError(f"A cohort needs at least 1 subject, got n={n}.")
    _check_choice("size", size, SIZES)
    _check_choice("labels", labels, tuple(ORGANS_OF))
    folder = Path(folder)
    _claim_folder(folder, seed, size, labels)
    images = []
    for index in range(n):
        image_path, label_path, canonical_path = (folder / p for p in _paths(labels, index + 1))
        wanted = [image_path, label_path] + ([canonical_path] if canonical else [])
        if not all(path.exists() for path in wanted):
            _write_subject(
                seed, index, size, labels, image_path, label_path, canonical_path if canonical else None
            )
        images.append(image_path)
        if progress is not None:
            progress(index + 1, n)
    return images


def read_canonical(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Canonical coordinates (X, Y, Z, 3) in mm of every voxel of a written image, in the file's axis order.

    The file holds ``knots`` (samples about 8 mm apart) and ``shape``. The map is defined as the cubic spline through the
    knots, so this agrees with the phantom to float32 rounding (below 0.001 mm).
    """
    with np.load(path) as stored:
        return spread_knots(stored["knots"], tuple(int(size) for size in stored["shape"]))


def _make(
    seed: int | Sequence[int],
    shape: Sequence[int] | None,
    spacing: Sequence[float] | None,
    phase: str | None,
    coverage: str | None,
    size: str,
    labels: str,
) -> tuple[Phantom, NDArray[np.float32]]:
    """A phantom and the knots of its map."""
    _check_choice("size", size, SIZES)
    _check_choice("labels", labels, tuple(ORGANS_OF))
    if phase is not None:
        _check_choice("phase", phase, PHASES)
    if coverage is not None:
        _check_choice("coverage", coverage, tuple(COVERAGES))
    # separate random streams: the body of a subject does not depend on its phase
    streams = np.random.SeedSequence(seed).spawn(4)
    body_rng, scan_rng, content_rng, image_rng = (np.random.default_rng(stream) for stream in streams)

    pose = draw_pose(body_rng)
    drawn_phase = str(scan_rng.choice(PHASES, p=[0.15, 0.2, 0.5, 0.15]))
    drawn_coverage = str(scan_rng.choice(list(COVERAGES), p=[0.55, 0.15, 0.15, 0.15]))
    coverage = coverage or ("full" if size == "small" else drawn_coverage)
    voxels, spacing_mm, affine, isocentre = place_scan(pose, coverage, shape, spacing, size, scan_rng)

    knots = sample_knots(pose, voxels, affine, isocentre)
    canonical = spread_knots(knots, voxels)
    canvas = Canvas(canonical)
    paint_surroundings(canvas, content_rng)
    paint_organs(canvas, content_rng)
    label = LABEL_OF_TISSUE[labels][canvas.tissue]
    add_arms_and_table(canvas.tissue, affine, isocentre, pose, scan_rng)
    image = acquire(
        canvas.tissue, spacing_mm, phase or drawn_phase, (pose.width_mm + pose.depth_mm) / 2, image_rng
    )
    return Phantom(image, label, canonical, affine), knots


def _write_subject(
    seed: int,
    index: int,
    size: str,
    labels: str,
    image_path: Path,
    label_path: Path,
    canonical_path: Path | None,
) -> None:
    phantom, map_knots = _make([seed, index], None, None, None, None, size, labels)
    code = np.random.default_rng([seed, index, 1]).choice(ORIENTATIONS, p=[0.34, 0.22] + [0.088] * 5)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(str(code))
    )
    affine = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.image.shape)
    image, label, knots = (
        nib.orientations.apply_orientation(array, turn) for array in (phantom.image, phantom.label, map_knots)
    )
    if canonical_path is not None:
        with replacing(canonical_path) as draft, open(draft, "wb") as file:
            np.savez_compressed(file, knots=knots, shape=np.array(image.shape))
    for path, array in ((label_path, label), (image_path, image)):
        nifti = nib.Nifti1Image(np.ascontiguousarray(array), affine)
        nifti.header.set_xyzt_units("mm")
        with replacing(path) as draft:
            draft.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=3, mtime=0))


def _paths(labels: str, number: int) -> tuple[str, str, str]:
    """Image, label and canonical map of a subject, relative to the cohort's folder."""
    if labels == "btcv":
        name = f"img{number:04d}"
        return f"imagesTr/{name}.nii.gz", f"labelsTr/label{number:04d}.nii.gz", f"canonical/{name}.npz"
    name = f"FLARE22_Tr_{number:04d}"
    return f"images/{name}_0000.nii.gz", f"labels/{name}.nii.gz", f"canonical/{name}.npz"


def _claim_folder(folder: Path, seed: int, size: str, labels: str) -> None:
    """Write README.txt, which says what the folder holds. Refuse a folder that holds another cohort."""
    image, label, _ = (str(Path(p).parent) + "/" for p in _paths(labels, 1))
    of = "" if labels == "flare22" else f", labels {labels}"
    text = (
        f"Synthetic phantoms (not patients): alice phantom, seed {seed}, size {size}{of}.\n\n"
        f"CT-like torsos painted from formulas, in the layout and label order of {labels.upper()}:\n"
        + "\n".join(f"  {label} {organ}" for label, organ in enumerate(ORGANS_OF[labels], start=1))
        + f"\n\n{image:<11} int16, HU\n{label:<11} uint8, 0 is background\n"
        "canonical/  coordinates (mm) in the body shared by all subjects: equal coordinates, same place.\n"
        "            Read with custom.data.phantom.cohort.read_canonical; same voxels as the image.\n\n"
        "Results on these files show that software works. They say nothing about patients.\n"
    )
    readme = folder / "README.txt"
    if readme.exists():
        first = readme.read_text(encoding="utf-8").partition("\n")[0]
        if first != text.partition("\n")[0]:
            raise AliceError(f"{folder} holds other files ({first!r}): choose an empty folder.")
        return
    write_text(readme, text)


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise AliceError(f"Unknown {what} {value!r}: choose one of {', '.join(choices)}.")
