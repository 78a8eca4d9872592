"""Small CT-like volumes and labels for the acceptance test: a body with organs, on grids that are not straight."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def write_studies(folder: Path, count: int = 4) -> list[Path]:
    """Write ``study_<i>.nii.gz``, each of another size, spacing and pose.

    Args:
        folder: where to.
        count: how many.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i in range(count):
        rng = np.random.default_rng(i)
        shape = (43 + 2 * i, 47, 37 + i)
        centred = (np.stack(np.indices(shape), -1) + 0.5) / shape - 0.5
        volume = np.full(shape, -1000.0)
        body = (centred[..., :2] ** 2).sum(-1) < 0.45**2
        volume[body] = 30
        for value in (90, 160, 230):
            place = rng.uniform(-0.2, 0.2, 3)
            volume[((centred - place) ** 2).sum(-1) < 0.12**2] = value
        volume[body] += rng.normal(0, 12, int(body.sum()))
        path = folder / f"study_{i}.nii.gz"
        nib.save(nib.Nifti1Image(volume.astype(np.int16), _pose(i, shape)), path)
        written.append(path)
    return written


def _pose(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """Voxel to world, by turns: oblique, upside down, LPS as from most scanners, left-handed."""
    angle = 0.15 * (i % 2 == 0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    signs = [(1, 1, 1), (1, 1, -1), (-1, -1, 1), (-1, 1, 1)][i % 4]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(signs) * (1.9, 1.7, 2.9 + 0.2 * i))
    affine[:3, 3] = (37.0, -61.0, 113.0) - affine[:3, :3] @ (np.array(shape) / 2)
    return affine


def write_label(image: Path, values: list[int], path: Path) -> None:
    """A label on the grid of ``image`` with a blob of every value, so that no class is absent in training."""
    grid = nib.load(image)
    label = np.zeros(grid.shape, np.uint8)
    centred = (np.stack(np.indices(grid.shape), -1) + 0.5) / grid.shape - 0.5
    for n, value in enumerate(sorted(values)):  # a spiral round the long axis
        angle, height = 2.4 * n, 0.7 * ((n + 0.5) / len(values) - 0.5)
        place = (0.25 * np.cos(angle), 0.25 * np.sin(angle), height)
        label[((centred - place) ** 2).sum(-1) < 0.1**2] = value
    nib.save(nib.Nifti1Image(label, grid.affine), path)
