"""CMAE: MAE, and a contrast with a slightly shifted crop (Huang et al., TPAMI 2023, arXiv 2207.13532)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.decoder import Decoder
from custom.methods.heads import mlp
from custom.methods.rivals.two_views import (
    AlikeAlarm,
    Teacher,
    log_of,
    no_batch_norm_in_small_batches,
    with_batch_norm_of_all,
)
from custom.methods.terms import info_nce, masked_reconstruction
from custom.processes import world_size


class CmaeViews(NamedTuple):
    """What is seen of two crops of one scan."""

    crop: Tensor  # (B, 1, X, Y, Z), crop 1 as it is
    hidden: Tensor  # bool over mask units (B, ux, uy, uz), of crop 1, on the CPU
    plan: Any  # what the encoder's planner made of it, or None
    target: Tensor  # (B, 1, X, Y, Z), crop 2, augmented


class CmaeOutput(NamedTuple):
    """What the student says."""

    pixels: Tensor  # (B, N, P)
    vector: Tensor  # (B, D)


class CmaeStudent(Student):
    """Encoder of visible tokens, a decoder of pixels, a decoder of features, and heads on the mean feature.

    Args:
        encoder: gives tokens on one grid, visible ones only.
        decoder_width, decoder_depth, decoder_heads: of the pixel decoder (the authors: 512, 8, 16).
        feature_depth: blocks of the feature decoder (the authors: 2).
        hidden_width, out_width: of projector and predictor (the authors: 1536, 256).
        head_norm: ``layer`` (ours) or ``batch`` (the authors).
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        decoder_width: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        feature_depth: int = 2,
        hidden_width: int = 1536,
        out_width: int = 256,
        head_norm: str = "layer",
    ) -> None:
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "encoder", "__class__")}
        self.encoder, self.head_norm = encoder, head_norm
        voxels = math.prod(encoder.patch)
        self.decoder = Decoder(encoder.width, voxels, decoder_width, decoder_depth, decoder_heads)
        self.feature_decoder = Decoder(encoder.width, voxels, decoder_width, feature_depth, decoder_heads)
        self.decoder.features.requires_grad_(False)
        self.feature_decoder.pixels.requires_grad_(False)  # each decoder is asked for one thing
        self.projector = mlp([encoder.width, hidden_width, out_width], head_norm, last_norm=False)
        self.predictor = mlp([out_width, hidden_width, out_width], head_norm, last_norm=False)

    def forward(self, crop: Tensor, hidden: Tensor, plan: Any = None) -> CmaeOutput:
        """A crop (B, 1, X, Y, Z) and its mask, bool over mask units -> predicted patches and a vector."""
        encoded = self.encoder(crop, hidden, plan)
        token_hidden = self.encoder.token_mask(hidden)
        pixels = self.decoder.pixels(self.decoder(encoded.tokens, encoded.grid, token_hidden))
        decoded = self.feature_decoder(encoded.tokens, encoded.grid, token_hidden)
        mean = self.feature_decoder.features(decoded).mean(dim=1)
        return CmaeOutput(pixels, self.predictor(self.projector(mean)))


def build_student(network: nn.Module, settings: dict[str, Any]) -> CmaeStudent:
    """A student as a checkpoint describes it."""
    return CmaeStudent(token_encoder(network), **settings)


class Cmae(Method):
    """l_r of MAE, and l_c: the masked crop's vector finds the teacher's vector of the same scan.

    Args:
        student: encoder, decoders and heads.
        view: changes intensities of crop 2.
        temperature: of the cosines (the authors: 0.07).
        weight_r, weight_c: of the terms (the authors: 1, 1).
        skip_empty: leave hidden patches of one flat value out of l_r (ours).
    """

    name = "cmae"
    terms = ("l_r", "l_c")
    meters = ("l_c/alike",)

    def __init__(
        self,
        student: CmaeStudent,
        view: Any = None,
        temperature: float = 0.07,
        weight_r: float = 1.0,
        weight_c: float = 1.0,
        skip_empty: bool = True,
    ) -> None:
        if not temperature > 0 or min(weight_r, weight_c) < 0:
            raise AliceError(
                f"temperature must be positive, weights not negative: {temperature=}, {weight_r=}, {weight_c=}."
            )
        self.student: CmaeStudent = student
        self.teacher = Teacher(encoder=student.encoder, projector=student.projector)
        self.loss: AlikeAlarm = AlikeAlarm()
        self.view, self.temperature, self.skip_empty = view, temperature, skip_empty
        self.weight_r, self.weight_c = weight_r, weight_c

    def views(self, batch: dict[str, Any], device: torch.device) -> CmaeViews:
        """Crop 1 and its mask; crop 2 with intensities changed."""
        why = no_batch_norm_in_small_batches(self.student.head_norm, len(batch["crop_1"]))
        if why:
            raise AliceError(why)
        second = batch["crop_2"]
        if self.view is not None:
            second = self.view(second, batch["seed"])
        plans = batch.get("plans", ())
        return CmaeViews(batch["crop_1"], batch["hidden_1"], plans[0] if len(plans) == 1 else None, second)

    def target(self, views: CmaeViews) -> Tensor:
        """The teacher's vectors (B, D) of crop 2."""
        assert isinstance(self.teacher, Teacher)
        return self.teacher.project("projector", self.teacher.tokens(views.target).mean(dim=1))

    def online(self, student: nn.Module, views: CmaeViews, target: Tensor) -> CmaeOutput:
        """Predicted patches and vectors of crop 1."""
        return student(views.crop, views.hidden, views.plan)

    def losses(self, output: CmaeOutput, views: CmaeViews, target: Tensor, step: int) -> dict[str, Tensor]:
        """l_r, l_c; and l_c's value when all vectors are alike."""
        patch, skip = self.student.encoder.patch, self.skip_empty
        l_r = masked_reconstruction(output.pixels, views.crop, views.hidden, patch, skip_empty=skip)
        l_c = 2 * self.temperature * info_nce(output.vector, target, self.temperature)
        alike = 2 * self.temperature * log_of(len(target) * world_size())
        self.loss.see(l_c.detach(), alike)
        total = self.weight_r * l_r + self.weight_c * l_c
        return {"l_r": l_r, "l_c": l_c, "total": total, "l_c/alike": l_c.new_full((), alike)}

    def vectors(self, output: CmaeOutput, target: Tensor, batch: dict[str, Any]) -> Vectors:
        """Predictions and the teacher's vectors."""
        return Vectors(output.vector.detach(), target, list(batch["patient"]))

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """All vectors alike."""
        return self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder, the decoders and the heads."""
        own = self.student
        return {
            "online": [own.encoder],
            "decoder": [own.decoder, own.feature_decoder],
            "heads": [own.projector, own.predictor],
        }

    def wrapped(self, device: torch.device) -> nn.Module:
        """The student for several processes; batch norm becomes that of all of them."""
        if self.student.head_norm == "batch":
            with_batch_norm_of_all(self.student, self.teacher, device)
        return super().wrapped(device)

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        names = ("temperature", "weight_r", "weight_c", "skip_empty")
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": {n: getattr(self, n) for n in names}, "view": view}
