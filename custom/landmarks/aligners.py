"""Aligners: a point of one scan found in another, in world millimetres."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from custom.landmarks.geometry import to_voxels, to_world


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


def make_aligner(name: str, scans: ScanGeometry) -> Aligner:
    """An aligner by its name in the config.

    Raises:
        ValueError: naming the ones there are.
    """
    makers = {"coordinate": CoordinateAligner, "random": RandomAligner}
    if name not in makers:
        raise ValueError(f"aligner must be one of {', '.join(makers)}; got {name!r}.")
    return makers[name](scans)
