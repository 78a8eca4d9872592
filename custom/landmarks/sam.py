"""SAM, the Self-supervised Anatomical eMbedding network, and the embedding of a whole scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, NamedTuple, TypeAlias

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

Triple: TypeAlias = tuple[int, int, int]
Level: TypeAlias = Literal["fine", "coarse"]
Scan: TypeAlias = "str | PathLike[str] | Tensor | tuple[Any, Any]"

SPACING_MM = 2.0  # isotropic; all of SAM's configurations
EMBEDDING_DIM = 128
HU_RANGE = (-1024.0, 3071.0)  # clipped to this, then mapped to [0, 255] and moved by -50
UNIT_RANGE, UNIT_SHIFT = 255.0, -50.0

FINE_STRIDE = 2
STRIDES_ZYX: dict[Level, tuple[int, int, int]] = {"fine": (2, 2, 2), "coarse": (4, 16, 16)}
# the voxel in which cell 0 is centred; the authors' training coordinates are averaged over a cell's voxels
CENTRES_ZYX: dict[Level, tuple[float, float, float]] = {"fine": (0.5, 0.5, 0.5), "coarse": (1.5, 7.5, 7.5)}


class SAMMaps(NamedTuple):
    """Embeddings of a volume, each of length 1 over channels, float32.

    Attributes:
        fine: (B, C, z, y, x), one cell per 2 x 2 x 2 voxels (4 mm).
        coarse: (B, C, z, y, x), one cell per 4 x 16 x 16 voxels (8 x 32 x 32 mm).
    """

    fine: Tensor
    coarse: Tensor


class ConvNorm(nn.Module):
    """Convolution without bias, padded to keep the size at stride 1, and batch norm."""

    def __init__(self, in_dim: int, dim: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_dim, dim, kernel, stride=stride, padding=padding, bias=False)
        self.norm = nn.BatchNorm3d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """ReLU(conv2(ReLU(conv1(x))) + shortcut(x)), each convolution with its norm."""

    def __init__(self, in_dim: int, dim: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_dim, dim, kernel, stride)
        self.conv2 = ConvNorm(dim, dim, kernel)
        changes = in_dim != dim or max(stride) > 1
        self.shortcut = ConvNorm(in_dim, dim, (1, 1, 1), stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class PyramidHead(nn.Module):
    """Sum maps from coarse to fine and smooth the finest: no norm, no activation."""

    def __init__(self, in_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv3d(in_dim, dim, 1) for in_dim in in_dims)
        self.smooth = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.smooth(self.merge(maps))

    def merge(self, maps: Sequence[Tensor]) -> Tensor:
        """Nearest top-down sum of the projected maps, finest first in ``maps``, at the finest one's size."""
        total = self.laterals[-1](maps[-1])
        for lateral, finer in zip(reversed(self.laterals[:-1]), reversed(maps[:-1]), strict=True):
            total = F.interpolate(total, size=finer.shape[2:], mode="nearest").add_(lateral(finer))
        return total


