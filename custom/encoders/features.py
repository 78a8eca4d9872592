"""An encoder as a plain network: a crop in, a map of tokens out."""

from __future__ import annotations

from torch import Tensor, nn

from custom.encoders.tokens import token_encoder


class FeatureMap(nn.Module):
    """The method's tokens of an encoder, laid out on their grid; state dict keys are the encoder's own.

    Args:
        encoder: a network that ``token_encoder`` knows.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.tokens = token_encoder(encoder)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, C, gx, gy, gz), one token per patch."""
        found = self.tokens(x)
        return found.tokens.transpose(1, 2).reshape(len(x), -1, *found.grid)

    def load_encoder_state(self, state: dict[str, Tensor]) -> FeatureMap:
        """Fill the encoder, strictly; returns itself, so that a config can chain it."""
        self.tokens.encoder.load_state_dict(state)
        return self
