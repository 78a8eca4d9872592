"""The light decoder: visible tokens in, every token out."""

from __future__ import annotations

import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from custom.encoders.masking import visible_index
from custom.encoders.positions import sincos_positions
from custom.errors import AliceError


class Decoder(nn.Module):
    """A few transformer blocks over all tokens, mask tokens where hidden (Alice, Sec. 3.2; MAE).

    Args:
        in_width: channels of the encoder's tokens.
        patch_voxels: voxels of one token's patch (times channels), P: what ``pixels`` predicts.
        width: channels inside; divisible by 6 for the fixed sin-cos positions (ours: 384).
        depth: number of blocks (ours: 4).
        num_heads: attention heads (ours: 6).

    Raises:
        AliceError: if the width is not a multiple of 6 and of the heads.
    """

    def __init__(
        self, in_width: int, patch_voxels: int, width: int = 384, depth: int = 4, num_heads: int = 6
    ) -> None:
        super().__init__()
        if width % 6 or num_heads < 1 or width % num_heads:
            raise AliceError(
                f"decoder_width = {width} must be a multiple of 6 (its positions) and of decoder_heads = {num_heads}."
            )
        self.width = width
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, 4 * width, num_heads, qkv_bias=True, use_flash_attention=True)
            for _ in range(depth)
        )
        for name, parameter in self.named_parameters():
            if "cross_attn" in name:  # MONAI keeps these although nothing calls them
                parameter.requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch_voxels)
        self.features = nn.Linear(
            width, in_width
        )  # back to the encoder's width, so that phi and psi are alike

    def forward(self, visible: Tensor, grid: tuple[int, int, int], hidden: Tensor | None) -> Tensor:
        """Decode all tokens of a crop.

        Args:
            visible: (B, N_visible, in_width).
            grid: tokens along x, y, z.
            hidden: bool (B, gx, gy, gz), or None if ``visible`` holds every token.

        Returns:
            (B, N, width), normalised.
        """
        embedded = self.embed(visible)
        positions = sincos_positions(tuple(grid), self.width, str(embedded.device)).to(embedded.dtype)
        if hidden is not None:
            index = visible_index(hidden.flatten(1)).to(visible.device, non_blocking=True)
            tokens = self.mask_token.to(embedded.dtype).expand(len(visible), positions.shape[1], -1)
            embedded = tokens.scatter(1, index[..., None].expand_as(embedded), embedded)
        tokens = embedded + positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
