"""The body of one subject: a smooth map, without folds, from world coordinates to the canonical body."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from custom.data.phantom.shapes import Array, superellipse
from custom.data.phantom.surroundings import BODY_SEMI, WALL_SEMI, body_profile

Points = NDArray[np.float64]

KNOT_STEP_MM = 8.0  # displacements change over 50 mm and more (ours)
LEAST_DETERMINANT = 0.25  # of the map's Jacobian, divided by the scale of the body

# organ centre in canonical mm, reach (sigma) of its own displacement, sd of its shift in x, y, z,
# sd of log size
ORGAN_MOTION = (
    ((60, 5, 85), 60, (4, 5, 14), 0.12),  # right diaphragm and liver: breathing
    ((-60, 0, 80), 50, (5, 6, 12), 0.12),  # left diaphragm
    ((-98, -22, 62), 36, (5, 7, 9), 0.20),  # spleen
    ((66, -36, -14), 36, (5, 4, 11), 0.14),  # right kidney
    ((-63, -37, 2), 36, (5, 4, 11), 0.14),  # left kidney
    ((-55, 28, 35), 40, (7, 7, 11), 0.22),  # stomach
    ((0, 18, 25), 36, (6, 5, 10), 0.16),  # pancreas
    ((54, 47, -4), 28, (8, 6, 9), 0.25),  # gallbladder
    ((35, 15, -25), 34, (7, 5, 9), 0.15),  # duodenum
    ((-20, 18, 163), 50, (6, 4, 8), 0.12),  # heart
    ((0, 30, -90), 60, (9, 6, 10), 0.10),  # bowel
)


@dataclass(frozen=True)
class Pose:
    """A subject's body size, fat, pose and inner displacement.

    Attributes:
        width_mm, depth_mm: left-right and front-back size of the trunk at the liver.
        scale: subject mm per canonical mm inside the body wall, (3,).
        fat: thickness of the fat under the skin relative to the canonical body, at the sides and at front and back.
        rotation: (3, 3), from the scanner's frame to the body's.
        waves: (K, 8) rows of wave vector (3), phase, amplitude in mm (3), and 1 if it fades at the body wall.
        blobs: (M, 8) rows of centre (3), sigma, shift in mm (3), log size.
        strength: factor of waves and blobs, below 1 if the map would fold otherwise.
    """

    width_mm: float
    depth_mm: float
    scale: Points
    fat: tuple[float, float]
    rotation: Points
    waves: Points
    blobs: Points
    strength: float = 1.0

    def canonical(self, points_mm: Points) -> Points:
        """Canonical mm of points (..., 3), which are in mm from the isocentre, where the canonical origin lies."""
        body = (points_mm @ self.rotation.T) / self.scale
        body = self._undo_fat(body)
        return body + self.strength * self._displacement(body)

    def _undo_fat(self, body: Points) -> Points:
        x, y = body[..., 0], body[..., 1]
        a, b = (semi * body_profile(body[..., 2]) for semi in WALL_SEMI)
        radius = np.maximum(superellipse(x / a, y / b, 1.0, 1.0), 1e-6)
        sideways = (np.abs(x) / a / radius) ** 2.4  # 1 at the sides, 0 in front and behind
        fat = self.fat[0] * sideways + self.fat[1] * (1 - sideways)
        soft = 0.06  # starts gradually, so that the map is smooth
        beyond = soft * np.logaddexp(0, (radius - 1) / soft)
        stretch = 1 + (1 / fat - 1) * beyond / radius
        return body * np.stack([stretch, stretch, np.ones_like(stretch)], axis=-1)

    def _displacement(self, body: Points) -> Points:
        radius = superellipse(body[..., 0], body[..., 1], *WALL_SEMI)
        share = np.clip((radius - 0.6) / 0.6, 0, 1)
        inner = 1 - share * share * (3 - 2 * share)
        spine = 1 - 0.6 * np.exp(-((body[..., 0] / 40) ** 2 + ((body[..., 1] + 55) / 35) ** 2))
        moved = np.zeros_like(body)
        for wave in self.waves:
            fade = inner if wave[7] else 0.25 + 0.75 * inner
            moved += (np.sin(body @ wave[:3] + wave[3]) * fade * spine)[..., None] * wave[4:7]
        for blob in self.blobs:
            offset = body - blob[:3]
            weight = np.exp(-(offset**2).sum(axis=-1) / (2 * blob[3] ** 2)) * (0.05 + 0.95 * inner) * spine
            # an organ that is larger in the subject has the same canonical size, so the map shrinks it
            moved -= weight[..., None] * (blob[4:7] + blob[7] * offset)
        return moved


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draw a subject. The displacement is weakened until the map has no folds."""
    width = float(np.clip(rng.normal(340, 35), 270, 430))
    depth = float(np.clip(0.66 * width + rng.normal(0, 18), 165, 290))
    fat_side = float(np.clip(22 + 0.3 * (width - 340) + rng.normal(0, 6), 9, 45))
    fat_front = float(np.clip(0.85 * fat_side + rng.normal(0, 3), 8, 40))
    inner = np.array(
        [(width - 2 * fat_side) / (2 * WALL_SEMI[0]), (depth - 2 * fat_front) / (2 * WALL_SEMI[1])]
    )
    scale = np.array([*inner, np.clip(rng.normal(1, 0.06), 0.87, 1.14)])
    fat = (
        fat_side / ((BODY_SEMI[0] - WALL_SEMI[0]) * inner[0]),
        fat_front / ((BODY_SEMI[1] - WALL_SEMI[1]) * inner[1]),
    )
    rotation = Rotation.from_euler("xyz", rng.normal(0, [2.0, 1.5, 3.0]), degrees=True).as_matrix()
    waves = [_draw_wave(rng, 300, 480, 5.5, fades=0) for _ in range(6)]
    waves += [_draw_wave(rng, 160, 260, 2.2, fades=1) for _ in range(6)]
    blobs = [
        [*centre, sigma, *rng.normal(0, shift), float(np.clip(rng.normal(0, size), -2 * size, 2 * size))]
        for centre, sigma, shift, size in ORGAN_MOTION
    ]
    pose = Pose(width, depth, scale, fat, rotation, np.array(waves), np.array(blobs))
    while pose.strength > 0.1 and _least_determinant(pose) < LEAST_DETERMINANT:
        pose = Pose(width, depth, scale, fat, rotation, pose.waves, pose.blobs, pose.strength * 0.88)
    return pose


