"""Where the patient is in a scan."""

from __future__ import annotations

import numpy as np

BODY_HU = -500.0  # half way between air and water: tissue lies above, air and lung below (ours)


def body_mask(
    volume_hu: np.ndarray,
    spacing: tuple[float, ...],
    coarse_mm: float = 6.0,
    threshold: float = BODY_HU,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The patient's body on a coarse grid: the largest piece of tissue, with its cavities filled.

    A morphological opening of 12 mm (ours) cuts off the table where it touches the skin.

    Args:
        volume_hu: (X, Y, Z).
        spacing: mm along x, y, z.
        coarse_mm: approximate size of a cell of the mask.
        threshold: values above it are tissue; for other modalities than CT see ``profiles.body_threshold``.

    Returns:
        Bool (cx, cy, cz), and the step in voxels along each axis: cell ``i`` is centred on voxel
        ``i * step + step // 2``.
    """
    from scipy import ndimage  # slow to import, and not needed to start a scan

    steps = tuple(max(1, round(coarse_mm / s)) for s in spacing)
    centres = tuple(slice(step // 2, None, step) for step in steps)
    tissue = volume_hu[centres] > threshold
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


def body_box(
    body: np.ndarray, steps: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First and one-past-last voxel of the body along each axis."""
    cells = np.argwhere(body)
    low = cells.min(axis=0) * steps
    high = np.minimum((cells.max(axis=0) + 1) * steps, shape)
    return _three(low), _three(high)


def crop_box(
    body: np.ndarray,
    steps: tuple[int, ...],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    margin_mm: float,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The body's box with a margin. It starts at a whole cell of the mask, so that the mask can be cut too."""
    low, high = body_box(body, steps, shape)
    margin = np.ceil(margin_mm / np.array(spacing)).astype(int)
    first = np.maximum((np.array(low) - margin) // steps, 0) * steps
    return _three(first), _three(np.minimum(np.array(high) + margin, shape))


def near_body(
    body: np.ndarray, steps: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]
) -> np.ndarray:
    """Bool (high - low): voxels of a box that lie in the body or in a cell beside it, so that the skin stays whole."""
    from scipy import ndimage

    wider = ndimage.binary_dilation(body, np.ones((3, 3, 3)))
    for axis, (step, first, end) in enumerate(zip(steps, low, high, strict=True)):
        wider = wider.take(np.minimum(np.arange(first, end) // step, wider.shape[axis] - 1), axis=axis)
    return wider


def _three(numbers: np.ndarray) -> tuple[int, int, int]:
    x, y, z = (int(n) for n in numbers)
    return x, y, z