class SAM(nn.Module):
    """Self-supervised Anatomical eMbedding (Yan et al., TMI 2022): a 3D ResNet-18 and two embeddings.

    Not Meta's Segment Anything.

    Args:
        width: channels of the stem and first layer; the others have 2, 4 and 8 times as many. The published
            network has 64.
        embedding_dim: channels of both embeddings.

    Raises:
        ValueError: if either is not positive.

    Attributes:
        settings: the arguments, for the file that carries the weights.
    """

    def __init__(self, width: int = 64, embedding_dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        if width < 1 or embedding_dim < 1:
            raise ValueError(f"width and embedding_dim must be positive, got {width} and {embedding_dim}.")
        self.settings = {"width": width, "embedding_dim": embedding_dim}
        flat, cube = (1, 3, 3), (3, 3, 3)
        self.stem = ConvNorm(1, width, (3, 7, 7))
        self.layer1 = self._layer(width, width, flat, (1, 2, 2))
        self.layer2 = self._layer(width, 2 * width, flat, (1, 2, 2))
        self.layer3 = self._layer(2 * width, 4 * width, cube, (1, 2, 2))
        self.layer4 = self._layer(4 * width, 8 * width, cube, (2, 2, 2))
        self.fine_head = PyramidHead((width, 2 * width, 4 * width), embedding_dim)
        self.coarse_head = PyramidHead((8 * width,), embedding_dim)
        self.apply(_initialise)

    @staticmethod
    def _layer(in_dim: int, dim: int, kernel: Triple, stride: Triple) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_dim, dim, kernel, stride), BasicBlock(dim, dim, kernel, (1, 1, 1)))

    def forward(self, x: Tensor) -> SAMMaps:
        """Embed a volume.

        Args:
            x: (B, 1, Z, Y, X), 2 mm isotropic, indices growing towards Superior, Posterior and Left, in the
                network's units (:func:`hu_to_units`). Any size with Z >= 2.

        Returns:
            ``fine`` of floor(Z / 2), ceil(Y / 2), ceil(X / 2) cells, ``coarse`` of half as many along z and
            an eighth along y and x, rounded up at each halving.

        Raises:
            ValueError: if ``x`` has another number of axes or channels, or one slice only.
        """
        _check_volume(x)
        out0 = self.shallow(x)
        out1, out2, out3 = self.deep(out0)
        return SAMMaps(
            unit_length(self.fine_head((out0, out1, out2))), unit_length(self.coarse_head((out3,)))
        )

    def shallow(self, x: Tensor) -> Tensor:
        """Stem, first layer and the pooling of slices in pairs: a map (B, width, Z / 2, Y / 2, X / 2)."""
        return F.max_pool3d(self.layer1(F.relu(self.stem(x))), (2, 1, 1))

    def deep(self, out0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of layers 2, 3 and 4."""
        out1 = self.layer2(out0)
        out2 = self.layer3(out1)
        return out1, out2, self.layer4(out2)

    @torch.no_grad()
    def embed(self, x: Tensor, *, slab: int = 32) -> SAMMaps:
        """What ``forward`` computes in evaluation mode, in slabs of z where memory is large.

        The stem and first layer, at full resolution, take slabs of ``slab`` slices with a halo of two, which
        is more than the one slice their receptive field reaches beyond a pair of slices; so does the fine
        head's last convolution, with a halo of one cell. Everything between is small and runs on the whole
        volume. The result therefore equals ``forward``'s everywhere, slab borders included, up to rounding.

        Args:
            x: as for :meth:`forward`; slabs are moved to the network's device one at a time.
            slab: slices per slab, even.

        Returns:
            As :meth:`forward`, on the network's device.

        Raises:
            ValueError: if the network is in training mode, ``slab`` is odd or not positive, or as
                ``forward``.
        """
        if self.training:
            raise ValueError("Slabs would each have their own batch statistics: call model.eval() first.")
        if slab < 2 or slab % 2:
            raise ValueError(f"A slab needs an even number of slices (they are pooled in pairs), got {slab}.")
        _check_volume(x)
        device = self.stem.conv.weight.device

        pieces = []
        for start in range(0, x.shape[2] // 2 * 2, slab):
            first = max(start - 2, 0)
            cells = self.shallow(x[:, :, first : start + slab + 2].to(device, torch.float32))
            skip = (start - first) // 2
            pieces.append(cells[:, :, skip : skip + slab // 2])
        out0 = torch.cat(pieces, dim=2)
        del pieces

        out1, out2, out3 = self.deep(out0)
        coarse = unit_length(self.coarse_head((out3,)))
        merged = self.fine_head.merge((out0, out1, out2))
        del out0, out1, out2, out3
        fine = torch.empty(merged.shape, dtype=torch.float32, device=device)
        for start in range(0, merged.shape[2], slab // 2):
            first = max(start - 1, 0)
            smooth = self.fine_head.smooth(merged[:, :, first : start + slab // 2 + 1])
            piece = smooth[:, :, start - first : start - first + slab // 2]
            fine[:, :, start : start + slab // 2] = unit_length(piece)
        return SAMMaps(fine, coarse)


def unit_length(maps: Tensor) -> Tensor:
    """Divide by the Euclidean norm over channels, in float32."""
    return F.normalize(maps.float(), dim=1)


def _initialise(module: nn.Module) -> None:
    """Kaiming, fan-out: the authors' fallback where no ImageNet weights are inflated."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_volume(x: Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != 1 or x.shape[2] < 2 or min(x.shape[3:]) < 1:
        raise ValueError(f"SAM embeds volumes (B, 1, Z, Y, X) with two slices or more, got {tuple(x.shape)}.")


# -- a scan on the network's grid ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanEmbedding:
    """A scan's embeddings and where their cells lie.

    Attributes:
        fine: (C, z, y, x) float32, length 1 over channels.
        coarse: (C, z, y, x) float32, length 1 over channels.
        affine: (4, 4), voxel index (x, y, z) of the 2 mm grid, which grows towards Left, Posterior, Superior,
            to world mm (RAS).
        shape: voxels of the 2 mm grid along x, y, z.
    """

    fine: Tensor
    coarse: Tensor
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]

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


