"""Aligners that need no weights: relative position in the body, and chance."""

from __future__ import annotations

import numpy as np

from custom.landmarks.aligners.match import Match, ScanGeometry
from custom.space import to_voxels, to_world


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
