"""Prepare a scan for SAM (2 mm grid, the network's units), and convert its cells to world mm and back."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from custom.data.formats.reasons import Fault
from custom.data.formats.voxels import check_grid
from custom.data.scans import NO_AIR_HU, check_hu, read_volume
from custom.errors import AliceError

logger = logging.getLogger(__name__)

Triple: TypeAlias = tuple[int, int, int]
Level: TypeAlias = Literal["fine", "coarse"]
Scan: TypeAlias = "str | PathLike[str] | Tensor | tuple[Any, Any]"
SPACING_MM = 2.0  # isotropic; all of SAM's configurations
HU_RANGE = (-1024.0, 3071.0)  # clipped to this, then mapped to [0, 255] and moved by -50
UNIT_RANGE, UNIT_SHIFT = 255.0, -50.0
STRIDES_ZYX: dict[Level, tuple[int, int, int]] = {"fine": (2, 2, 2), "coarse": (4, 16, 16)}
# the voxel at the centre of cell 0; the authors' training coordinates are means over a cell's voxels
CENTRES_ZYX: dict[Level, tuple[float, float, float]] = {"fine": (0.5, 0.5, 0.5), "coarse": (1.5, 7.5, 7.5)}


@dataclass(frozen=True)
class ScanEmbedding:
    """A scan's embeddings and where their cells lie.

    Attributes:
        fine: (C, z, y, x) float32, length 1 over channels.
        coarse: (C, z, y, x) float32, length 1 over channels.
        affine: (4, 4), voxel index (x, y, z) of the 2 mm grid, which grows towards Left, Posterior, Superior,
            to world mm (RAS).
        shape: voxels of the 2 mm grid along x, y, z.
        body: bool (z, y, x), fine cells in or near the patient's body; None if all count.
        weights_sha256: of the network that made it, if that is known.
    """

    fine: Tensor
    coarse: Tensor
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    body: NDArray[np.bool_] | None = None
    weights_sha256: str | None = None

    def cell_to_world(self, index_zyx: ArrayLike, level: Level = "fine") -> NDArray[np.float64]:
        """See :func:`cell_to_world`."""
        return cell_to_world(index_zyx, self.affine, level)

    def world_to_cell(self, point_mm: ArrayLike, level: Level = "fine") -> NDArray[np.float64]:
        """See :func:`world_to_cell`."""
        return world_to_cell(point_mm, self.affine, level)


class GridVolume(NamedTuple):
    """A scan resampled to the network's grid.

    Attributes:
        volume: (X, Y, Z) float32, in the scan's own units (HU), index growing towards Left, Posterior,
            Superior.
        affine: (4, 4), voxel index (x, y, z) to world mm (RAS).
    """

    volume: Tensor
    affine: NDArray[np.float64]


def hu_to_units(volume_hu: Tensor) -> Tensor:
    """Clip HU to [-1024, 3071] and map to the network's [-50, 205]; NaN counts as -1024."""
    low, high = HU_RANGE
    return (volume_hu.nan_to_num(nan=low).clamp(low, high) - low) * (UNIT_RANGE / (high - low)) + UNIT_SHIFT


def read_scan(scan: Scan) -> tuple[Tensor, NDArray[np.float64]]:
    """Values (X, Y, Z), float32 on the CPU, and affine to world mm of what :func:`embed_scan` takes.

    A file is read as ``alice scan`` reads it. It is refused if its values cannot be Hounsfield units, or if
    its grid cannot hold a patient. Data in memory may be a crop, so for these there is only a warning.
    """
    array: Any
    if isinstance(scan, str | PathLike):
        if not Path(scan).is_file():
            raise FileNotFoundError(f"{scan}: no such file.")
        array, affine = read_volume(Path(scan), any_grid=False)
        check_hu(Path(scan), array)  # only for its refusals; nothing is rounded here
    elif isinstance(scan, tuple):
        array, affine = scan
    elif hasattr(scan, "affine"):
        array, affine = scan, scan.affine
        if "LPS" in str(getattr(scan, "meta", {}).get("space", "RAS")):
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine)
    else:
        raise AliceError(
            "A scan is a path, a MetaTensor or an (array, affine) pair: a bare array lacks an affine."
        )

    if isinstance(array, Tensor):
        volume = array.detach().to("cpu", torch.float32).as_subclass(Tensor)
    else:
        volume = torch.from_numpy(np.array(array, dtype=np.float32))
    while volume.ndim > 3 and 1 in (volume.shape[0], volume.shape[-1]):
        volume = volume[0] if volume.shape[0] == 1 else volume[..., 0]
    matrix = np.asarray(affine, dtype=np.float64)
    if volume.ndim != 3 or 0 in volume.shape:
        raise AliceError(f"Expected one 3D volume, got shape {tuple(volume.shape)}.")
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise AliceError(f"Expected an invertible 4 x 4 affine, got {matrix.tolist()}.")
    if not isinstance(scan, str | PathLike) and volume.min() > NO_AIR_HU:
        logger.warning(
            "The scan's values run from %g to %g, without air: is it a CT in HU? SAM was trained on nothing else.",
            volume.min(),
            volume.max(),
        )
    _warn_if_odd(scan if isinstance(scan, str | PathLike) else "The scan", matrix, tuple(volume.shape))
    return volume, matrix