def embed_scan(model: SAM, scan: Scan, *, spacing: float = SPACING_MM, slab: int = 32) -> ScanEmbedding:
    """Embed a CT scan: orientation, spacing and units as the authors' reader sets them, then the network.

    Args:
        model: in evaluation mode; its device is used.
        scan: path of a NIfTI file, MONAI's MetaTensor (X, Y, Z) or (1, X, Y, Z), or an (array, affine) pair;
            values in HU, affines from voxel index to world mm (RAS).
        spacing: mm of the network's grid; the published network knows 2 mm.
        slab: slices per slab, even; see :meth:`SAM.embed`.

    Returns:
        The embeddings, on the model's device.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the scan is not one 3D volume with an invertible affine, is too thin, or as
            :meth:`SAM.embed`.
    """
    grid = to_grid(*read_scan(scan), spacing=spacing)
    x = hu_to_units(grid.volume).permute(2, 1, 0)[None, None]  # (1, 1, Z, Y, X)
    maps = model.embed(x, slab=slab)
    size_x, size_y, size_z = grid.volume.shape
    return ScanEmbedding(maps.fine[0], maps.coarse[0], grid.affine, (size_x, size_y, size_z))


def hu_to_units(volume_hu: Tensor) -> Tensor:
    """Clip HU to [-1024, 3071] and map to the network's [-50, 205]; NaN counts as -1024."""
    low, high = HU_RANGE
    return (volume_hu.nan_to_num(nan=low).clamp(low, high) - low) * (UNIT_RANGE / (high - low)) + UNIT_SHIFT


def read_scan(scan: Scan) -> tuple[Tensor, NDArray[np.float64]]:
    """Values (X, Y, Z), float32 on the CPU, and affine to world mm of what :func:`embed_scan` takes."""
    array: Any
    if isinstance(scan, str | PathLike):
        try:
            image = nib.load(scan)
        except nib.filebasedimages.ImageFileError as error:
            raise ValueError(f"{scan} cannot be read as NIfTI: {error}") from error
        array, affine = np.asarray(image.dataobj, dtype=np.float32), image.affine
    elif isinstance(scan, tuple):
        array, affine = scan
    elif hasattr(scan, "affine"):
        array, affine = scan, scan.affine
        if "LPS" in str(getattr(scan, "meta", {}).get("space", "RAS")):
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine)
    else:
        raise ValueError(
            "A scan is a path, a MetaTensor or an (array, affine) pair: a bare array has no place."
        )

    if isinstance(array, Tensor):
        volume = array.detach().to("cpu", torch.float32).as_subclass(Tensor)
    else:
        volume = torch.from_numpy(np.array(array, dtype=np.float32))
    while volume.ndim > 3 and 1 in (volume.shape[0], volume.shape[-1]):
        volume = volume[0] if volume.shape[0] == 1 else volume[..., 0]
    matrix = np.asarray(affine, dtype=np.float64)
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(f"Expected one 3D volume, got shape {tuple(volume.shape)}.")
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise ValueError(f"Expected an invertible 4 x 4 affine, got {matrix.tolist()}.")
    return volume, matrix


def to_grid(volume: Tensor, affine: NDArray[np.float64], *, spacing: float = SPACING_MM) -> GridVolume:
    """Turn a scan to the closest Left, Posterior, Superior axes and resample it linearly to cubic voxels.

    As torchio's Resample, the first voxel's outer edge stays where it is: along an axis of n voxels of s mm
    there are ceil(n s / spacing) voxels, the first centred at index (spacing / s - 1) / 2. Positions beyond
    the outer centres take the border's value (torchio: 0 where they lie outside of the scan altogether). No
    smoothing.

    Args:
        volume: (X, Y, Z).
        affine: (4, 4), voxel index to world mm (RAS); may be oblique, the grid then is as well.
        spacing: mm.

    Returns:
        The volume on its new grid, and the grid's affine.

    Raises:
        ValueError: if ``spacing`` is not positive.
    """
    if not spacing > 0:
        raise ValueError(f"Spacing must be positive, got {spacing} mm.")
    here = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt("LPS"))
    affine = affine @ nib.orientations.inv_ornt_aff(turn, tuple(volume.shape))
    order = [int(axis) for axis in np.argsort(turn[:, 0])]
    volume = volume.permute(order).flip([int(turn[axis, 0]) for axis in order if turn[axis, 1] < 0])

    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    step = spacing / voxel_mm  # input voxels per output voxel
    start = 0.5 * (step - 1.0)
    # by coarsening axes first the intermediate volumes stay small
    for axis in np.argsort(-step):
        size = volume.shape[axis]
        # 1e-3 voxels forgive affines stored in float32, which would add an empty slice
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
    """Where cells lie: fine cell k is centred at voxel 2k + 0.5, a coarse one at 16k + 7.5 (z: 4k + 1.5).

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

    Undoes :func:`cell_to_world`. Rounded, it is the cell that holds the point; it may lie outside of the map.
    """
    inverse = np.linalg.inv(np.asarray(affine, dtype=np.float64))
    voxel_xyz = np.asarray(point_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]
    return (voxel_xyz[..., ::-1] - CENTRES_ZYX[level]) / STRIDES_ZYX[level]
