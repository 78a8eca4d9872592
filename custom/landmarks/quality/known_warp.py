"""Scans deformed by a known warp, so that the true place of every point is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from custom.data.grid.body import body_mask
from custom.data.store.chunked_array import write_array
from custom.data.store.volume_store import VolumeStore, sha256_of_array, volume_path, write_index
from custom.space import to_voxels, to_world

WARPED = "~warped"  # ends the name of a deformed scan


@dataclass(frozen=True)
class Warp:
    """A smooth map of world mm that does not fold: an affine map and a few sine waves.

    Attributes:
        matrix: (4, 4).
        waves: per wave its direction (3,) in radians per mm, amplitude (3,) in mm and phase.
    """

    matrix: NDArray[np.float64]
    waves: tuple[tuple[NDArray[np.float64], NDArray[np.float64], float], ...]

    def __call__(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 3) to (..., 3)."""
        out = to_world(self.matrix, points_mm)
        for direction, amplitude, phase in self.waves:
            out = out + np.sin(points_mm @ direction + phase)[..., None] * amplitude
        return out


def draw_warp(
    rng: np.random.Generator,
    centre_mm: NDArray[np.float64],
    *,
    rotation_deg: float = 8.0,
    scale: float = 0.1,
    shift_mm: float = 20.0,
    wave_mm: float = 8.0,
    wavelength_mm: float = 120.0,
) -> Warp:
    """A random warp about a centre; its waves are lowered until it cannot fold.

    Args:
        rng: of the draw.
        centre_mm: (3,), moves little.
        rotation_deg: largest angle about each axis.
        scale: largest change of length along each axis, as a share.
        shift_mm: largest shift along each axis.
        wave_mm: amplitude of each of four waves.
        wavelength_mm: the shortest wavelength.
    """
    linear = np.diag(1 + rng.uniform(-scale, scale, 3))
    for axis in range(3):
        angle = np.deg2rad(rng.uniform(-rotation_deg, rotation_deg))
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        turn[[i, i, j, j], [i, j, i, j]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
        linear = turn @ linear
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centre_mm - linear @ centre_mm + rng.uniform(-shift_mm, shift_mm, 3)
    waves = []
    for _ in range(4):
        direction = _unit(rng.normal(size=3)) * 2 * np.pi / (wavelength_mm * rng.uniform(1, 2))
        waves.append((direction, _unit(rng.normal(size=3)) * wave_mm, float(rng.uniform(0, 2 * np.pi))))
    # |derivative of the waves| <= sum |direction| |amplitude|; nothing folds below the affine map's least
    # stretch
    steep = sum(float(np.linalg.norm(d) * np.linalg.norm(a)) for d, a, _ in waves)
    lower = min(1.0, 0.8 * float(np.linalg.svd(linear, compute_uv=False).min()) / steep)
    return Warp(matrix, tuple((d, a * lower, p) for d, a, p in waves))


def write_warped(
    store: VolumeStore, names: Sequence[str], out: str | Path, *, seed: int = 0
) -> tuple[VolumeStore, dict[str, Warp]]:
    """A store of scans and, beside each, the same scan deformed: ``name`` and ``name~warped``.

    Args:
        store: the scans.
        names: which of them to deform.
        out: folder of the new store.
        seed: of the warps.

    Returns:
        The store, and for each deformed scan the warp that takes its points to the original's.
    """
    out, records, warps = Path(out), {}, {}
    for index, name in enumerate(names):
        affine, shape = store.affine(name), store.shape(name)
        hu = store.read_crop(name, (0, 0, 0), shape)
        centre = to_world(affine, (np.array(shape) - 1) / 2)
        warp = draw_warp(np.random.default_rng([seed, index]), centre)
        deformed = deform(hu, affine, warp)
        for key, volume in ((name, hu), (name + WARPED, deformed)):
            body, step = body_mask(volume, tuple(store.spacing))
            write_array(volume_path(out, key, "hu"), volume)
            write_array(volume_path(out, key, "body"), body.astype(np.uint8))
            record = type(store.records[name])(**vars(store.records[name]))
            cells = np.argwhere(body)
            record.body_step = list(step)
            record.body_box = [[0, 0, 0], list(shape)]
            if len(cells):
                high = np.minimum((cells.max(axis=0) + 1) * step, shape)
                record.body_box = [(cells.min(axis=0) * step).tolist(), high.tolist()]
            record.name, record.patient, record.labels, record.label_sha256 = key, key, [], None
            record.voxels_sha256 = sha256_of_array(volume)
            records[key] = record
        warps[name + WARPED] = warp
    write_index(out, store.settings, records)
    return VolumeStore(out), warps


def deform(
    hu: NDArray[np.int16], affine: NDArray[np.float64], warp: Warp, fill: int = -1024
) -> NDArray[np.int16]:
    """Deform a scan: the result shows at a point y what the scan shows at ``warp(y)``."""
    out = np.empty_like(hu)
    for z in range(hu.shape[2]):  # slice by slice, to bound the memory of coordinates
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in hu.shape[:2]), [z], indexing="ij"), axis=-1)
        source = to_voxels(affine, warp(to_world(affine, grid)).reshape(-1, 3)).T
        values = ndimage.map_coordinates(hu, source, order=1, mode="constant", cval=fill, output=np.float32)
        out[:, :, z] = np.rint(values).reshape(hu.shape[:2])
    return out


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.linalg.norm(vector)
