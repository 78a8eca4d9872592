"""The interface of aligners: given a point of one scan, find the same point of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Map = Callable[[np.ndarray], np.ndarray]  # (..., 3) mm of one scan -> (..., 3) mm of another


class ScanGeometry(Protocol):
    """What an aligner needs from a collection of scans; a ``VolumeStore`` provides it."""

    def affine(self, name: str) -> np.ndarray: ...
    def body_box_mm(self, name: str) -> np.ndarray: ...
    def body_voxels(self, name: str) -> np.ndarray: ...


class Match(NamedTuple):
    """Where a point lies in the other scan, and how sure the aligner is (1 is best)."""

    point_mm: np.ndarray  # (3,) RAS
    score: float


class Aligner(Protocol):
    """A way to find the same anatomy in another scan."""

    name: str
    threshold: float  # do not use matches with a lower score

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        """The point of ``scan_k`` that corresponds to ``point_mm`` of ``scan_q``."""
        ...


@runtime_checkable
class MapAligner(Aligner, Protocol):
    """An aligner that maps all points near an aligned one, not only that one."""

    def map_of(self, scan_q: str, point_mm: np.ndarray, scan_k: str) -> Map | None:
        """The map of points of ``scan_q`` near ``point_mm`` to ``scan_k``; None if there is only the point."""
        ...
