"""Hidden patches as one learnt vector: the input of dense encoders that learn from masks (SimMIM, iBOT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import refine_mask
from custom.encoders.tokens import TokenEncoder, Tokens
from custom.errors import AliceError


class MaskedInput(nn.Module):
    """Runs an encoder on all tokens, where hidden patches are replaced after the patch embedding, before positions.

    It refers to the encoder and does not own it, so that its weights stand in a checkpoint once.

    Args:
        encoder: around a MaskedViT or a MaskedSwin.

    Raises:
        AliceError: for another network; nnFormer embeds by several convolutions, which mix neighbours.
    """

    def __init__(self, encoder: TokenEncoder) -> None:
        super().__init__()
        network = encoder.encoder
        if isinstance(network, MaskedViT):
            width = network.settings["hidden_size"]
        elif isinstance(network, MaskedSwin):
            width = network.settings["embed_dim"]
        else:
            raise AliceError(
                f"This method replaces patch embeddings, and {type(network).__name__} has none that see one patch each. "
                "Take a ViT or a Swin, or another method."
            )
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoder: TokenEncoder, crop: Tensor, hidden: Tensor) -> Tokens:
        """Encode crops (B, 1, X, Y, Z) with units hidden, bool (B, ux, uy, uz); samples may hide unequal numbers."""
        layer = _embedding(encoder)

        def fill(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
            # a Swin's embedding lies on a finer grid than its tokens
            grid = embedded.shape[2:] if embedded.ndim == 5 else encoder.units(tuple(crop.shape[2:]))
            factor = [g // u for g, u in zip(grid, hidden.shape[1:], strict=True)]
            chosen = refine_mask(hidden, factor).to(embedded.device, non_blocking=True)
            token = self.mask_token.to(embedded.dtype)
            if embedded.ndim == 5:  # (B, C, gx, gy, gz)
                return torch.where(chosen[:, None], token.view(1, -1, 1, 1, 1), embedded)
            return torch.where(chosen.flatten(1)[..., None], token, embedded)

        handle = layer.register_forward_hook(fill)
        try:
            found: Tokens = encoder(crop)
        finally:
            handle.remove()  # so that a copy of the encoder, a teacher's, never masks
        return found


def _embedding(encoder: TokenEncoder) -> nn.Module:
    network = encoder.encoder
    if isinstance(network, MaskedViT):
        return network.patch_embedding.patch_embeddings
    layer: nn.Module = network.get_submodule("patch_embed")
    return layer