def _draw_wave(
    rng: np.random.Generator, shortest: float, longest: float, sd: float, fades: int
) -> list[float]:
    direction = rng.normal(size=3)
    vector = direction / np.linalg.norm(direction) * 2 * np.pi / rng.uniform(shortest, longest)
    return [*vector, rng.uniform(0, 2 * np.pi), *rng.normal(0, sd, 3), fades]


def _least_determinant(pose: Pose) -> float:
    """The smallest Jacobian determinant in the body's bounding box, relative to the scale of the body."""
    step = 10.0
    axes = [np.arange(-extent, extent + 1, step) for extent in (pose.width_mm / 2, pose.depth_mm / 2)]
    z = np.arange(-280.0, 341.0, 2 * step)
    points = np.stack(np.meshgrid(*axes, z, indexing="ij"), axis=-1)
    field = pose.canonical(points)
    slopes = [np.gradient(field, s, axis=axis) for axis, s in enumerate((step, step, 2 * step))]
    determinant = np.linalg.det(np.stack(slopes, axis=-1))
    fat = max(1.0, *pose.fat)  # where fat is thick the map is flat, which is not a fold
    return float(determinant.min() * pose.scale.prod() * fat)


def sample_knots(pose: Pose, shape: tuple[int, ...], affine: Points, isocentre_mm: Points) -> Array:
    """The map on a coarse grid from the first to the last voxel of the scan: float32 (kx, ky, kz, 3)."""
    axes = []
    for axis, size in enumerate(shape):
        extent = (size - 1) * abs(affine[axis, axis])
        axes.append(np.linspace(0, size - 1, max(4, int(np.ceil(extent / KNOT_STEP_MM)) + 1)))
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    return pose.canonical(world - isocentre_mm).astype(np.float32)


def spread_knots(knots: Array, shape: tuple[int, ...]) -> Array:
    """Evaluate the cubic spline through coarse samples at every voxel.

    This *defines* the map of a phantom, so a map that is stored as knots is read back exactly.

    Args:
        knots: (kx, ky, kz, C) samples, evenly spaced from the first to the last voxel of each axis.
        shape: voxels X, Y, Z.

    Returns:
        Float32 (X, Y, Z, C).
    """
    values = knots
    for size in shape:  # each pass takes the first axis and puts it at the end
        count = values.shape[0]
        spline = CubicSpline(np.linspace(0, size - 1, count), np.eye(count))
        weights = spline(np.arange(size)).astype(np.float32)
        values = np.tensordot(values, weights, axes=(0, 1))
    # axes are now (C, X, Y, Z)
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))
