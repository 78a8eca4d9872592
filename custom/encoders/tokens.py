"""One token grid for every encoder: tokens out, with the grid they lie on (docs/design.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.encoders.masked_swin import MaskedSwin, VisibleFeatures
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import gather_visible, refine_mask, visible_index
from custom.encoders.nnformer import NNFormer, NNFormerEncoder
from custom.encoders.window_plan import plan_for
from custom.errors import AliceError


class Tokens(NamedTuple):
    """Tokens of a crop in grid order, and the grid they lie on."""

    tokens: Tensor  # (B, N or N_visible, C)
    grid: tuple[int, int, int]


class TokenEncoder(nn.Module):
    """An encoder as a method sees it: a crop and a mask of hidden units in, tokens out.

    Attributes:
        encoder: the network to keep after pre-training, with its own state dict.
        width: channels C of a token.
        patch: voxels per token along x, y, z.
        unit: voxels per mask unit; a multiple of ``patch``.
    """

    encoder: nn.Module
    width: int
    patch: tuple[int, int, int]
    unit: tuple[int, int, int]

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        """(B, 1, X, Y, Z) and bool (B, ux, uy, uz) or None -> the visible tokens.

        ``plan`` is what :meth:`planner` made from ``hidden`` in advance; if it is None, it is made here.
        """
        raise NotImplementedError

    def token_mask(self, hidden: Tensor) -> Tensor:
        """Turn a mask over units (B, ux, uy, uz) into a mask over tokens (B, gx, gy, gz)."""
        return refine_mask(hidden, tuple(u // p for u, p in zip(self.unit, self.patch, strict=True)))

    def planner(self) -> Callable[[Tensor], Any] | None:
        """A picklable function for a loader's workers that makes a plan from a mask; None if none is needed."""
        return None

    def units(self, crop_size: tuple[int, ...]) -> tuple[int, int, int]:
        """Number of mask units along x, y, z of a crop.

        Raises:
            AliceError: if a side is not a multiple of the unit; names the side and the nearest multiples.
        """
        if len(crop_size) != 3:
            raise AliceError(f"crop_size must be three numbers of voxels, got {list(crop_size)}.")
        counts = []
        for axis, side, unit in zip("xyz", crop_size, self.unit, strict=True):
            if side % unit or side < unit:
                lower, upper = max(unit, side // unit * unit), (side // unit + 1) * unit
                raise AliceError(
                    f"crop_size: side {axis} = {side} is not a multiple of the mask unit ({unit} voxels); "
                    f"take {lower} or {upper}."
                )
            counts.append(side // unit)
        return counts[0], counts[1], counts[2]


class ViTTokens(TokenEncoder):
    """A ViT: its patches are the tokens."""

    def __init__(self, encoder: MaskedViT) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = encoder.settings["hidden_size"]
        self.patch = self.unit = encoder.patch

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        tokens, _ = self.encoder(crop, hidden=hidden)
        return Tokens(tokens, self.units(tuple(crop.shape[2:])))


class SwinTokens(TokenEncoder):
    """A Swin: its stride-16 and stride-32 maps, each through a linear layer; so all stages learn (ours)."""

    def __init__(self, encoder: MaskedSwin) -> None:
        super().__init__()
        self.encoder = encoder
        side = encoder.unit // 2
        self.unit, self.patch = (encoder.unit,) * 3, (side,) * 3
        fine = 8 * encoder.settings["embed_dim"]
        self.width = 2 * fine
        self.from_fine, self.from_coarse = (
            nn.Linear(fine, self.width),
            nn.Linear(2 * fine, self.width, bias=False),
        )

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        ux, uy, uz = self.units(tuple(crop.shape[2:]))
        found = self.encoder(crop, hidden=hidden, plan=plan)
        if not isinstance(found, VisibleFeatures):  # nothing hidden: five dense maps
            fine, coarse = found[3], F.interpolate(found[4], scale_factor=2, mode="nearest")
            return Tokens(
                self._fuse(*(m.flatten(2).transpose(1, 2) for m in (fine, coarse))), (2 * ux, 2 * uy, 2 * uz)
            )
        fine, coarse = found.maps[3], found.maps[4].expand(-1, -1, -1, 2, 2, 2)  # (B, V, C, 2, 2, 2)
        tokens = self._fuse(*(m.flatten(3).transpose(2, 3).flatten(1, 2) for m in (fine, coarse)))
        if hidden is None:
            raise AliceError("A plan alone does not say where its tokens lie: pass hidden too.")
        order = _grid_order(hidden).to(tokens.device, non_blocking=True)
        return Tokens(gather_visible(tokens, order), (2 * ux, 2 * uy, 2 * uz))

    def _fuse(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return self.from_fine(fine) + self.from_coarse(coarse)

    def planner(self) -> Callable[[Tensor], Any]:
        return partial(plan_for, settings=self.encoder.settings)


class NNFormerTokens(TokenEncoder):
    """nnFormer: its bottleneck. Convolutions mix neighbours, so it runs densely, with hidden voxels set to 0."""

    def __init__(self, encoder: NNFormerEncoder, width: int) -> None:
        super().__init__()
        self.encoder, self.width = encoder, width
        for norm in list(encoder.norms)[:-1]:  # only the segmentation decoder uses these
            norm.requires_grad_(False)
        x, y, z = encoder.stride
        self.patch = self.unit = (x, y, z)

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        tokens = self.encoder(crop, hidden=hidden)[-1].flatten(2).transpose(1, 2)
        if hidden is not None:
            tokens = gather_visible(
                tokens, visible_index(hidden.flatten(1)).to(tokens.device, non_blocking=True)
            )
        return Tokens(tokens, self.units(tuple(crop.shape[2:])))


def _grid_order(hidden: Tensor) -> Tensor:
    """The order (B, 8 V) that sorts visible stride-16 tokens, eight for each unit, into grid order."""
    ux, uy, uz = hidden.shape[1:]
    numbers = (
        torch.arange(8 * ux * uy * uz).view(ux, 2, uy, 2, uz, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8)
    )
    units = visible_index(hidden.flatten(1).cpu())  # (B, V)
    return numbers[units].flatten(1).argsort(dim=1)


def token_encoder(encoder: nn.Module) -> TokenEncoder:
    """Wrap an encoder for pre-training.

    Raises:
        AliceError: for another network.
    """
    if isinstance(encoder, MaskedViT):
        return ViTTokens(encoder)
    if isinstance(encoder, MaskedSwin):
        return SwinTokens(encoder)
    if isinstance(encoder, NNFormer):
        return NNFormerTokens(encoder.encoder, encoder.settings["embed_dim"] * 8)
    raise AliceError(
        f"{type(encoder).__name__} is not an encoder for pre-training: use MaskedViT, MaskedSwin or NNFormer."
    )
