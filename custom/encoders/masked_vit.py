"""MONAI's ViT that computes visible tokens only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from monai.utils import ensure_tuple, ensure_tuple_rep
from torch import Tensor, nn

from custom.encoders.masking import visible_index
from custom.encoders.positions import positions_at, quiet_meshgrid, resize_positions
from custom.errors import AliceError


class MaskedViT(ViT):
    """MONAI's ViT; with ``hidden=None`` on a crop of ``img_size`` it computes what its parent computes.

    The constructor is MONAI's. For crops of another size the position table is interpolated to their grid.
    MONAI's parameters that take no part in the forward pass (cross attention that is switched off) stay in
    the state dict, but are frozen, since they never receive a gradient.

    Attributes:
        settings: the constructor's arguments as plain values, for the file that carries the weights.
        patch: voxels per token along x, y, z.
        grid: tokens along x, y, z at ``img_size``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(ViT.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings = {k: v for k, v in bound.arguments.items() if k != "self"}
        if settings["spatial_dims"] != 3 or settings["classification"]:
            raise AliceError(
                "MaskedViT encodes 3D volumes without a class token: spatial_dims=3, classification=False."
            )
        if len(ensure_tuple(settings["img_size"])) not in (1, 3):
            raise AliceError(f"The crop must have three sides, got {settings['img_size']}.")
        self._check_sizes(settings)
        with quiet_meshgrid():
            super().__init__(*args, **kwargs)
        self.patch: tuple[int, int, int] = ensure_tuple_rep(settings["patch_size"], 3)
        size = ensure_tuple_rep(settings["img_size"], 3)
        self.grid: tuple[int, int, int] = tuple(s // p for s, p in zip(size, self.patch, strict=True))
        self.settings = settings | {"img_size": list(size), "patch_size": list(self.patch)}
        for name, parameter in self.named_parameters():
            if "cross_attn" in name:
                parameter.requires_grad_(False)

    @staticmethod
    def _check_sizes(settings: dict[str, Any]) -> None:
        size, patch = ensure_tuple_rep(settings["img_size"], 3), ensure_tuple_rep(settings["patch_size"], 3)
        for axis, s, p in zip("xyz", size, patch, strict=True):
            if s % p:
                raise AliceError(
                    f"Crop side {axis} = {s} is not a multiple of the patch ({p}): take {s // p * p or p} or {(s // p + 1) * p}."
                )

    def forward(self, x: Tensor, *, hidden: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode a crop.

        Args:
            x: (B, C, X, Y, Z); sides are multiples of the patch.
            hidden: bool (B, gx, gy, gz), True where a token is hidden, the same number in every sample.
                Leave it on the CPU, so that no GPU waits for the counting.

        Returns:
            Normalised tokens (B, N_visible, hidden_size) in grid order, and the list of every block's
            output, as MONAI's ViT returns them.

        Raises:
            AliceError: on sides that are not multiples of the patch, or masks that do not fit the crop.
        """
        grid = self._grid_of(x)
        if hidden is not None and (tuple(hidden.shape[1:]) != grid or hidden.shape[0] != x.shape[0]):
            raise AliceError(
                f"Mask {tuple(hidden.shape)} does not fit {x.shape[0]} crop(s) of {grid} tokens."
            )
        if (hidden is None or not hidden.any()) and grid == self.grid:
            return super().forward(x)

        positions = resize_positions(self.patch_embedding.position_embeddings, self.grid, grid)
        if hidden is None:
            embedded = self._embed(x) + positions
        else:
            index = visible_index(hidden.flatten(1)).to(x.device, non_blocking=True)
            embedded = self._embed_visible(x, index) + positions_at(positions, index)
        tokens = self.patch_embedding.dropout(embedded)  # (B, N_visible, C)
        states = []
        for block in self.blocks:
            tokens = block(tokens)
            states.append(tokens)
        return self.norm(tokens), states

    def _grid_of(self, x: Tensor) -> tuple[int, ...]:
        for axis, side, patch in zip("xyz", x.shape[2:], self.patch, strict=True):
            if side % patch:
                raise AliceError(f"Crop side {axis} = {side} is not a multiple of the patch ({patch}).")
        return tuple(side // patch for side, patch in zip(x.shape[2:], self.patch, strict=True))

    def _embed(self, x: Tensor) -> Tensor:
        """Patch embedding without positions: (B, C, X, Y, Z) -> (B, N, hidden_size)."""
        embedded = self.patch_embedding.patch_embeddings(x)
        return embedded if embedded.ndim == 3 else embedded.flatten(2).transpose(1, 2)

    def _embed_visible(self, x: Tensor, index: Tensor) -> Tensor:
        """MONAI's patch embedding, on the visible patches alone."""
        batch, channels = x.shape[:2]
        (gx, gy, gz), (px, py, pz) = self._grid_of(x), self.patch
        patches = x.view(batch, channels, gx, px, gy, py, gz, pz).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.reshape(batch, gx * gy * gz, channels, px, py, pz)
        row = torch.arange(batch, device=x.device)[:, None]
        visible = patches[row, index].flatten(0, 1)  # (B * N_visible, C, px, py, pz)
        layer = self.patch_embedding.patch_embeddings
        if isinstance(layer, nn.Conv3d):  # on one patch it is a matrix product, which is ten times faster
            embedded = F.linear(visible.flatten(1), layer.weight.flatten(1), layer.bias)
        else:
            embedded = self._embed(visible)
        return embedded.view(batch, index.shape[1], -1)
