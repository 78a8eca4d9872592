"""Probe a frozen encoder: can it find a region in another patient, and do its tokens tell organs apart?"""

from __future__ import annotations

import itertools
import logging
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from custom.errors import AliceError
from custom.evaluation.place_error import anatomical_points, label_centroids, place_error
from custom.evaluation.statistics.significance import bootstrap_interval
from custom.space import to_voxels, to_world

logger = logging.getLogger(__name__)

Features = Callable[[Tensor], Tensor]  # crops (B, 1, X, Y, Z) in [0, 1] -> tokens (B, N, C) in grid order
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # ours; relative to the features' mean variance


class Volumes(Protocol):
    """What a probe needs from a collection of scans; a ``VolumeStore`` provides it."""

    def affine(self, name: str) -> np.ndarray: ...
    def shape(self, name: str) -> tuple[int, int, int]: ...
    def body_box_mm(self, name: str) -> np.ndarray: ...
    def body_voxels(self, name: str) -> np.ndarray: ...
    def patient(self, name: str) -> str: ...
    def has_label(self, name: str) -> bool: ...
    def read_crop(
        self, name: str, start: Sequence[int], size: Sequence[int], fill: int = -1024
    ) -> np.ndarray: ...
    def read_label_crop(self, name: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray: ...


class Retrieval(NamedTuple):
    """How often the same region of another patient is the nearest one."""

    accuracy: float
    chance: float
    regions: int
    by: str  # how the regions were placed: "labels" or "body"
    by_patient: dict[str, float]  # accuracy for the regions of each patient


class LinearProbe(NamedTuple):
    """How well a ridge regression predicts organ shares from frozen tokens."""

    correlation: float  # mean over organs of Pearson's r between true and predicted share per token
    by_organ: dict[int, float]
    resampled: tuple[float, ...] = ()  # the correlation again, with the test patients drawn anew


class TokenTable(NamedTuple):
    """Frozen tokens and what they show."""

    features: np.ndarray  # (n, C)
    shares: np.ndarray  # (n, 256), of each label in the token's patch
    owners: np.ndarray  # (n,), whose token it is


class Figure(NamedTuple):
    """A number with its interval over patients; nan where there are too few of them."""

    value: float
    low: float = math.nan
    high: float = math.nan


def region_points(
    store: Volumes, names: Sequence[str], counts: Sequence[int] = (2, 2, 3)
) -> tuple[dict[str, np.ndarray], str]:
    """A lattice of regions at the same anatomy of every scan.

    Its centre is the mean centroid of the organs that are labelled in all scans; without such organs it is
    the centre of the body's box. The lattice spans half of the median extent of the bodies (ours).

    Returns:
        For every name the points (R, 3) in RAS mm, and ``labels`` or ``body``.
    """
    boxes = {name: store.body_box_mm(name) for name in names}
    millimetres = {name: np.linalg.norm(store.affine(name)[:3, :3], axis=0) for name in names}
    extent = np.median([(boxes[n][1] - boxes[n][0]) * millimetres[n] for n in names], axis=0)
    extent[2] = min(extent[2], extent[0])  # a long scan does not spread the regions over the whole body
    axes = [
        ((np.arange(c) - (c - 1) / 2) / max(c - 1, 1)) * e / 2 for c, e in zip(counts, extent, strict=True)
    ]
    lattice = np.array(list(itertools.product(*axes)))  # (R, 3) mm

    anchors = _label_anchors(store, names)
    by = "labels" if anchors else "body"
    if not anchors:
        anchors = {n: to_world(store.affine(n), boxes[n].mean(axis=0)) for n in names}
    return {n: anchors[n] + lattice for n in names}, by


def _label_anchors(store: Volumes, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not all(store.has_label(name) for name in names):
        return {}
    centroids = {name: label_centroids(store, name) for name in names}
    common = set.intersection(*(set(c) for c in centroids.values()))
    return (
        {n: np.mean([c[v] for v in sorted(common)], axis=0) for n, c in centroids.items()} if common else {}
    )


def region_retrieval(
    features: Features,
    store: Volumes,
    points: dict[str, np.ndarray],
    crop_size: Sequence[int],
    window_hu: Sequence[float],
    by: str = "body",
    device: torch.device | str = "cpu",
) -> Retrieval:
    """Share of (region, patient, other patient) for which the other patient's nearest region is the same one.

    A region is the mean token of the crop around its point. Features are centred over all scans and regions
    and compared by cosine. Trust this figure while training: a collapsed encoder fails it, while one whose
    embeddings only have a small spread does not.

    Args:
        features: of a batch of crops.
        points: for every scan the same R regions, (R, 3) mm.
        crop_size, window_hu: as in training.
    """
    names = list(points)
    regions = len(next(iter(points.values())))
    vectors = []
    for name in names:
        voxels = np.rint(to_voxels(store.affine(name), points[name])).astype(int)
        crops = [
            crop_of(store, name, voxel - np.array(crop_size) // 2, crop_size, window_hu) for voxel in voxels
        ]
        vectors.append(features(torch.stack(crops).to(device)).mean(dim=1).float().cpu())
    stacked = torch.stack(vectors)  # (scans, R, C)
    centred = torch.nn.functional.normalize(stacked - stacked.mean(dim=(0, 1)), dim=-1)
    hits: dict[str, list[int]] = {}
    for a, b in itertools.permutations(range(len(names)), 2):
        if store.patient(names[a]) == store.patient(names[b]):
            continue
        nearest = (centred[a] @ centred[b].T).argmax(dim=1)
        hits.setdefault(store.patient(names[a]), []).append(int((nearest == torch.arange(regions)).sum()))
    tries = regions * sum(map(len, hits.values()))
    by_patient = {patient: sum(found) / (regions * len(found)) for patient, found in hits.items()}
    return Retrieval(sum(map(sum, hits.values())) / max(tries, 1), 1 / regions, regions, by, by_patient)


def token_table(
    features: Features,
    store: Volumes,
    names: Sequence[str],
    crop_size: Sequence[int],
    window_hu: Sequence[float],
    patch: Sequence[int],
    crops_per_scan: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TokenTable:
    """Frozen tokens and the share of every label in each.

    Crops are drawn around labelled voxels, half of them jittered by a quarter of the crop.
    """
    rng = np.random.default_rng([seed, 11])
    rows, shares, owners = [], [], []
    size = np.array(crop_size)
    for name in names:
        labelled = np.argwhere(store.read_label_crop(name, (0, 0, 0), store.shape(name)) > 0)
        if not len(labelled):
            continue
        centres = labelled[rng.integers(len(labelled), size=crops_per_scan)]
        starts = centres + rng.integers(-(size // 4), size // 4 + 1, size=(crops_per_scan, 3)) - size // 2
        crops = torch.stack([crop_of(store, name, start, crop_size, window_hu) for start in starts])
        rows.append(features(crops.to(device)).flatten(0, 1).float().cpu().numpy())
        owners += [store.patient(name)] * len(rows[-1])
        for start in starts:
            shares.append(_label_shares(store.read_label_crop(name, start, crop_size), patch))
    if not rows:
        raise AliceError(f"None of the scans {', '.join(names)} has a labelled voxel.")
    return TokenTable(np.concatenate(rows), np.concatenate(shares), np.array(owners))


def linear_probe(fit: TokenTable, test: TokenTable, organs: Sequence[int], draws: int = 0) -> LinearProbe:
    """Ridge regression of organ shares from tokens, fitted on some patients and scored on others.

    Args:
        fit, test: tables of :func:`token_table`, of different patients.
        organs: labels to score; labels that do not occur in both tables are left out.
        draws: how often the test patients are drawn anew, for an interval.

    Returns:
        Pearson's r by organ and its mean; the ridge is chosen on the last third of ``fit``.
    """
    used = [o for o in organs if fit[1][:, o].std() > 0 and test[1][:, o].std() > 0]
    if not used:
        raise AliceError(f"None of the labels {list(organs)} occurs in both the fitting and the test scans.")
    cut = 2 * len(fit[0]) // 3
    scores = [
        np.mean(
            _correlations(
                _ridge((fit[0][:cut], fit[1][:cut]), fit[0][cut:], used, ridge), fit[1][cut:][:, used]
            )
        )
        for ridge in RIDGES
    ]
    predicted = _ridge(fit[:2], test[0], used, RIDGES[int(np.argmax(scores))])
    by_organ = dict(zip(used, _correlations(predicted, test[1][:, used]), strict=True))
    again = _resampled(predicted, test.shares[:, used], test.owners, draws)
    return LinearProbe(float(np.mean(list(by_organ.values()))), by_organ, again)


def _resampled(predicted: np.ndarray, true: np.ndarray, owners: np.ndarray, draws: int) -> tuple[float, ...]:
    """Mean correlations over organs, of patients drawn with replacement; from sums by patient."""
    patients = sorted(set(owners.tolist()))
    sums = np.stack(
        [
            np.stack([np.ones_like(p), p, t, p * p, t * t, p * t]).sum(axis=1)
            for p, t in ((predicted[owners == who], true[owners == who].astype(float)) for who in patients)
        ]
    )  # (patients, 6, organs)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=draws)
    n, p, t, pp, tt, pt = np.einsum("dp,pso->sdo", weights, sums)
    spread = np.sqrt(np.maximum(pp - p * p / n, 0) * np.maximum(tt - t * t / n, 0))
    r = np.where(spread > 0, (pt - p * t / n) / np.maximum(spread, 1e-12), np.nan)
    return tuple(float(v) for v in np.nanmean(r, axis=1)) if draws else ()


def _ridge(fit: Sequence[np.ndarray], rows: np.ndarray, organs: Sequence[int], ridge: float) -> np.ndarray:
    x, y = fit[0].astype(np.float64), fit[1][:, organs].astype(np.float64)
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-8
    x = (x - mean) / spread
    gram = x.T @ x + ridge * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)))
    return (rows - mean) / spread @ weights + y.mean(axis=0)


def _correlations(predicted: np.ndarray, true: np.ndarray) -> list[float]:
    p, t = predicted - predicted.mean(axis=0), true - true.mean(axis=0)
    norm = np.sqrt((p**2).sum(axis=0) * (t**2).sum(axis=0))
    return [float(v) for v in np.where(norm > 0, (p * t).sum(axis=0) / np.maximum(norm, 1e-12), 0.0)]


def _label_shares(label: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """(X, Y, Z) labels -> (N, 256) share of each label in every token's patch, grid order."""
    px, py, pz = patch
    gx, gy, gz = (n // p for n, p in zip(label.shape, patch, strict=True))
    tokens = label.reshape(gx, px, gy, py, gz, pz).transpose(0, 2, 4, 1, 3, 5).reshape(gx * gy * gz, -1)
    shares = np.zeros((len(tokens), 256), dtype=np.float32)
    for value in np.unique(tokens):
        shares[:, value] = (tokens == value).mean(axis=1)
    return shares


def crop_of(
    store: Volumes, name: str, start: np.ndarray, size: Sequence[int], window_hu: Sequence[float]
) -> Tensor:
    """A crop (1, X, Y, Z) in [0, 1]; air outside of the volume."""
    low, high = window_hu
    ct = getattr(store, "profile", "ct") == "ct"
    crop = store.read_crop(name, [int(s) for s in start], size, fill=int(max(low, -1024)) if ct else int(low))
    return torch.from_numpy(np.clip((crop.astype(np.float32) - low) / (high - low), 0, 1))[None]


class EncoderProbe:
    """Region retrieval, place error, and with labels a linear probe, on a fixed set of held-back scans.

    Args:
        store: where the scans are read.
        names: held-back scans of at least two patients.
        crop_size, window_hu: as in training.
        device: where the encoder runs.
        fit_names: scans the linear probe is fitted on; None fits on every second labelled patient of
            ``names`` and scores on the others.
        crops_per_scan: for the linear probe.

    Attributes:
        by_patient: of the last measurement, ``{"retrieval": {patient: value}, "place_mm": {...}}``.
    """

    def __init__(
        self,
        store: Volumes,
        names: Sequence[str],
        crop_size: Sequence[int],
        window_hu: Sequence[float],
        device: torch.device | str = "cpu",
        fit_names: Sequence[str] | None = None,
        crops_per_scan: int = 8,
    ) -> None:
        self.store, self.names, self.crop_size, self.window_hu = store, list(names), crop_size, window_hu
        self.device, self.crops_per_scan = device, crops_per_scan
        self.by_patient: dict[str, dict[str, float]] = {}
        self.points, self.by = region_points(store, self.names)
        self.places = anatomical_points(store, self.names) or self.points
        labelled = [n for n in self.names if store.has_label(n)]
        patients = sorted({store.patient(n) for n in labelled})
        if fit_names is None:
            fit_names = [n for n in labelled if store.patient(n) in patients[::2]]
            labelled = [n for n in labelled if store.patient(n) in patients[1::2]]
        self.fit_names, self.test_names = list(fit_names), labelled

    def __call__(self, encoder: Callable) -> dict[str, float]:
        """The values of :meth:`measure`, without their intervals."""
        return {name: figure.value for name, figure in self.measure(encoder, intervals=False).items()}

    def raw(self, patch: Sequence[int]) -> dict[str, Figure]:
        """:meth:`measure` of intensities themselves: means of a token's sub-blocks, at most four along each side."""
        blocks = [next(b for b in (4, 3, 2, 1) if p % b == 0) for p in patch]

        class Intensities:
            def __call__(self, crops: Tensor) -> Any:
                pooled = F.avg_pool3d(crops, [p // b for p, b in zip(patch, blocks, strict=True)])
                grid = [n // b for n, b in zip(pooled.shape[2:], blocks, strict=True)]
                split = [n for pair in zip(grid, blocks, strict=True) for n in pair]
                tokens = pooled.reshape(len(crops), *split).permute(0, 1, 3, 5, 2, 4, 6)
                return types.SimpleNamespace(tokens=tokens.reshape(len(crops), math.prod(grid), -1))

        encoder: Any = Intensities()
        encoder.patch = tuple(patch)
        return self.measure(encoder)

    @torch.no_grad()
    def measure(self, encoder: Callable, intervals: bool = True) -> dict[str, Figure]:
        """What an encoder knows whose output has ``.tokens``.

        Returns:
            ``retrieval`` and its ``chance``; ``place_mm``, how far the most similar token of another patient lies from its
            place, with ``place_chance_mm`` (a token at random) and ``place_least_mm`` (the best token there is); and with
            labels ``linear``, the mean r.
        """

        def features(crops: Tensor) -> Tensor:
            return encoder(crops).tokens

        def read_crop(name: str, start: np.ndarray) -> Tensor:
            return crop_of(self.store, name, start, self.crop_size, self.window_hu)

        found = region_retrieval(
            features, self.store, self.points, self.crop_size, self.window_hu, self.by, self.device
        )
        patch = encoder.patch  # type: ignore[attr-defined]
        place = place_error(features, self.store, self.places, self.crop_size, patch, read_crop, self.device)
        self.by_patient = {"retrieval": dict(found.by_patient), "place_mm": dict(place.by_patient)}
        values = {
            "retrieval": _figure(found.accuracy, found.by_patient, intervals),
            "chance": Figure(found.chance),
            "place_mm": _figure(place.mm, place.by_patient, intervals),
            "place_chance_mm": Figure(place.chance_mm),
            "place_least_mm": Figure(place.least_mm),
        }
        if self.fit_names and self.test_names:
            tables = [
                token_table(
                    features,
                    self.store,
                    names,
                    self.crop_size,
                    self.window_hu,
                    patch,
                    self.crops_per_scan,
                    0,
                    self.device,
                )
                for names in (self.fit_names, self.test_names)
            ]
            both = (tables[0][1].max(axis=0) > 0) & (tables[1][1].max(axis=0) > 0)
            organs = [int(o) for o in np.flatnonzero(both) if o]
            if organs:
                read = linear_probe(tables[0], tables[1], organs, draws=2000 if intervals else 0)
                patients = len(set(tables[1].owners.tolist()))
                low_high = np.quantile(read.resampled, [0.025, 0.975]) if intervals and patients > 2 else ()
                values["linear"] = Figure(read.correlation, *(float(v) for v in low_high))
        return values


def _figure(value: float, by_patient: dict[str, float], intervals: bool) -> Figure:
    if not intervals:
        return Figure(value)
    return Figure(value, *bootstrap_interval(list(by_patient.values())))


def encoder_probe(store: Volumes, names: Sequence[str], **options: object) -> EncoderProbe | None:
    """A probe on the held-back scans; None if they come from fewer than two patients."""
    if len({store.patient(name) for name in names}) < 2:
        logger.warning(
            "No probe: it needs held-back scans of two patients, there are %d scan(s).", len(names)
        )
        return None
    return EncoderProbe(store, names, **options)  # type: ignore[arg-type]
