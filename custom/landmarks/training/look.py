"""How a view sees a scan: from where, and with which contrast, sharpness and noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from custom.data.store.volume_store import VolumeStore
from custom.space import to_world

Array = NDArray[Any]
AIR_HU = -1024
# outside of soft tissue a curve of intensities keeps its slope of 1 (lung, bone and metal stay what they are)
CURVE_HU = np.array([-200.0, -100.0, -30.0, 0.0, 30.0, 60.0, 100.0, 150.0, 220.0, 320.0])


class Look(NamedTuple):
    """How a view sees the scan: drawn once, used by plain functions.

    Attributes:
        affine: (4, 4), voxel of the view (x, y, z) to world mm (RAS).
        curve: (n,) new HU of ``CURVE_HU``.
        blur: voxels, standard deviation.
        noise: HU, standard deviation.
        noise_seed: of the noise itself.
    """

    affine: Array
    curve: Array
    blur: float
    noise: float
    noise_seed: int


def see(store: VolumeStore, name: str, look: Look, size: Array) -> Array:
    """A view of a scan: float32 (Z, Y, X) in HU, linear interpolation, air outside of the scan."""
    to_store = np.linalg.inv(store.affine(name)) @ look.affine
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij"), -1).reshape(-1, 3)
    reach = to_world(to_store, corners)
    start = np.floor(reach.min(axis=0)).astype(int) - 1
    box = np.ceil(reach.max(axis=0)).astype(int) + 2 - start
    volume = torch.from_numpy(store.read_crop(name, start, box, fill=AIR_HU).astype(np.float32))  # (X, Y, Z)

    index = [torch.arange(int(n), dtype=torch.float32) for n in size]
    matrix, origin = (
        torch.from_numpy(to_store[:3, :3]).float(),
        torch.from_numpy(to_store[:3, 3] - start).float(),
    )
    grid_z, grid_y, grid_x = torch.meshgrid(index[2], index[1], index[0], indexing="ij")
    place = torch.stack([grid_x, grid_y, grid_z], -1) @ matrix.T + origin  # voxels of the box
    relative = (2 * place + 1) / torch.from_numpy(box).float() - 1
    # grid_sample's last axis names the input's axes from the last to the first
    view = F.grid_sample(
        volume[None, None], relative.flip(-1)[None], padding_mode="border", align_corners=False
    )
    return paint(view[0, 0].numpy(), look)


def paint(view_hu: Array, look: Look) -> Array:
    """A view with its own contrast, sharpness and noise."""
    bent = np.interp(view_hu, CURVE_HU, look.curve)
    below, above = view_hu < CURVE_HU[0], view_hu > CURVE_HU[-1]
    bent = np.where(below, view_hu + look.curve[0] - CURVE_HU[0], bent)
    bent = np.where(above, view_hu + look.curve[-1] - CURVE_HU[-1], bent).astype(np.float32)
    if look.blur > 0:
        bent = gaussian_filter(bent, look.blur)
    if look.noise > 0:
        noise = np.random.default_rng(look.noise_seed).standard_normal(bent.shape, dtype=np.float32)
        bent = bent + np.float32(look.noise) * noise
    return bent


def rotation_matrix(angles: Array) -> Array:
    """Turns about x, y and z, in this order, by angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
