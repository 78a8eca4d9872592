"""The two branches of the method: a student that sees visible tokens, a teacher that sees all of them."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.masking import gather_visible, visible_index
from custom.encoders.tokens import TokenEncoder
from custom.engine.method import Student
from custom.errors import AliceError
from custom.methods.alice.casa import CASA, MultiheadCASA, Nearest, OfficialCASA, Sinkhorn
from custom.methods.decoder import Decoder
from custom.methods.heads import Predictor, ProjectionHead

ALIGNMENTS = ("casa", "casa_official", "multihead", "nearest", "sinkhorn", "direct", "decoder_target", "none")
_OF_PROJECTED = ("casa_official", "nearest", "sinkhorn", "direct")  # these align phi(V), not V


class TeacherOutput(NamedTuple):
    """What the teacher says of an intact, augmented crop."""

    tokens: Tensor  # Y, (B, N, D)
    pooled: Tensor  # GAP(Y), (B, D)


class StudentOutput(NamedTuple):
    """Everything a loss needs; the student's terms carry gradients, the teacher's never do."""

    pixels: Tensor  # (B, N, P) predicted patches
    visible: Tensor  # V, (B, N_visible, C)
    student_pooled: Tensor  # p(GAP(H)), (B, D)
    teacher_pooled: Tensor  # GAP(Y), (B, D)
    student_tokens: Tensor | None  # S, (B, N_visible, D); None without alignment
    teacher_tokens: Tensor | None  # T
    projected: Tensor | None = None  # phi(V), (B, N_visible, D), where it is made


class TeacherBranch(nn.Module):
    """Target encoder and head psi, an exponential moving average of the student's (Alice, Sec. 3.1)."""

    def __init__(
        self, encoder: TokenEncoder, head: ProjectionHead, decoder: Decoder | None, casa: nn.Module | None
    ):
        super().__init__()
        self.encoder, self.head, self.decoder, self.casa = encoder, head, decoder, casa
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, crop: Tensor) -> TeacherOutput:
        """(B, 1, X, Y, Z), nothing hidden -> Y and its average over tokens."""
        encoded = self.encoder(crop)
        features = encoded.tokens
        if self.decoder is not None:
            features = self.decoder.features(self.decoder(features, encoded.grid, None))
        tokens = self.head(features)
        return TeacherOutput(tokens, tokens.mean(dim=1))


