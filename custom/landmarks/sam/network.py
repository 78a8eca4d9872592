"""SAM, the Self-supervised Anatomical eMbedding network, and the embedding of a whole scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.errors import AliceError
from custom.landmarks.sam.body_cells import body_cells
from custom.landmarks.sam.scan_grid import (
    SPACING_MM,
    Scan,
    ScanEmbedding,
    Triple,
    hu_to_units,
    read_scan,
    to_grid,
)

EMBEDDING_DIM = 128


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
        AliceError: if either is not positive.

    Attributes:
        settings: the arguments, for the file that carries the weights.
        weights_sha256: of what was loaded, as embeddings made with it are marked; None once it is trained.
    """

    def __init__(self, width: int = 64, embedding_dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        if width < 1 or embedding_dim < 1:
            raise AliceError(f"width and embedding_dim must be positive, got {width} and {embedding_dim}.")
        self.settings = {"width": width, "embedding_dim": embedding_dim}
        self.weights_sha256: str | None = None
        flat, cube = (1, 3, 3), (3, 3, 3)
        self.stem = ConvNorm(1, width, (3, 7, 7))
        self.layer1 = self._layer(width, width, flat, (1, 2, 2))
        self.layer2 = self._layer(width, 2 * width, flat, (1, 2, 2))
        self.layer3 = self._layer(2 * width, 4 * width, cube, (1, 2, 2))
        self.layer4 = self._layer(4 * width, 8 * width, cube, (2, 2, 2))
        self.fine_head = PyramidHead((width, 2 * width, 4 * width), embedding_dim)
        self.coarse_head = PyramidHead((8 * width,), embedding_dim)
        self.apply(_initialise)

    def train(self, mode: bool = True) -> SAM:
        """As in every module. Training clears ``weights_sha256``, since it changes the weights."""
        if mode:
            self.weights_sha256 = None
        return super().train(mode)

    @staticmethod
    def _layer(in_dim: int, dim: int, kernel: Triple, stride: Triple) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_dim, dim, kernel, stride), BasicBlock(dim, dim, kernel, (1, 1, 1)))

    def forward(self, x: Tensor, *, unit_fine: bool = True) -> SAMMaps:
        """Embed a volume.

        Args:
            x: (B, 1, Z, Y, X), 2 mm isotropic, indices growing towards Superior, Posterior and Left, in the
                network's units (:func:`hu_to_units`). Any size with Z >= 2.
            unit_fine: False leaves the fine map unnormalised. A loss that compares few cells can normalise
                just these, which saves a fifth of a training step.

        Returns:
            ``fine`` of floor(Z / 2), ceil(Y / 2), ceil(X / 2) cells, ``coarse`` of half as many along z and
            an eighth along y and x, rounded up at each halving.

        Raises:
            AliceError: if ``x`` has another number of axes or channels, or one slice only.
        """
        _check_volume(x)
        out0 = self.shallow(x)
        out1, out2, out3 = self.deep(out0)
        fine = self.fine_head((out0, out1, out2))
        return SAMMaps(unit_length(fine) if unit_fine else fine, unit_length(self.coarse_head((out3,))))

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
        """Compute ``forward`` in evaluation mode, in slabs along z where it needs much memory.

        The stem and the first layer run at full resolution, so they take slabs of ``slab`` slices with a halo
        of two slices; their receptive field reaches only one slice beyond a pair. The fine head's last
        convolution takes slabs with a halo of one cell. Everything in between is small and runs on the whole
        volume. So the result equals ``forward``'s everywhere, also at the borders of slabs, up to rounding.

        Args:
            x: as for :meth:`forward`; slabs are moved to the network's device one at a time.
            slab: slices per slab, even.

        Returns:
            As :meth:`forward`, on the network's device.

        Raises:
            AliceError: if the network is in training mode, ``slab`` is odd or not positive, or as
                ``forward``.
        """
        if self.training:
            raise AliceError("Slabs would each have their own batch statistics: call model.eval() first.")
        if slab < 2 or slab % 2:
            raise AliceError(f"A slab needs an even number of slices (they are pooled in pairs), got {slab}.")
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


def embed_scan(model: SAM, scan: Scan, *, spacing: float = SPACING_MM, slab: int = 32) -> ScanEmbedding:
    """Embed a CT scan: set orientation, spacing and units as the authors' reader does, then run the network.

    Args:
        model: in evaluation mode; its device is used.
        scan: path of a NIfTI file, MONAI's MetaTensor (X, Y, Z) or (1, X, Y, Z), or an (array, affine) pair;
            values in HU, affines from voxel index to world mm (RAS).
        spacing: mm of the network's grid; the published network was trained at 2 mm.
        slab: slices per slab, even; see :meth:`SAM.embed`.

    Returns:
        The embeddings, on the model's device, with the cells that hold body (all cells if no body is found)
        and the checksum of the weights if it is known.

    Raises:
        FileNotFoundError: if there is no such file.
        AliceError: if the scan is not one 3D volume with an invertible affine, is too thin, or as
            :meth:`SAM.embed`.
    """
    volume, affine = read_scan(scan)
    grid = to_grid(volume, affine, spacing=spacing)
    x = hu_to_units(grid.volume).permute(2, 1, 0)[None, None]  # (1, 1, Z, Y, X)
    maps = model.embed(x, slab=slab)
    size_x, size_y, size_z = grid.volume.shape
    embedding = ScanEmbedding(
        maps.fine[0],
        maps.coarse[0],
        grid.affine,
        (size_x, size_y, size_z),
        weights_sha256=getattr(model, "weights_sha256", None),
    )
    return replace(embedding, body=body_cells(volume.numpy(), affine, embedding))


def unit_length(maps: Tensor) -> Tensor:
    """Divide by the Euclidean norm over channels, in float32."""
    return F.normalize(maps.float(), dim=1)


def _initialise(module: nn.Module) -> None:
    """Kaiming initialisation, fan-out; the authors use it when no ImageNet weights are given."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FineMap(nn.Module):
    """SAM's fine map alone, for tools that take one output, such as MONAI's ``verify_net_in_out``."""

    def __init__(self, sam: SAM) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, x: Tensor) -> Tensor:
        return self.sam(x).fine


def _check_volume(x: Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != 1 or x.shape[2] < 2 or min(x.shape[3:]) < 1:
        raise AliceError(f"SAM embeds volumes (B, 1, Z, Y, X) with two slices or more, got {tuple(x.shape)}.")
