"""How far from its place in another patient the most similar token lies, in millimetres."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from custom.space import to_voxels, to_world

Features = Callable[[Tensor], Tensor]  # crops (B, 1, X, Y, Z) in [0, 1] -> tokens (B, N, C) in grid order


class PointAligner(Protocol):
    """What is asked of an aligner, to be measured on the same points."""

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Any: ...


class PlaceError(NamedTuple):
    """Errors over all (patient, other patient, point)."""

    mm: float  # of the most similar token of the other patient's crop
    chance_mm: float  # of a token drawn at random
    least_mm: float  # of the token nearest to the place: tokens are coarse
    by_patient: dict[str, float]  # of each patient whose points were looked for


def anatomical_points(store: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Centroids of the organs that are labelled in all scans.

    Returns:
        For every name the points (P, 3) in RAS mm, in one order; empty if no organ is labelled in all.
    """
    if not names or not all(store.has_label(name) for name in names):
        return {}
    found = {name: label_centroids(store, name) for name in names}
    common = sorted(set.intersection(*(set(centroids) for centroids in found.values())))
    return {name: np.array([found[name][v] for v in common]) for name in names} if common else {}


def label_centroids(store: Any, name: str) -> dict[int, np.ndarray]:
    """Label value -> centroid, RAS mm."""
    label = store.read_label_crop(name, (0, 0, 0), store.shape(name))
    affine = store.affine(name)
    values = [int(v) for v in np.unique(label) if v]
    return {v: to_world(affine, np.argwhere(label == v).mean(axis=0)) for v in values}


def place_error(
    features: Features,
    store: Any,
    points: dict[str, np.ndarray],
    crop_size: Sequence[int],
    patch: Sequence[int],
    read_crop: Callable[[str, np.ndarray], Tensor],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PlaceError:
    """Look for each point of a patient among the tokens of another patient's crop around the same point.

    Every crop is cut with an offset of its own, up to a quarter of its sides, and moved into its volume. So the place of
    a token within its crop does not tell the answer. Features are centred over all tokens and compared by cosine.

    Args:
        features: of a batch of crops.
        store: scans on one grid.
        points: for every scan the same P points, (P, 3) mm.
        crop_size: voxels along x, y, z.
        patch: voxels of a token along x, y, z.
        read_crop: a scan's name and a first voxel -> crop (1, X, Y, Z) in [0, 1].
        device: of the encoder.
        seed: of the offsets.
    """
    size, sides = np.array(crop_size), np.array(patch)
    grid = size // sides
    cells = np.stack(np.meshgrid(*[np.arange(g) for g in grid], indexing="ij"), axis=-1).reshape(-1, 3)
    centres = (cells + 0.5) * sides - 0.5  # voxels of a crop
    names = list(points)
    tokens, own, off_mm = (
        [],
        [],
        [],
    )  # by scan: (P, N, C), index of the token that holds the point, (P, N) mm from it
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, 13, number])
        voxels = to_voxels(store.affine(name), points[name])
        room = np.array(store.shape(name)) - size
        offsets = rng.integers(-(size // 4), size // 4 + 1, size=voxels.shape)
        starts = np.rint(voxels).astype(int) - size // 2 + offsets
        starts = np.clip(starts, np.minimum(0, room), np.maximum(0, room))
        crops = torch.stack([read_crop(name, start) for start in starts])
        tokens.append(features(crops.to(device)).float().cpu())
        inside = np.clip((voxels - starts + 0.5) // sides, 0, grid - 1).astype(int)
        own.append(np.ravel_multi_index(tuple(inside.T), tuple(grid)))
        apart = centres[None] - (voxels - starts)[:, None]  # (P, N, 3) voxels
        off_mm.append(np.linalg.norm(apart * np.array(store.spacing), axis=-1))
    stacked = torch.stack(tokens)  # (scans, P, N, C)
    unit = torch.nn.functional.normalize(stacked - stacked.mean(dim=(0, 1, 2)), dim=-1)
    rows: dict[str, list[float]] = {}
    chance, least = [], []
    number_of = np.arange(len(points[names[0]]))
    for a, b in itertools.permutations(range(len(names)), 2):
        if store.patient(names[a]) == store.patient(names[b]):
            continue
        query = unit[a][number_of, own[a]]  # (P, C)
        best = torch.einsum("pc,pnc->pn", query, unit[b]).argmax(dim=1).numpy()
        rows.setdefault(store.patient(names[a]), []).extend(off_mm[b][number_of, best].tolist())
        chance.append(off_mm[b].mean())
        least.append(off_mm[b].min(axis=1).mean())
    by_patient = {patient: float(np.mean(values)) for patient, values in rows.items()}
    every = [value for values in rows.values() for value in values]
    return PlaceError(float(np.mean(every)), float(np.mean(chance)), float(np.mean(least)), by_patient)


def aligner_error(aligner: PointAligner, store: Any, points: dict[str, np.ndarray]) -> dict[str, float]:
    """What an aligner errs on the same points, mm, by patient; points that it refuses are left out."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[float]] = {}
    for a, b in itertools.permutations(points, 2):
        if store.patient(a) == store.patient(b):
            continue
        for here, there in zip(points[a], points[b], strict=True):
            match = aligner.align(a, here, b, rng)
            if match.score > -1.0 and np.isfinite(match.point_mm).all():
                rows.setdefault(store.patient(a), []).append(float(np.linalg.norm(match.point_mm - there)))
    return {patient: float(np.mean(values)) for patient, values in rows.items()}
