"""One token grid for the method, whatever the encoder (DESIGN decision 3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from custom.encoders.masked_vit import MaskedViT


class Tokens(NamedTuple):
    """Tokens of a crop in grid order, and the grid they lie on."""

    tokens: Tensor  # (B, N or N_visible, C)
    grid: tuple[int, int, int]


class TokenEncoder(nn.Module):
    """An encoder as the method sees it: tokens out, hidden units in.

    Attributes:
        encoder: the network that is kept after pre-training, with its own state dict.
        width: channels C of a token.
        patch: voxels per token along x, y, z.
        unit: voxels per mask unit; a multiple of ``patch``.
    """

    encoder: nn.Module
    width: int
    patch: tuple[int, int, int]
    unit: tuple[int, int, int]

    def forward(self, crop: Tensor, hidden: Tensor | None = None) -> Tokens:
        """(B, 1, X, Y, Z) and bool (B, ux, uy, uz) or None -> the visible tokens."""
        raise NotImplementedError

    def token_mask(self, hidden: Tensor) -> Tensor:
        """A mask over units (B, ux, uy, uz) as a mask over tokens (B, gx, gy, gz)."""
        raise NotImplementedError

    def units(self, crop_size: tuple[int, ...]) -> tuple[int, int, int]:
        """Mask units along x, y, z of a crop.

        Raises:
            ValueError: naming the side that is not a multiple of the unit, and the nearest that are.
        """
        counts = []
        for axis, side, unit in zip("xyz", crop_size, self.unit, strict=True):
            if side % unit or side < unit:
                lower, upper = max(unit, side // unit * unit), (side // unit + 1) * unit
                raise ValueError(
                    f"crop_size: side {axis} = {side} is not a multiple of the mask unit ({unit} voxels); "
                    f"take {lower} or {upper}."
                )
            counts.append(side // unit)
        return counts[0], counts[1], counts[2]


class ViTTokens(TokenEncoder):
    """A ViT's patches are the tokens."""

    def __init__(self, encoder: MaskedViT) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = encoder.settings["hidden_size"]
        self.patch = self.unit = encoder.patch

    def forward(self, crop: Tensor, hidden: Tensor | None = None) -> Tokens:
        tokens, _ = self.encoder(crop, hidden=hidden)
        return Tokens(tokens, self.units(tuple(crop.shape[2:])))

    def token_mask(self, hidden: Tensor) -> Tensor:
        return hidden


def token_encoder(encoder: nn.Module) -> TokenEncoder:
    """Wrap an encoder for the method.

    Raises:
        ValueError: if the network is none that the method knows.
    """
    if isinstance(encoder, MaskedViT):
        return ViTTokens(encoder)
    raise ValueError(f"{type(encoder).__name__} is no encoder for pre-training: use MaskedViT.")
