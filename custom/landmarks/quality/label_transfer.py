"""Match points of a structure in another scan: do they land in the same structure?"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from custom.data.store.volume_store import VolumeStore
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.quality.alignment_errors import Figures, Pair, query_aligner
from custom.space import to_voxels, to_world


class LabelFigures(NamedTuple):
    """For each structure (label value): share of points inside it, their distances, and those of centroids."""

    inside: dict[int, Figures]
    distance_mm: dict[int, Figures]
    centroid_mm: dict[int, Figures]


def label_transfer(
    aligner: Aligner,
    store: VolumeStore,
    pairs: Sequence[Pair],
    num_points: int = 20,
    seed: int = 0,
    labels: Sequence[int] | None = None,
) -> LabelFigures:
    """Match points of each structure, and measure where they land.

    Args:
        aligner: to judge.
        store: with labels.
        pairs: of labelled scans.
        num_points: per structure and pair.
        seed: of the points.
        labels: values to use; None for all that both scans of a pair have.

    Returns:
        For each structure: 1 for a point that landed in it, else 0; the point's distance to it in mm, 0
        inside; the distance in mm between the centroid of the matched points and the key's centroid of the
        structure. Points without an answer count as missed and infinitely far, and take no part in centroids.
    """
    found: tuple[dict[int, list], dict[int, list], dict[int, list]] = ({}, {}, {})
    read = functools.lru_cache(maxsize=2)(
        lambda name: store.read_label_crop(name, (0, 0, 0), store.shape(name))
    )
    for index, (name_q, name_k) in enumerate(pairs):
        label_q, label_k = read(name_q), read(name_k)
        shared = sorted((set(np.unique(label_q)) & set(np.unique(label_k))) - {0})
        for value in shared if labels is None else [v for v in shared if v in labels]:
            rng = np.random.default_rng([seed, index, int(value)])
            inside_q = np.argwhere(label_q == value)
            points = to_world(store.affine(name_q), inside_q[rng.integers(len(inside_q), size=num_points)])
            answers = query_aligner(aligner, (name_q, name_k), points, seed)
            off = distance_to_structure(label_k == value, store.affine(name_k), answers.points_mm)
            answered = np.isfinite(answers.points_mm).all(axis=1)
            centre_k = to_world(store.affine(name_k), np.argwhere(label_k == value).mean(axis=0))
            # the centroid of the drawn points differs from the structure's by chance: subtract that
            chance = points.mean(axis=0) - to_world(store.affine(name_q), inside_q.mean(axis=0))
            centroid = np.array([math.inf])
            if answered.any():
                centroid = np.array(
                    [np.linalg.norm(answers.points_mm[answered].mean(axis=0) - chance - centre_k)]
                )
            for table, values in zip(found, ((off == 0).astype(float), off, centroid), strict=True):
                table.setdefault(int(value), []).append(values)
    return LabelFigures(*({value: Figures(rows) for value, rows in table.items()} for table in found))


def distance_to_structure(
    mask: NDArray[np.bool_], affine: NDArray[np.float64], points_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of points (N, 3) to the nearest voxel centre of a structure in mm; 0 for points in its voxels.

    Infinite for points that are nan.
    """
    from scipy.spatial import cKDTree

    out = np.full(len(points_mm), np.inf)
    known = np.isfinite(points_mm).all(axis=1)
    voxels = np.argwhere(mask)
    if not known.any() or not len(voxels):
        return out
    out[known] = cKDTree(to_world(affine, voxels)).query(points_mm[known])[0]
    own = np.rint(to_voxels(affine, points_mm[known])).astype(int)
    valid = ((own >= 0) & (own < mask.shape)).all(axis=1)
    hit = np.zeros(len(own), bool)
    hit[valid] = mask[tuple(own[valid].T)]
    out[np.flatnonzero(known)[hit]] = 0.0
    return out
