"""The three terms of the method and their sum: l_r + l_dv + l_st (Alice, Eq. 1, 2, 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.encoders.masking import gather_visible, refine_mask, visible_index
from custom.encoders.patches import empty_patches, patchify
from custom.engine.schedules import linear_ramp
from custom.errors import AliceError
from custom.methods.alice.branch import StudentOutput
from custom.methods.alice.places import PlaceLoss
from custom.methods.terms import (
    centred_cross_entropy,
    cosine_distance,
    info_nce,
    masked_reconstruction,
    move_centre,
)

SIMILARITIES = ("cosine", "dino", "infonce")
RECONSTRUCTIONS = ("masked", "raw", "whole")


class Placed(NamedTuple):
    """What place matching needs of a batch of crops Q and K stacked."""

    tokens: Tensor  # Y, (2B, N, D), of the teacher's views
    places: Tensor  # (2B, N, 3) mm: where each token of a crop lies in the other crop; NaN where nobody knows
    centres: Tensor  # (2B, N, 3) mm: which place of its own crop each token of the teacher's view shows


class AliceLoss(nn.Module):
    """All terms of the method, each summed over Q and K, in fp32.

    Args:
        patch: voxels per token along x, y, z.
        similarity: ``cosine`` (the paper), ``dino`` (centred cross entropy; the authors' code),
            ``infonce`` (pooled vectors against the other samples of the batch, tokens against the other
            tokens of their crop; ours).
        weight_r, weight_dv, weight_st: factors of the terms; the paper adds them with 1, 1, 1.
        reconstruction: ``masked`` (hidden patches, normalised; the paper), ``raw`` (hidden patches, on one scale for
            all; ours) or ``whole`` (all voxels, raw intensities; the authors' code).
        skip_empty: leave hidden patches of one flat value out of l_r (ours).
        temperature: of ``infonce`` (ours: 0.2) and of the student in ``dino`` (the authors' code: 0.1);
            None takes these.
        teacher_temperature: of the teacher in ``dino``, from and to (the authors' code: 0.008 to 0.01,
            linear over the first ``teacher_warmup`` steps).
        teacher_warmup: steps of that ramp.
        width: channels of pooled and token vectors; needed for ``dino``, which keeps running centres.
        places: with it l_dv matches places (ours) instead of comparing pooled vectors.
        similarity_start, similarity_ramp: l_dv and l_st are off before the first step and full after start + ramp (ours).

    Attributes:
        settings: these arguments but those that follow from the network or the run's length.
    """

    centre_pooled: Tensor
    centre_tokens: Tensor

    def __init__(
        self,
        patch: Sequence[int] = (16, 16, 16),
        similarity: str = "cosine",
        weight_r: float = 1.0,
        weight_dv: float = 1.0,
        weight_st: float = 1.0,
        reconstruction: str = "masked",
        skip_empty: bool = True,
        temperature: float | None = None,
        teacher_temperature: Sequence[float] = (0.008, 0.01),
        teacher_warmup: int = 0,
        width: int = 256,
        places: PlaceLoss | None = None,
        similarity_start: int = 0,
        similarity_ramp: int = 0,
    ) -> None:
        super().__init__()
        derived = ("self", "__class__", "patch", "width", "teacher_warmup", "places")
        self.settings = {k: v for k, v in locals().items() if k not in derived and k != "derived"}
        self.settings |= {"places": None if places is None else places.settings}
        self.places = places
        if similarity not in SIMILARITIES:
            raise AliceError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}.")
        if reconstruction not in RECONSTRUCTIONS:
            raise AliceError(
                f"reconstruction must be one of {', '.join(RECONSTRUCTIONS)}; got {reconstruction!r}."
            )
        for name, weight in (("weight_r", weight_r), ("weight_dv", weight_dv), ("weight_st", weight_st)):
            if not weight >= 0 or math.isinf(weight):
                raise AliceError(f"{name} must be 0 or more, got {weight}.")
        self.patch = tuple(patch)
        self.similarity, self.reconstruction, self.skip_empty = similarity, reconstruction, skip_empty
        self.weights = {"l_r": weight_r, "l_dv": weight_dv, "l_st": weight_st}
        self.temperature = temperature or (0.1 if similarity == "dino" else 0.2)
        self.teacher_temperature, self.teacher_warmup = tuple(teacher_temperature), teacher_warmup
        self.similarity_start, self.similarity_ramp = similarity_start, similarity_ramp
        self.register_buffer("centre_pooled", torch.zeros(width))
        self.register_buffer("centre_tokens", torch.zeros(width))

    def forward(
        self,
        output: StudentOutput,
        crop: Tensor,
        hidden: Tensor,
        step: int = 0,
        placed: Placed | None = None,
    ) -> dict[str, Tensor]:
        """Every term and their weighted sum.

        Args:
            output: of the student for Q and K stacked along the batch: the first half is Q, the second K.
            crop: (2B, 1, X, Y, Z) what the student was to reconstruct.
            hidden: bool over mask units (2B, ux, uy, uz).
            step: number of the optimizer's step, for the teacher's temperature and the warm-up of l_dv and l_st.
            placed: for place matching.

        Returns:
            ``l_r``, ``l_dv``, ``l_st`` (unweighted) and ``total``; with place matching its meters, too.
        """
        if len(crop) % 2:
            raise AliceError(f"Q and K are stacked along the batch, which must be even; got {len(crop)}.")
        temperature = self._teacher_temperature(step)
        pooled, target = output.student_pooled.float(), output.teacher_pooled.detach().float()
        crossed = target.roll(len(target) // 2, dims=0)  # the student's Q against the teacher's K, and back
        terms = {"l_r": 2 * self.reconstruction_loss(output.pixels.float(), crop.float(), hidden)}
        meters: dict[str, Tensor] = {}
        if self.places is None:
            terms["l_dv"] = 2 * self._similarity(
                pooled, crossed, self.centre_pooled, temperature, pooled_view=True
            )
        else:
            meters = self._match_places(output, crop, hidden, placed)
            terms["l_dv"] = 2 * meters.pop("l_place")
        if output.student_tokens is None or output.teacher_tokens is None:
            terms["l_st"] = torch.zeros_like(terms["l_r"])
        else:
            tokens, aligned = output.student_tokens.float(), output.teacher_tokens.detach().float()
            terms["l_st"] = 2 * self._similarity(
                tokens, aligned, self.centre_tokens, temperature, pooled_view=False
            )
        if self.training and self.similarity == "dino":
            move_centre(self.centre_pooled, target)
            if output.teacher_tokens is not None:
                move_centre(self.centre_tokens, output.teacher_tokens)
        ramp = linear_ramp(step, self.similarity_start, self.similarity_ramp)
        scale = {"l_r": 1.0, "l_dv": ramp, "l_st": ramp}
        total = torch.stack([self.weights[name] * scale[name] * term for name, term in terms.items()]).sum()
        return terms | {"total": total} | meters

    def _match_places(
        self, output: StudentOutput, crop: Tensor, hidden: Tensor, placed: Placed | None
    ) -> dict[str, Tensor]:
        assert self.places is not None
        if placed is None or output.projected is None:
            raise AliceError(
                "Place matching needs a draw that says places (PlacedPair) and a student with inter_volume: places."
            )
        grid = [side // p for side, p in zip(crop.shape[2:], self.patch, strict=True)]
        factor = [g // u for g, u in zip(grid, hidden.shape[1:], strict=True)]
        visible = visible_index(refine_mask(hidden, factor).flatten(1)).to(crop.device, non_blocking=True)
        tissue = ~empty_patches(patchify(crop.float(), self.patch)).gather(1, visible)
        half = len(crop) // 2  # the student's Q is matched with the teacher's K, and back
        return self.places(
            output.projected,
            placed.tokens.detach().roll(half, dims=0),
            gather_visible(placed.places, visible),
            placed.centres.roll(half, dims=0),
            tissue,
        )

    def reconstruction_loss(self, pixels: Tensor, crop: Tensor, hidden: Tensor) -> Tensor:
        """Squared error of predicted patches, averaged over patches and samples (Alice, Eq. 1)."""
        if self.reconstruction == "whole":
            return F.mse_loss(pixels, patchify(crop, self.patch))
        normalise = self.reconstruction == "masked"
        return masked_reconstruction(
            pixels, crop, hidden, self.patch, skip_empty=self.skip_empty, normalise=normalise
        )

    def _similarity(
        self, student: Tensor, teacher: Tensor, centre: Tensor, temperature: float, pooled_view: bool
    ) -> Tensor:
        if self.similarity == "cosine":
            return cosine_distance(student, teacher).mean()
        if self.similarity == "dino":
            return centred_cross_entropy(student, teacher, centre, self.temperature, temperature).mean()
        if pooled_view:
            # a crop's own partner is right; the same crop seen by the teacher is no wrong answer, so only
            # one side (all Q, or all K) is offered at a time
            half = len(student) // 2
            sides = zip(student.split(half), teacher.split(half), strict=True)
            return torch.stack([info_nce(s, t, self.temperature) for s, t in sides]).mean()
        # a token is told apart from the other tokens of its own crop: against other crops, knowing the patient
        # would be enough, which is what cross-patient features must not encode
        logits = (
            F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2) / self.temperature
        )
        right = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return F.cross_entropy(logits.flatten(0, 1), right.flatten())

    def _teacher_temperature(self, step: int) -> float:
        start, end = self.teacher_temperature
        share = min(step / self.teacher_warmup, 1.0) if self.teacher_warmup > 0 else 1.0
        return start + (end - start) * share
