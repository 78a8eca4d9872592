"""MAE: hidden patches are predicted from visible ones (He et al., CVPR 2022, arXiv 2111.06377)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student
from custom.methods.decoder import Decoder
from custom.methods.terms import masked_reconstruction


class MaskedViews(NamedTuple):
    """One masked crop a sample."""

    crop: Tensor  # (B, 1, X, Y, Z)
    hidden: Tensor  # bool over mask units (B, ux, uy, uz), on the CPU
    plan: Any  # what the encoder's planner made of it, or None


class MaeStudent(Student):
    """Encoder of visible tokens, and a light decoder of all.

    Args:
        encoder: gives tokens on one grid, visible ones only.
        decoder_width, decoder_depth, decoder_heads: size of the decoder (Alice's; the authors: 512, 8, 16).

    Attributes:
        settings: these arguments but the encoder, so that a checkpoint can be built again.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        decoder_width: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
    ) -> None:
        super().__init__()
        self.settings = {
            "decoder_width": decoder_width,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
        }
        self.encoder = encoder
        voxels = math.prod(encoder.patch)
        self.decoder = Decoder(encoder.width, voxels, decoder_width, decoder_depth, decoder_heads)
        self.decoder.features.requires_grad_(False)  # what only Alice asks for

    def forward(self, crop: Tensor, hidden: Tensor, plan: Any = None) -> Tensor:
        """A crop (B, 1, X, Y, Z) and its mask, bool over mask units -> predicted patches (B, N, P)."""
        encoded = self.encoder(crop, hidden, plan)
        decoded = self.decoder(encoded.tokens, encoded.grid, self.encoder.token_mask(hidden))
        return self.decoder.pixels(decoded)


def build_student(network: nn.Module, settings: dict[str, Any]) -> MaeStudent:
    """A student as a checkpoint describes it."""
    return MaeStudent(token_encoder(network), **settings)


class Mae(Method):
    """Masked reconstruction alone: no teacher, one crop a sample.

    Its l_r is the mean per crop; Alice's is twice that, since it sums Q and K.

    Args:
        student: encoder and decoder.
        skip_empty: leave hidden patches of one flat value out (ours; the authors have no air).
    """

    name = "mae"
    terms = ("l_r",)

    def __init__(self, student: MaeStudent, skip_empty: bool = True) -> None:
        self.student: MaeStudent = student
        self.skip_empty = skip_empty
        self.loss = nn.Module()

    def views(self, batch: dict[str, Any], device: torch.device) -> MaskedViews:
        """The crop as it is, and its mask."""
        plans = batch.get("plans", ())
        return MaskedViews(batch["crop"], batch["hidden"], plans[0] if len(plans) == 1 else None)

    def online(self, student: nn.Module, views: MaskedViews, target: None) -> Tensor:
        """Predicted patches (B, N, P)."""
        return student(*views)

    def losses(self, output: Tensor, views: MaskedViews, target: None, step: int) -> dict[str, Tensor]:
        """l_r, which is the whole loss."""
        patch, skip = self.student.encoder.patch, self.skip_empty
        l_r = masked_reconstruction(output, views.crop, views.hidden, patch, skip_empty=skip)
        return {"l_r": l_r, "total": l_r}

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the decoder."""
        return {"online": [self.student.encoder], "decoder": [self.student.decoder]}

    def summary(self) -> dict[str, Any]:
        """Settings of the student and the loss."""
        return {"student": self.student.settings, "loss": {"skip_empty": self.skip_empty}}
