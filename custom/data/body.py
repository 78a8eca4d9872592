"""Where in a CT the patient is."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

BODY_HU = -500  # above: tissue; below: air and lung (spec 1.8)


def body_mask(
    volume_hu: np.ndarray, spacing: tuple[float, ...], coarse_mm: float = 6.0
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The patient's body on a coarse grid: the largest piece of tissue, its cavities filled.

    An opening of 12 mm (ours) cuts the table off where it touches the skin.

    Args:
        volume_hu: (X, Y, Z).
        spacing: mm along x, y, z.
        coarse_mm: about how large a cell of the mask is.

    Returns:
        Bool (cx, cy, cz), and the step in voxels along each axis: cell ``i`` is centred on voxel
        ``i * step + step // 2``.
    """
    steps = tuple(max(1, round(coarse_mm / s)) for s in spacing)
    centres = tuple(slice(step // 2, None, step) for step in steps)
    tissue = volume_hu[centres] > BODY_HU
    size = tuple(max(1, round(12.0 / (step * s))) for step, s in zip(steps, spacing, strict=True))
    opened = ndimage.binary_opening(np.pad(tissue, 2, mode="edge"), np.ones(size))[2:-2, 2:-2, 2:-2]
    pieces, count = ndimage.label(opened if opened.any() else tissue)
    if count == 0:
        return np.zeros_like(tissue), steps
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    body = pieces == sizes.argmax()
    for z in range(body.shape[2]):  # lungs and bowel gas belong to the body
        body[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
    return body, steps
