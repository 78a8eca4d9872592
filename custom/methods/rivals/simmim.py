"""SimMIM: raw voxels of hidden patches from all tokens, by one linear layer (Xie et al., CVPR 2022, arXiv 2111.09886)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom.encoders.masking import refine_mask
from custom.encoders.patches import empty_patches, patchify
from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student
from custom.methods.mae import MaskedViews
from custom.methods.rivals.masked_input import MaskedInput


class SimmimStudent(Student):
    """A dense encoder, the vector of hidden patches, and a linear layer that predicts voxels.

    Args:
        encoder: gives tokens on one grid.
    """

    def __init__(self, encoder: TokenEncoder) -> None:
        super().__init__()
        self.settings = {}
        self.encoder = encoder
        self.masked = MaskedInput(encoder)
        self.pixels = nn.Linear(encoder.width, math.prod(encoder.patch))

    def forward(self, crop: Tensor, hidden: Tensor) -> Tensor:
        """A crop (B, 1, X, Y, Z) and its mask, bool over mask units -> predicted patches (B, N, P)."""
        return self.pixels(self.masked(self.encoder, crop, hidden).tokens)


def mask_grid(crop_size: Sequence[int], unit: Sequence[int], voxels: int = 32) -> tuple[int, int, int]:
    """Mask units along x, y, z of a crop.

    A unit is ``voxels`` long on each axis (the authors: 32). An axis that is no multiple of this takes the encoder's own
    unit. So does every axis of a crop that would be one unit.
    """
    sides = [
        voxels if side % voxels == 0 and voxels % u == 0 else u
        for side, u in zip(crop_size, unit, strict=True)
    ]
    if math.prod(crop_size) == math.prod(sides):
        sides = list(unit)
    x, y, z = (side // s for side, s in zip(crop_size, sides, strict=True))
    return x, y, z


def build_student(network: nn.Module, settings: dict[str, Any]) -> SimmimStudent:
    """A student as a checkpoint describes it."""
    return SimmimStudent(token_encoder(network), **settings)


class Simmim(Method):
    """Mean absolute error over hidden voxels, intensities in [0, 1].

    Args:
        student: encoder and linear layer.
        skip_empty: leave flat patches out (the authors have no air, and count all).
    """

    name = "simmim"
    terms = ("l_r",)
    meters = ("l_r/tissue",)
    compiles = False

    def __init__(self, student: SimmimStudent, skip_empty: bool = False) -> None:
        self.student: SimmimStudent = student
        self.skip_empty = skip_empty
        self.loss = nn.Module()

    def views(self, batch: dict[str, Any], device: torch.device) -> MaskedViews:
        """The crop as it is, and its mask."""
        return MaskedViews(batch["crop"], batch["hidden"], None)

    def online(self, student: nn.Module, views: MaskedViews, target: None) -> Tensor:
        """Predicted patches (B, N, P)."""
        return student(views.crop, views.hidden)

    def losses(self, output: Tensor, views: MaskedViews, target: None, step: int) -> dict[str, Tensor]:
        """l_r, which is the whole loss; and the same over patches that are not flat."""
        everything, tissue = absolute_errors(output, views.crop, views.hidden, self.student.encoder.patch)
        l_r = tissue if self.skip_empty else everything
        return {"l_r": l_r, "total": l_r, "l_r/tissue": tissue.detach()}

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the linear layer."""
        return {"online": [self.student.encoder], "decoder": [self.student.pixels]}

    def summary(self) -> dict[str, Any]:
        """Settings of the student and the loss."""
        loss = {"skip_empty": self.skip_empty, "reconstruction": "raw in [0, 1]"}
        return {"student": self.student.settings, "loss": loss}


def absolute_errors(
    pixels: Tensor, crop: Tensor, hidden: Tensor, patch: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mean absolute error over hidden voxels: of all patches, and of those that are not flat; in fp32.

    Args:
        pixels: (B, N, P) predicted patches.
        crop: (B, 1, X, Y, Z).
        hidden: bool over mask units (B, ux, uy, uz).
        patch: voxels per token along x, y, z.
    """
    patches = patchify(crop.float(), patch)
    grid = [side // p for side, p in zip(crop.shape[2:], patch, strict=True)]
    factor = [g // u for g, u in zip(grid, hidden.shape[1:], strict=True)]
    chosen = refine_mask(hidden, factor).flatten(1).to(crop.device, non_blocking=True)
    error = (pixels.float() - patches).abs().mean(dim=-1)

    def over(which: Tensor) -> Tensor:  # over the batch, as the authors: sum / (number + 1e-5)
        return (error * which).sum() / (which.sum() + 1e-5 / patches.shape[-1])

    return over(chosen), over(chosen & ~empty_patches(patches))
