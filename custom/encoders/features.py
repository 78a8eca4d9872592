"""An encoder as a plain network: a crop in, a map of features out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from custom.encoders.tokens import token_encoder


class FeatureMap(nn.Module):
    """An encoder's tokens, laid out on their grid. It also loads the encoder's own state dict.

    Args:
        encoder: a network that ``token_encoder`` knows.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.tokens = token_encoder(encoder)
        self.register_load_state_dict_pre_hook(_place_encoder_keys)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, C, gx, gy, gz), one token per patch."""
        found = self.tokens(x)
        # no len(x): a trace would fix the batch size
        return found.tokens.transpose(1, 2).unflatten(2, found.grid)

    def with_weights(self, state: dict[str, Tensor]) -> FeatureMap:
        """Fill the encoder strictly; returns itself, so that a config can chain the call."""
        self.load_state_dict(state)
        return self


def _place_encoder_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of an exported encoder to those of the encoder inside."""
    own = f"{prefix}tokens."
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own)]:
        state[f"{own}encoder.{key.removeprefix(prefix)}"] = state.pop(key)
