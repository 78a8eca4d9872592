"""A hash of the body's coarse appearance. It changes little when a scan is resampled or converted."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from custom.data.formats.voxels import Voxels
from custom.data.grid.body import body_mask
from custom.data.intake.scan_record import ScanRecord

_CELLS, _SOFT_HU = 8, (-300, 200)  # of the body hash: cells along each axis, and range of values (ours)


def fingerprint_body(
    record: ScanRecord, turned: np.ndarray, voxels: Voxels, spacing: np.ndarray, sample: np.ndarray
) -> None:
    """Fill in the extent of the body and its hash."""
    steps = [max(1, min(round(3.0 / s), n // _CELLS)) for s, n in zip(spacing, turned.shape, strict=True)]
    fine = voxels.scaled(turned[tuple(slice(s // 2, None, s) for s in steps)]).astype(np.float32)
    if record.modality != "CT":  # shift the values so that tissue is above BODY_HU
        fine = fine / max(float(np.percentile(sample, 99)), 1e-6) * 1500 - 700
    fine_mm = spacing * steps
    body, coarse = body_mask(fine, tuple(fine_mm), coarse_mm=min(6.0, float((fine_mm * fine.shape).min())))
    if not body.any():
        return
    cells = np.argwhere(body)
    low = cells.min(axis=0) * coarse
    high = np.minimum((cells.max(axis=0) + 1) * coarse, fine.shape)
    record.body_mm = np.round((high - low) * fine_mm, 1).tolist()
    record.body_hash = body_hash(fine[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])


def body_hash(body: np.ndarray) -> str:
    """Mean soft-tissue values in 8 x 8 x 8 cells of the body's box, one byte each, as base64.

    Args:
        body: HU (X, Y, Z), axes along R, A, S, cut to the body's box.
    """
    grid = np.clip(body, -1000, 400)
    for axis in range(3):
        grid = _means(grid, axis)
    low, high = _SOFT_HU
    grid = (np.clip(grid, low, high) - low) / (high - low) * 255
    return base64.b64encode(np.rint(grid).astype(np.uint8).tobytes()).decode("ascii")


def _means(grid: np.ndarray, axis: int) -> np.ndarray:
    """Averages over ``_CELLS`` equal intervals of an axis. A voxel that lies in two intervals counts in both, by its share."""
    count = grid.shape[axis]
    total = np.concatenate(
        [np.zeros_like(grid.take([0], axis)), grid.cumsum(axis=axis, dtype=np.float64)], axis
    )
    edges = np.linspace(0, count, _CELLS + 1)
    whole = np.minimum(edges.astype(int), count - 1)
    shape = [1, 1, 1]
    shape[axis] = -1
    part = (edges - whole).reshape(shape)
    at_edges = total.take(whole, axis) * (1 - part) + total.take(whole + 1, axis) * part
    return np.diff(at_edges, axis=axis) / (count / _CELLS)


def near_pairs(
    hashes: Sequence[str], others: Sequence[str], most_different: float, block: int = 2048
) -> list[tuple[int, int, float]]:
    """Pairs of similar body hashes.

    Args:
        hashes: of some scans; none may be empty.
        others: of other scans, or the same list.
        most_different: largest difference, which is 1 - correlation.
        block: ``block`` x ``block`` pairs are compared at a time.

    Returns:
        (index, index among others, difference) of every pair.
    """
    found: list[tuple[int, int, float]] = []
    if not hashes or not others:
        return found
    ours, theirs = _looks(hashes), _looks(others)
    for i in range(0, len(hashes), block):
        for j in range(0, len(others), block):
            apart = 1 - ours[i : i + block] @ theirs[j : j + block].T
            found += [
                (i + int(p), j + int(q), float(apart[p, q])) for p, q in np.argwhere(apart <= most_different)
            ]
    return found


def _looks(hashes: Sequence[str]) -> np.ndarray:
    """Hashes as vectors; the product of two is their correlation."""
    grids = np.stack([np.frombuffer(base64.b64decode(text), np.uint8) for text in hashes]).astype(np.float32)
    grids -= grids.mean(axis=1, keepdims=True)
    return grids / np.maximum(np.linalg.norm(grids, axis=1, keepdims=True), 1e-6)