def _warn_if_odd(scan: object, affine: NDArray[np.float64], shape: tuple[int, ...]) -> None:
    """Warn of a grid on which the network was not trained."""
    try:
        odd = [reason.value for reason in check_grid(affine, shape)]
    except Fault as fault:  # a file like this was refused before
        odd = [f"{fault.reason.value} {fault}"]
    if odd:
        logger.warning("%s: %s. SAM was trained on upright scans: check its matches.", scan, "; ".join(odd))


def to_grid(volume: Tensor, affine: NDArray[np.float64], *, spacing: float = SPACING_MM) -> GridVolume:
    """Turn a scan to the closest Left, Posterior, Superior axes and resample it linearly to cubic voxels.

    As in torchio's Resample, the outer edge of the first voxel stays in place: an axis of n voxels of s mm
    becomes ceil(n s / spacing) voxels, the first centred at index (spacing / s - 1) / 2. Positions beyond the
    outer centres take the border's value (torchio: 0 where they lie outside the scan). There is no smoothing.

    Args:
        volume: (X, Y, Z).
        affine: (4, 4), voxel index to world mm (RAS); if it is oblique, so is the new grid.
        spacing: mm.

    Returns:
        The volume on its new grid, and the grid's affine.

    Raises:
        AliceError: if ``spacing`` is not positive.
    """
    if not spacing > 0:
        raise AliceError(f"Spacing must be positive, got {spacing} mm.")
    here = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt("LPS"))
    affine = affine @ nib.orientations.inv_ornt_aff(turn, tuple(volume.shape))
    order = [int(axis) for axis in np.argsort(turn[:, 0])]
    volume = volume.permute(order).flip([int(turn[axis, 0]) for axis in order if turn[axis, 1] < 0])

    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    step = spacing / voxel_mm  # input voxels per output voxel
    start = 0.5 * (step - 1.0)
    # axes that become coarser go first, so that intermediate volumes stay small
    for axis in np.argsort(-step):
        size = volume.shape[axis]
        # tolerate 1e-3 voxels: affines stored in float32 would add an empty slice
        new_size = max(math.ceil(size / step[axis] - 1e-3), 1) if size > 1 else 1
        volume = _sample_axis(volume, int(axis), start[axis] + step[axis] * np.arange(new_size))
    resampled = affine.copy()
    resampled[:3, :3] = affine[:3, :3] * step
    resampled[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    return GridVolume(volume, resampled)


def _sample_axis(volume: Tensor, axis: int, position: NDArray[np.float64]) -> Tensor:
    """Linear interpolation at fractional indices along one axis, border values beyond its ends."""
    position = position.clip(0, volume.shape[axis] - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, volume.shape[axis] - 1)
    shape = [1, 1, 1]
    shape[axis] = -1
    weight = torch.from_numpy((position - below).astype(np.float32)).view(shape)
    lower = volume.index_select(axis, torch.from_numpy(below))
    return torch.lerp(lower, volume.index_select(axis, torch.from_numpy(above)), weight)


def cell_to_world(index_zyx: ArrayLike, affine: ArrayLike, level: Level) -> NDArray[np.float64]:
    """World mm of cells: fine cell k is centred at voxel 2k + 0.5, coarse cell k at 16k + 7.5 (z: 4k + 1.5).

    Args:
        index_zyx: (..., 3) cell indices in z, y, x order, fractions allowed.
        affine: (4, 4), the 2 mm grid's, voxel index (x, y, z) to world mm.
        level: ``"fine"`` or ``"coarse"``.

    Returns:
        (..., 3) points x, y, z in world mm (RAS).
    """
    voxel_zyx = np.asarray(index_zyx, dtype=np.float64) * STRIDES_ZYX[level] + CENTRES_ZYX[level]
    matrix = np.asarray(affine, dtype=np.float64)
    return voxel_zyx[..., ::-1] @ matrix[:3, :3].T + matrix[:3, 3]


def world_to_cell(point_mm: ArrayLike, affine: ArrayLike, level: Level) -> NDArray[np.float64]:
    """Cell indices (..., 3) in z, y, x order, with fractions, of points (..., 3) in world mm.

    The inverse of :func:`cell_to_world`. Rounded, it is the cell that holds the point; it may lie outside the
    map.
    """
    inverse = np.linalg.inv(np.asarray(affine, dtype=np.float64))
    voxel_xyz = np.asarray(point_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]
    return (voxel_xyz[..., ::-1] - CENTRES_ZYX[level]) / STRIDES_ZYX[level]
