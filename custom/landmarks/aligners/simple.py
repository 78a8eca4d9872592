"""Aligners without weights: relative position in the body, and a random control."""

from __future__ import annotations

import numpy as np

from custom.landmarks.aligners.protocol import Map, Match, ScanGeometry
from custom.space import to_voxels, to_world


class CoordinateAligner:
    """The same relative position in the body's box; needs no weights (ours).

    It is right if both scans show the same part of the body, and centimetres off if they do not.
    """

    name = "coordinate"
    threshold = -1.0

    def __init__(self, scans: ScanGeometry) -> None:
        self.scans = scans

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        return Match(self.map_of(scan_q, point_mm, scan_k)(point_mm), 1.0)

    def map_of(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Map:
        """The map of all points of one scan to another; the same about every point."""
        box_q, box_k = self.scans.body_box_mm(scan_q), self.scans.body_box_mm(scan_k)
        affine_q, affine_k = self.scans.affine(scan_q), self.scans.affine(scan_k)

        def there(points_mm: np.ndarray) -> np.ndarray:
            relative = (to_voxels(affine_q, points_mm) - box_q[0]) / (box_q[1] - box_q[0])
            return to_world(affine_k, box_k[0] + relative * (box_k[1] - box_k[0]))

        return there


class RandomAligner:
    """A random point of the other body: the negative control."""

    name = "random"
    threshold = -1.0

    def __init__(self, scans: ScanGeometry) -> None:
        self.scans = scans

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        voxels = self.scans.body_voxels(scan_k)
        return Match(to_world(self.scans.affine(scan_k), voxels[rng.integers(len(voxels))]), 1.0)
