"""Alignment by one affine registration of two scans."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from custom.data.grid.profiles import window
from custom.landmarks.aligners.protocol import Map, Match
from custom.space import to_world

SOFT_TISSUE_HU = (-500.0, 300.0)  # of CT; other profiles have a window of their own


class AffineAligner:
    """One affine map for each pair of scans, registered with ITK on voxels of about 6 mm and then kept (ours).

    An affine map has only twelve numbers: it takes a point to the right region, not to the right place in an
    organ.

    Args:
        scans: the ``VolumeStore``.
        spacing_mm: approximate voxel size for the registration.
        max_pairs: number of maps to keep.
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
        return Match(self.map_of(scan_q, point_mm, scan_k)(point_mm), 1.0)

    def map_of(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Map:
        """The map of all points of one scan to another; the same about every point."""
        return functools.partial(to_world, self.transform(scan_q, scan_k))

    def _open(self) -> None:
        self.transform = functools.lru_cache(self.max_pairs)(self._register)
        self._coarse = functools.lru_cache(64)(self._read_coarse)

    def _register(self, scan_q: str, scan_k: str) -> np.ndarray:
        """(4, 4), mm of Q to mm of K; the map from K to Q is its inverse."""
        if scan_k < scan_q:
            return np.linalg.inv(self.transform(scan_k, scan_q))
        centres = [
            to_world(self.scans.affine(n), self.scans.body_box_mm(n).mean(axis=0)) for n in (scan_q, scan_k)
        ]
        return register_affine(*self._coarse(scan_q), *self._coarse(scan_k), centres[0], centres[1])

    def _read_coarse(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Means over blocks of voxels, with soft tissue in [0, 1], and their affine."""
        affine, shape = self.scans.affine(name), self.scans.shape(name)
        step = np.maximum(1, np.rint(self.spacing_mm / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
        size = np.array(shape) // step
        stored = self.scans.read_crop(name, (0, 0, 0), size * step)
        blocks = window(stored, *self.scans.window(SOFT_TISSUE_HU))
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
    """Register an affine map from Q's world mm to K's, by mean squares, from coarse to fine.

    Args:
        volume_q: (X, Y, Z) in [0, 1].
        affine_q: voxel to world mm.
        volume_k: the same of K.
        affine_k: the same of K.
        centre_q: (3,) mm, the middle of the body; the search starts from centre on centre.
        centre_k: the same of K.

    Returns:
        (4, 4).
    """
    import itk  # loads for seconds, so only when needed

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
    """An ITK image with RAS coordinates. ITK's own readers use LPS, but a registration does not care."""
    image = itk.image_from_array(np.ascontiguousarray(volume.T.astype(np.float32)))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in affine[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3] / spacing)))
    return image
