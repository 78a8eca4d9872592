"""The axes of a scan turned towards Right, Anterior, Superior."""

from __future__ import annotations

import nibabel as nib
import numpy as np


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and swap axes, so that each points as nearly as possible to R, A, S. Nothing is interpolated.

    An oblique scan keeps its rotation in the affine.
    """
    flips = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(volume, flips)
    return turned, affine @ nib.orientations.inv_ornt_aff(flips, volume.shape)


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size in mm along x, y, z."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
