"""Aligners: a point of one scan found in another, in world millimetres."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from custom.landmarks.consensus import FEW_ANCHORS, PairMap, fit_pair_map, refine_pair_map
from custom.landmarks.embedding_folder import EmbeddingFolder
from custom.landmarks.geometry import to_voxels, to_world
from custom.landmarks.matching import Matches, match_points
from custom.landmarks.near import match_near
from custom.landmarks.search import REFUSED, Method
from custom.landmarks.searchable import query_cells
from custom.landmarks.stored_embedding import StoredEmbedding

logger = logging.getLogger(__name__)

MIN_SUPPORT = (
    0.12  # ours: scans of unlike regions reach 0.09, of like ones 0.14 and more; see the SAM bundle's docs
)


class ScanGeometry(Protocol):
    """What an aligner may ask of a collection of scans (a ``VolumeStore`` answers it)."""

    def affine(self, name: str) -> np.ndarray: ...
    def body_box_mm(self, name: str) -> np.ndarray: ...
    def body_voxels(self, name: str) -> np.ndarray: ...


class Match(NamedTuple):
    """Where a point lies in the other scan, and how sure the aligner is (1 is best)."""

    point_mm: np.ndarray  # (3,) RAS
    score: float


class Aligner(Protocol):
    """One interface for every way to find the same anatomy."""

    name: str
    threshold: float  # matches that score less are not to be used

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        """The point of ``scan_k`` that corresponds to ``point_mm`` of ``scan_q``."""
        ...


class CoordinateAligner:
    """The same relative position in the body's box; needs no weights (ours).

    It is right where two scans show the same stretch of the body, and wrong by centimetres where they do not.
    """

    name = "coordinate"
    threshold = -1.0

    def __init__(self, scans: ScanGeometry) -> None:
        self.scans = scans

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        box_q, box_k = self.scans.body_box_mm(scan_q), self.scans.body_box_mm(scan_k)
        relative = (to_voxels(self.scans.affine(scan_q), point_mm) - box_q[0]) / (box_q[1] - box_q[0])
        return Match(to_world(self.scans.affine(scan_k), box_k[0] + relative * (box_k[1] - box_k[0])), 1.0)


class RandomAligner:
    """Any point of the other body: the negative control."""

    name = "random"
    threshold = -1.0

    def __init__(self, scans: ScanGeometry) -> None:
        self.scans = scans

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        voxels = self.scans.body_voxels(scan_k)
        return Match(to_world(self.scans.affine(scan_k), voxels[rng.integers(len(voxels))]), 1.0)


class AffineAligner:
    """One affine map per pair of scans, registered with ITK on volumes of about 6 mm, kept once found (ours).

    The maps are a point's way through twelve numbers: they carry it to the right region, not to the organ.

    Args:
        scans: the ``VolumeStore``.
        spacing_mm: about how large the voxels are that are registered.
        max_pairs: maps kept.
    """

    name = "affine"
    threshold = -1.0

    def __init__(self, scans: Any, *, spacing_mm: float = 6.0, max_pairs: int = 10_000) -> None:
        self.scans, self.spacing_mm, self.max_pairs = scans, spacing_mm, max_pairs
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"scans": self.scans, "spacing_mm": self.spacing_mm, "max_pairs": self.max_pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        return Match(to_world(self.transform(scan_q, scan_k), point_mm), 1.0)

    def _open(self) -> None:
        self.transform = functools.lru_cache(self.max_pairs)(self._register)
        self._coarse = functools.lru_cache(64)(self._read_coarse)

    def _register(self, scan_q: str, scan_k: str) -> np.ndarray:
        """(4, 4), mm of Q to mm of K; the way back is this one's inverse."""
        if scan_k < scan_q:
            return np.linalg.inv(self.transform(scan_k, scan_q))
        centres = [
            to_world(self.scans.affine(n), self.scans.body_box_mm(n).mean(axis=0)) for n in (scan_q, scan_k)
        ]
        return register_affine(*self._coarse(scan_q), *self._coarse(scan_k), centres[0], centres[1])

    def _read_coarse(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Means over blocks of voxels, soft tissue in [0, 1], and their affine."""
        affine, shape = self.scans.affine(name), self.scans.shape(name)
        step = np.maximum(1, np.rint(self.spacing_mm / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
        size = np.array(shape) // step
        hu = self.scans.read_crop(name, (0, 0, 0), size * step)
        blocks = np.clip((hu.astype(np.float32) + 500.0) / 800.0, 0, 1)
        blocks = blocks.reshape(size[0], step[0], size[1], step[1], size[2], step[2]).mean(axis=(1, 3, 5))
        coarse = affine.copy()
        coarse[:3, :3] = affine[:3, :3] * step
        coarse[:3, 3] = to_world(affine, (step - 1) / 2)
        return blocks, coarse


def register_affine(
    volume_q: np.ndarray,
    affine_q: np.ndarray,
    volume_k: np.ndarray,
    affine_k: np.ndarray,
    centre_q: np.ndarray,
    centre_k: np.ndarray,
) -> np.ndarray:
    """The affine map that takes Q's world mm to K's, by mean squares, from coarse to fine.

    Args:
        volume_q: (X, Y, Z) in [0, 1].
        affine_q: voxel to world mm.
        volume_k: the other.
        affine_k: of the other.
        centre_q: (3,) mm, the body's middle: the search starts with one on the other.
        centre_k: the same in K.

    Returns:
        (4, 4).
    """
    import itk  # takes seconds to load: only who asks for it waits

    fixed, moving = (_itk_image(itk, v, a) for v, a in ((volume_q, affine_q), (volume_k, affine_k)))
    kind = type(fixed)
    start = itk.AffineTransform[itk.D, 3].New()
    start.SetCenter([float(c) for c in centre_q])
    start.SetTranslation([float(c) for c in centre_k - centre_q])

    metric = itk.MeanSquaresImageToImageMetricv4[kind, kind].New()
    scales = itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New(Metric=metric)
    optimizer = itk.RegularStepGradientDescentOptimizerv4[itk.D].New()
    optimizer.SetScalesEstimator(scales)
    optimizer.SetLearningRate(4.0)
    optimizer.SetDoEstimateLearningRateOnce(False)
    optimizer.SetDoEstimateLearningRateAtEachIteration(False)
    optimizer.SetMinimumStepLength(0.05)
    optimizer.SetRelaxationFactor(0.6)
    optimizer.SetNumberOfIterations(80)
    optimizer.SetReturnBestParametersAndValue(True)

    registration = itk.ImageRegistrationMethodv4[kind, kind].New(
        FixedImage=fixed, MovingImage=moving, Metric=metric, Optimizer=optimizer, InitialTransform=start
    )
    registration.SetNumberOfLevels(2)
    registration.SetShrinkFactorsPerLevel([2, 1])
    registration.SetSmoothingSigmasPerLevel([2, 1])
    registration.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    registration.SetNumberOfWorkUnits(1)
    registration.Update()
    parameters = np.array(registration.GetTransform().GetParameters())
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + centre_q - matrix[:3, :3] @ centre_q
    return matrix


def _itk_image(itk: Any, volume: np.ndarray, affine: np.ndarray) -> Any:
    """World mm are RAS here and LPS at ITK's own readers; to a registration they are just coordinates."""
    image = itk.image_from_array(np.ascontiguousarray(volume.T.astype(np.float32)))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in affine[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3] / spacing)))
    return image


