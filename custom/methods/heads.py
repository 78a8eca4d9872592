"""Projector, predictor and prototypes: what stands between tokens and a similarity loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from custom.errors import AliceError


class ProjectionHead(nn.Module):
    """Three-layer MLP with an l2-normalised bottleneck (phi and psi; Alice, Sec. 3.2, after DINO).

    Args:
        width: channels of the tokens.
        hidden_width: channels of the two inner layers (2048: DINO and the authors' code).
        bottleneck: channels of the result (256: DINO and the authors' code).
        prototypes: if given, a weight-normalised linear layer of this many unit rows follows, so that the
            result is cosines with prototypes (the authors' code: 512); needed by the ``dino`` similarity.
    """

    def __init__(
        self, width: int, hidden_width: int = 2048, bottleneck: int = 256, prototypes: int | None = None
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes: nn.Module | None = None
        if prototypes is not None:
            self.prototypes = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
            lengths = self.prototypes.get_parameter("parametrizations.weight.original0")
            nn.init.ones_(lengths)
            lengths.requires_grad_(False)  # the authors' code fixes every row's length to 1
        self.out_width = prototypes or bottleneck

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., width) -> (..., out_width): unit vectors, or cosines with the prototypes."""
        unit = F.normalize(self.mlp(tokens), dim=-1)
        return unit if self.prototypes is None else self.prototypes(unit)


class Predictor(nn.Sequential):
    """Student-side MLP ``width -> hidden_width -> width`` (BYOL, SimSiam; its sizes are ours)."""

    def __init__(self, width: int, hidden_width: int = 1024) -> None:
        super().__init__(
            nn.Linear(width, hidden_width),
            nn.LayerNorm(
                hidden_width
            ),  # ours: BYOL's batch norm would tie the ranks of a multi-GPU run together
            nn.GELU(),
            nn.Linear(hidden_width, width),
        )


NORMS = ("layer", "batch")


def mlp(widths: Sequence[int], norm: str = "layer", last_norm: bool = True) -> nn.Sequential:
    """Linear layers without bias, each but the last followed by a norm and ReLU (the heads of MoCo v3 and CMAE).

    Args:
        widths: channels in, between and out.
        norm: ``layer`` (ours: any batch, any number of processes) or ``batch`` (the authors).
        last_norm: whether a norm without weights follows the last layer.

    Raises:
        AliceError: for another norm.
    """
    if norm not in NORMS:
        raise AliceError(f"head_norm must be one of {', '.join(NORMS)}; got {norm!r}.")
    kind = nn.LayerNorm if norm == "layer" else nn.BatchNorm1d
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        layers.append(nn.Linear(before, after, bias=False))
        if number < len(widths) - 1:
            layers += [kind(after), nn.ReLU()]
        elif last_norm and norm == "layer":
            layers.append(nn.LayerNorm(after, elementwise_affine=False))
        elif last_norm:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*layers)