class StudentBranch(Student):
    """Online encoder, decoder, head phi, predictors and CASA.

    Args:
        encoder: gives tokens on one grid, visible ones only if asked.
        decoder_width, decoder_depth, decoder_heads: size of the light decoder.
        head_width, bottleneck, prototypes: size of phi and psi, see ``ProjectionHead``.
        predictor: student-side MLP on both similarity terms; False is the paper's literal text.
        alignment: how tokens of the two views are brought together for l_st: ``casa`` (the paper),
            ``casa_official`` (the authors' code), ``multihead`` (CASA with 8 heads), ``nearest`` and ``sinkhorn`` (the context
            token of the highest cosine, or a transport plan of cosines), ``direct`` (phi(V) against the same tokens of Y),
            ``decoder_target`` (all tokens of H against all of Y, as SIM), ``none`` (no l_st).
        casa_teacher: ``shared`` (the paper: T by the very same weights) or ``ema`` (ours: T by an EMA copy).
        pooled_from: ``decoder`` (GAP of H; Alice, Eq. 2) or ``encoder`` (GAP of phi(V); the authors' code).
        teacher_has_decoder: let Y be the target *decoder's* tokens, as the authors' code does.
        inter_volume: what l_dv compares between the two patients: ``pooled`` vectors (the paper), or ``places`` (ours:
            each visible token phi(V) with all tokens of Y, see :mod:`custom.methods.alice.places`).

    Attributes:
        settings: these arguments but the encoder, so that a checkpoint can be built again.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        decoder_width: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        head_width: int = 2048,
        bottleneck: int = 256,
        prototypes: int | None = None,
        predictor: bool = True,
        alignment: str = "casa",
        casa_teacher: str = "shared",
        pooled_from: str = "decoder",
        teacher_has_decoder: bool = False,
        inter_volume: str = "pooled",
    ) -> None:
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "encoder", "__class__")}
        _choose("alignment", alignment, ALIGNMENTS)
        _choose("casa_teacher", casa_teacher, ("shared", "ema"))
        _choose("pooled_from", pooled_from, ("decoder", "encoder"))
        _choose("inter_volume", inter_volume, ("pooled", "places"))
        if inter_volume == "places" and teacher_has_decoder:
            raise AliceError("Places are matched between encoders: leave teacher_has_decoder false.")
        self.places = inter_volume == "places"
        if self.places:  # nothing of H is compared, and no pooled vector is predicted
            pooled_from = "encoder"
        self.encoder = encoder
        self.decoder = Decoder(
            encoder.width, math.prod(encoder.patch), decoder_width, decoder_depth, decoder_heads
        )
        self.head = ProjectionHead(encoder.width, head_width, bottleneck, prototypes)
        width = self.head.out_width
        self.casa: nn.Module | None = None
        if alignment == "casa":
            self.casa = CASA(encoder.width, width, width)
        elif alignment == "casa_official":
            self.casa = OfficialCASA(width)
        elif alignment == "multihead":
            self.casa = MultiheadCASA(encoder.width, width, width)
        elif alignment in ("nearest", "sinkhorn"):
            self.casa = Nearest() if alignment == "nearest" else Sinkhorn()
        self.predict_pooled: nn.Module = Predictor(width) if predictor and not self.places else nn.Identity()
        self.predict_tokens: nn.Module = (
            Predictor(width) if predictor and alignment != "none" else nn.Identity()
        )
        self.alignment, self.casa_teacher, self.pooled_from = alignment, casa_teacher, pooled_from
        self.teacher_has_decoder = teacher_has_decoder
        self.uses_context = pooled_from == "decoder" or alignment not in ("direct", "none")
        if not self.uses_context:  # nothing would ever give it a gradient
            self.decoder.features.requires_grad_(False)

    def make_teacher(self) -> TeacherBranch:
        """A teacher that starts as this student, module for module."""
        own_casa = self.casa is not None and self.casa_teacher == "ema"
        return TeacherBranch(
            copy.deepcopy(self.encoder),
            copy.deepcopy(self.head),
            copy.deepcopy(self.decoder) if self.teacher_has_decoder else None,
            copy.deepcopy(self.casa) if own_casa else None,
        )

    def timed(self) -> dict[str, list[nn.Module]]:
        """Modules by the section of a step that they belong to."""
        heads = [m for m in (self.head, self.casa, self.predict_pooled, self.predict_tokens) if m is not None]
        return {"online": [self.encoder], "decoder": [self.decoder], "heads": heads}

    def forward(
        self,
        crop: Tensor,
        hidden: Tensor,
        target: TeacherOutput,
        teacher_casa: nn.Module | None = None,
        plan: Any = None,
    ) -> StudentOutput:
        """Encode what is visible, decode everything, compare with the teacher.

        Args:
            crop: (B, 1, X, Y, Z) in [0, 1].
            hidden: bool over the encoder's mask units (B, ux, uy, uz).
            target: the teacher's output for the same crops, whose tokens lie on the same grid.
            teacher_casa: the EMA copy of CASA, if ``casa_teacher`` is ``ema``.
            plan: what the encoder's planner made of ``hidden``, if it was made ahead of time.
        """
        encoded = self.encoder(crop, hidden, plan)
        token_hidden = self.encoder.token_mask(hidden)
        decoded = self.decoder(encoded.tokens, encoded.grid, token_hidden)  # (B, N, width)
        student_tokens, teacher_tokens, projected = None, None, None

        context = self.head(self.decoder.features(decoded)) if self.uses_context else None  # H, (B, N, D)
        if self.pooled_from == "encoder" or self.alignment in _OF_PROJECTED:
            projected = self.head(encoded.tokens)  # phi(V), (B, N_visible, D)
        if self.casa is not None:
            assert context is not None
            queries = (
                projected if projected is not None and self.alignment in _OF_PROJECTED else encoded.tokens
            )
            student_tokens = self.casa(queries, context)
            with torch.no_grad():
                teacher_tokens = (teacher_casa or self.casa)(queries, target.tokens)
        elif self.alignment == "direct":
            index = visible_index(token_hidden.flatten(1)).to(crop.device, non_blocking=True)
            student_tokens, teacher_tokens = projected, gather_visible(target.tokens, index)
        elif self.alignment == "decoder_target":
            student_tokens, teacher_tokens = context, target.tokens
        if student_tokens is not None:
            student_tokens = self.predict_tokens(student_tokens)

        pooled = context if self.pooled_from == "decoder" else projected
        assert pooled is not None
        return StudentOutput(
            pixels=self.decoder.pixels(decoded),
            visible=encoded.tokens,
            student_pooled=self.predict_pooled(pooled.mean(dim=1)),
            teacher_pooled=target.pooled,
            student_tokens=student_tokens,
            teacher_tokens=teacher_tokens,
            projected=projected,
        )


def _choose(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise AliceError(f"{name} must be one of {', '.join(options)}; got {value!r}.")