class SamAligner:
    """The point whose embedding is most alike (SAM; spec 2.4), from embeddings made beforehand.

    With ``consensus`` the scans' matches first agree on one smooth map, which places found near it correct, and a point is
    looked for near where that takes it; without, every point for itself. Either way a pair of scans whose matches do not agree has no common anatomy, and
    is refused: single scores do not tell (strangers reach 0.85). Safe to use from many workers: files are opened per
    process.

    Args:
        scans: whose embeddings these are.
        embeddings: folder that ``alice embed`` wrote.
        threshold: score that a match needs; by default what was calibrated for the weights, with consensus; else 0.7
            (Alice).
        max_cycle_mm: refuse matches that come back farther from where they started; None asks no match back.
        method: of single matches, without consensus; see :func:`custom.landmarks.matching.match_points`.
        consensus: see :mod:`custom.landmarks.consensus`.
        min_support: share of matches that must agree on the map (ours).
        max_pairs: maps kept.

    Raises:
        EmbeddingError: if a scan has no embedding, or one of other voxels or weights.
        ValueError: for a threshold that would accept what is refused.
    """

    def __init__(
        self,
        scans: Any,
        embeddings: EmbeddingFolder | str | Path,
        threshold: float | None = None,
        *,
        max_cycle_mm: float | None = None,
        method: Method = "fast",
        consensus: bool = True,
        min_support: float = MIN_SUPPORT,
        max_pairs: int = 1000,
    ) -> None:
        self.embeddings = (
            embeddings if isinstance(embeddings, EmbeddingFolder) else EmbeddingFolder(embeddings)
        )
        self.embeddings.require(scans)
        known = self.embeddings.threshold if consensus else None  # it was calibrated so
        self.threshold = float(threshold if threshold is not None else 0.7 if known is None else known)
        if not REFUSED < self.threshold <= 1:
            raise ValueError(f"threshold must be above {REFUSED:g} and at most 1, got {self.threshold}.")
        self.max_cycle_mm, self.method = max_cycle_mm, method
        self.consensus, self.min_support, self.max_pairs = consensus, min_support, max_pairs
        self.name = "sam" if consensus else "sam_nearest"
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in self.__dict__.items() if k not in ("pair_map", "few_map", "support", "blocks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        """As :meth:`Aligner.align`; score -1 for a match refused; nan for a point off the body.

        With consensus, a map of few matches is corrected about this one point: that costs less than one of the whole
        scans, and what a pair of crops is does not depend on which pairs were drawn before.
        """
        matches = self._match_one(scan_q, point_mm, scan_k)
        point, score = matches.points_mm[0], float(matches.scores[0])
        if self.max_cycle_mm is not None and score >= self.threshold:
            back = self._match_one(scan_k, point, scan_q).points_mm[0]
            near = np.linalg.norm(back - point_mm) <= self.max_cycle_mm  # False for nan
            score = score if near else REFUSED
        return Match(point, score)

    def align_all(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """As :meth:`align` for each of (N, 3) points, without the way back."""
        each = [self._match_one(scan_q, point, scan_k) for point in points_mm]
        return Matches(*(np.concatenate(part) for part in zip(*each, strict=True)))

    def match(self, scan_q: str, points_mm: np.ndarray, scan_k: str) -> Matches:
        """Many points (N, 3) at once; every match is given with its score, however low."""
        query, key = self.embeddings[scan_q], self.embeddings[scan_k]
        if not self.consensus:
            found = match_points(points_mm, query, key, method=self.method, refine=True)
            return found if self.support(scan_q, scan_k) >= self.min_support else _refused(found)
        return self._match_by(self.pair_map(scan_q, scan_k), points_mm, query, key)

    def _match_one(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Matches:
        if not self.consensus:
            return self.match(scan_q, point_mm, scan_k)
        if not query_cells(np.reshape(point_mm, (1, 3)), self.embeddings[scan_q])[1][0]:
            return Matches(np.full((1, 3), np.nan), np.array([REFUSED]))  # before a map is fitted for it
        query, key = self.embeddings[scan_q], self.embeddings[scan_k]
        pair = self.few_map(scan_q, scan_k)
        if pair.support >= self.min_support:  # else it is refused
            pair = refine_pair_map(pair, query, key, about_mm=point_mm)
        return self._match_by(pair, point_mm, query, key)

    def _match_by(
        self, pair: PairMap, points_mm: np.ndarray, query: StoredEmbedding, key: StoredEmbedding
    ) -> Matches:
        points = np.atleast_2d(np.asarray(points_mm, dtype=float))
        matches = match_near(points, pair(points), query, key)
        return matches if pair.support >= self.min_support else _refused(matches)

    def _open(self) -> None:
        self.pair_map = functools.lru_cache(self.max_pairs)(self._fit)
        self.few_map = functools.lru_cache(self.max_pairs)(self._fit_few)
        self.support = functools.lru_cache(100 * self.max_pairs)(self._agree)
        self.blocks = functools.lru_cache(16)(lambda name: self.embeddings[name].blocks)

    def _fit(self, scan_q: str, scan_k: str) -> PairMap:
        pair = fit_pair_map(self.blocks(scan_q), self.blocks(scan_k))
        if pair.support < self.min_support:
            return pair  # to be refused
        return refine_pair_map(pair, self.embeddings[scan_q], self.embeddings[scan_k])

    def _fit_few(self, scan_q: str, scan_k: str) -> PairMap:
        return fit_pair_map(self.blocks(scan_q), self.blocks(scan_k), anchors=FEW_ANCHORS)

    def _agree(self, scan_q: str, scan_k: str) -> float:
        """Share of a few matches that agree on an affine map; the same few as :meth:`align` fits one by."""
        return self.few_map(scan_q, scan_k).support


def _refused(matches: Matches) -> Matches:
    return Matches(matches.points_mm, np.full(len(matches.scores), REFUSED))


class Calibration(NamedTuple):
    """A score to ask for, and what led to it.

    Attributes:
        threshold: the lowest score at which matches come back near enough, often enough; None if there is none.
        rows: per candidate ``score``, the share of ``accepted`` matches, the share of those ``within`` reach, and
            their ``points``.
    """

    threshold: float | None
    rows: list[dict[str, float]]


def calibrate_threshold(
    aligner: SamAligner,
    scans: Any,
    names: Sequence[str],
    *,
    num_pairs: int = 40,
    num_points: int = 25,
    reach_mm: float = 10.0,
    share: float = 0.9,
    seed: int = 0,
) -> Calibration:
    """The score at which enough matches between held-back scans come back to where they started (spec 1.8).

    Args:
        aligner: whose scores they are; its own threshold plays no part.
        scans: bodies, to draw points from.
        names: scans held back from training, two at least.
        num_pairs: ordered pairs to draw.
        num_points: points a pair.
        reach_mm: how far from the start a match may come back.
        share: of the matches of any score above the threshold that must.
        seed: of the draws.

    Returns:
        The threshold, to be stored with the weights, and the table.

    Raises:
        ValueError: if they are of fewer than two patients.
    """
    pairs = [(q, k) for q in names for k in names if scans.patient(q) != scans.patient(k)]
    if not pairs:
        raise ValueError(f"A threshold is calibrated on pairs of two patients' scans; got {list(names)}.")
    rng = np.random.default_rng(seed)
    scores, errors = [], []
    for _ in range(num_pairs):
        name_q, name_k = pairs[rng.integers(len(pairs))]
        voxels = scans.body_voxels(name_q)
        points = to_world(scans.affine(name_q), voxels[rng.integers(len(voxels), size=num_points)])
        there = aligner.align_all(name_q, points, name_k)
        back = aligner.align_all(name_k, there.points_mm, name_q)
        scores.append(there.scores)
        errors.append(np.nan_to_num(np.linalg.norm(back.points_mm - points, axis=1), nan=np.inf))
    score, near = np.concatenate(scores), np.concatenate(errors) <= reach_mm
    rows, threshold, above, good = [], None, np.inf, True
    for candidate in np.arange(0.95, -0.5, -0.025).round(3):
        accepted = score >= candidate
        within = float(near[accepted].mean()) if accepted.any() else float("nan")
        rows.append(
            {
                "score": float(candidate),
                "accepted": float(accepted.mean()),
                "within": within,
                "points": int(accepted.sum()),
            }
        )
        # the matches that a lower threshold lets in have to be good themselves; fewer than 20 say too little (ours)
        added = accepted & (score < above)
        if added.sum() >= 20:
            good, above = good and float(near[added].mean()) >= share, candidate
            threshold = float(candidate) if good else threshold
    return Calibration(threshold, rows)


def make_aligner(
    name: str,
    scans: Any,
    embeddings: EmbeddingFolder | str | Path | None = None,
    *,
    threshold: float | None = None,
    max_cycle_mm: float | None = None,
) -> Aligner:
    """An aligner by its name in the config.

    Args:
        name: coordinate, random, affine, sam; or sam_nearest, which is sam by single matches, as its authors do.
        scans: the ``VolumeStore``.
        embeddings: folder that ``alice embed`` wrote; for sam and sam_nearest.
        threshold: see :class:`SamAligner`.
        max_cycle_mm: see :class:`SamAligner`.

    Raises:
        ValueError: naming the ones there are, or what sam needs.
    """
    if name in ("sam", "sam_nearest"):
        if embeddings is None:
            store = getattr(scans, "path", "STORE")
            raise ValueError(
                f"aligner {name!r} needs the scans' embeddings. Make them with: alice embed {store} EMBEDDINGS, and give "
                "that folder; or take aligner 'coordinate', which needs none."
            )
        made = SamAligner(scans, embeddings, threshold, max_cycle_mm=max_cycle_mm, consensus=name == "sam")
        logger.info(
            "Pairs are aligned by %s, with embeddings in %s of weights %s; a match scores %g at least.",
            name,
            made.embeddings.path,
            made.embeddings.weights_sha256[:12],
            made.threshold,
        )
        return made
    makers: dict[str, Any] = {
        "coordinate": CoordinateAligner,
        "random": RandomAligner,
        "affine": AffineAligner,
    }
    if name not in makers:
        raise ValueError(
            f"aligner must be one of {', '.join([*makers, 'sam', 'sam_nearest'])}; got {name!r}."
        )
    logger.info("Pairs are aligned by %s.", name)
    return makers[name](scans)
