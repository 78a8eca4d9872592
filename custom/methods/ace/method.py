"""ACE: a part and the whole it belongs to agree, both ways (Zhou et al., WACV 2025, arXiv 2501.10131).

The authors state that ACE's content is covered by patents pending; check with them before commercial use. This is an
independent implementation from the published description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.ace.lattice import (
    Targets,
    kernels_for,
    match_targets,
    mean_over,
    merge_children,
    parts_of,
    split_children,
    tokens_along,
)
from custom.methods.ace.losses import hits, least_bce, weighted_bce
from custom.methods.heads import ProjectionHead
from custom.methods.rivals.dino import DinoLoss, freeze_prototypes_while
from custom.methods.rivals.two_views import Teacher, entropy, log_of, vectors_of
from custom.methods.terms import centred_cross_entropy, move_centre

NOTICE = (
    "ACE's authors state that its content is covered by patents pending; check with them before commercial use. "
    "This is an independent implementation from the published description."
)


class AceViews(NamedTuple):
    """Small and large crops, stacked along the batch: the first half is small, the second large."""

    crop: Tensor  # (2B, 1, X, Y, Z), augmented
    inside: Tensor  # bool (2B, N), tokens that lie in the other crop, too
    targets: Targets


class AceOutput(NamedTuple):
    """What the student says; P cells are one token of the large crop."""

    merged: Tensor  # (B, N / P, C), of the small crops
    split: Tensor  # (B, N * P, C), of the large crops
    logits: Tensor  # (2B, K), of what both crops show


class AceTarget(NamedTuple):
    """What the teacher says."""

    dense: Tensor  # (2B, N, C), unit vectors, none negative
    logits: Tensor  # (2B, K), of what both crops show
    rest: Tensor  # (2B, K), of the other tokens


class DenseHead(nn.Sequential):
    """Three layers on every token, then unit length; no entry is negative.

    The authors norm by the batch; LayerNorm is ours, so that small batches and several processes work.
    """

    def __init__(self, width: int) -> None:
        layers = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()) for _ in range(3)]
        super().__init__(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), in fp32."""
        return F.normalize(super().forward(tokens).float(), dim=-1)


class AceStudent(Student):
    """Encoder and four heads: dense tokens, merged tokens, split tokens, and prototypes for the overlap.

    Merged and split tokens are not normalised: the teacher's vectors are never negative, so unit vectors after a ReLU
    could not say that two tokens do not match.

    Args:
        encoder: gives tokens on one grid.
        zoom: 1 or 2 along x, y, z: cells that a token of the large crop shows.
        head_width, bottleneck: of the head of the overlap (DINO: 2048, 256).
        prototypes: classes K of that head (the authors: 65,536; ours: 512).
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        zoom: Sequence[int] = (2, 2, 2),
        head_width: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 512,
    ) -> None:
        super().__init__()
        if len(zoom) != 3 or any(k not in (1, 2) for k in zoom) or parts_of(zoom) == 1:
            raise AliceError(
                f"student_def::zoom must be 1 or 2 along x, y, z, and not 1 along all; got {list(zoom)}."
            )
        self.settings = {
            "zoom": list(zoom),
            "head_width": head_width,
            "bottleneck": bottleneck,
            "prototypes": prototypes,
        }
        self.encoder, self.zoom = encoder, tuple(zoom)
        width, wide = encoder.width, parts_of(zoom) * encoder.width
        self.dense = DenseHead(width)
        self.merge = nn.Sequential(
            nn.Linear(wide, width, bias=False), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.split = nn.Sequential(
            nn.Linear(width, wide, bias=False), nn.LayerNorm(wide), nn.ReLU(), nn.Linear(wide, wide)
        )
        self.head = ProjectionHead(width, head_width, bottleneck, prototypes)

    def forward(self, crop: Tensor, inside: Tensor) -> AceOutput:
        """Small and large crops stacked (2B, 1, X, Y, Z), and their tokens in the overlap, bool (2B, N)."""
        tokens, grid = self.encoder(crop)
        small, large = self.dense(tokens).chunk(2)
        merged = self.merge(merge_children(small, grid, self.zoom))
        split = split_children(self.split(large), grid, self.zoom)
        return AceOutput(merged, split, self.head(mean_over(tokens, inside)))


def build_student(network: nn.Module, settings: dict[str, Any]) -> AceStudent:
    """A student as a checkpoint describes it."""
    return AceStudent(token_encoder(network), **settings)


class Ace(Method):
    """l_comp, l_decomp and l_global of a small and a large crop on one lattice (see :class:`NestedPair`).

    l_comp: the tokens of the small crop that one token of the large crop shows, merged, match that token of the teacher
    and no other. l_decomp: a token of the large crop, split, matches those tokens of the teacher. l_global: both crops
    say the same of what both show (DINO's cross entropy).

    Args:
        student: encoder and heads.
        view: changes intensities of both crops, each by itself; it may not move anything.
        kernels: of the labels of l_comp and l_decomp, odd (the authors: 3, 5). ``auto`` takes 1 and 3 where a crop has no
            more than two merged tokens along an axis (ours), else the authors'.
        sigma: of the labels, in tokens (the authors: 1).
        alphas: weights of a match in l_comp and in l_decomp, in (0, 1) (the authors: 0.9, 0.99).
        match_temperature: of the products of tokens (the authors: 0.07).
        weight_local: of the mean of l_comp and l_decomp (the authors: 1).
        weight_global: of l_global (the authors: 0.1).
        temperature, teacher_temperature: of l_global's softmaxes (the authors: 0.1, 0.04).
        frozen_steps: first steps in which the prototypes stay as they are (the authors: the first epoch).
    """

    name = "ace"
    terms = ("l_comp", "l_decomp", "l_global")
    meters = (
        "l_comp/excess",
        "l_comp/hits",
        "l_decomp/excess",
        "l_decomp/hits",
        "l_global/entropy",
        "l_global/kl",
    )
    exported = "teacher"

    def __init__(
        self,
        student: AceStudent,
        view: Any = None,
        kernels: str | Sequence[int] = "auto",
        sigma: float = 1.0,
        alphas: Sequence[float] = (0.9, 0.99),
        match_temperature: float = 0.07,
        weight_local: float = 1.0,
        weight_global: float = 0.1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        frozen_steps: int = 0,
    ) -> None:
        if view is not None and (view.rotation or view.zoom or bool(view.flip.any())):
            raise AliceError(
                "ACE matches places of two crops: set rotation and zoom of method::view to 0, and flip to [0, 0, 0]."
            )
        if kernels != "auto" and (
            isinstance(kernels, str) or len(kernels) != 2 or any(k < 1 or k % 2 != 1 for k in kernels)
        ):
            raise AliceError(f"kernels must be auto or two odd numbers such as [3, 5], got {kernels!r}.")
        if len(alphas) != 2 or not all(0 < a < 1 for a in alphas):
            raise AliceError(f"alphas must be two numbers between 0 and 1, got {list(alphas)}.")
        if min(sigma, match_temperature, temperature, teacher_temperature) <= 0:
            raise AliceError(
                f"sigma and temperatures must be positive: {sigma=}, {match_temperature=}, {temperature=}, "
                f"{teacher_temperature=}."
            )
        if min(weight_local, weight_global, frozen_steps) < 0:
            raise AliceError(
                f"Weights and steps must not be negative: {weight_local=}, {weight_global=}, {frozen_steps=}."
            )
        self.student: AceStudent = student
        self.teacher = Teacher(encoder=student.encoder, dense=student.dense, head=student.head)
        self.loss: DinoLoss = DinoLoss(student.head.out_width)
        self.view, self.kernels, self.sigma, self.alphas = view, kernels, sigma, tuple(alphas)
        self.match_temperature = match_temperature
        self.weight_local, self.weight_global = weight_local, weight_global
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.frozen_steps, self._step = frozen_steps, 0
        freeze_prototypes_while(student.head, lambda: self._step < self.frozen_steps)

    def start_step(self, step: int) -> None:
        """The prototypes are frozen at first."""
        self._step = step

    def views(self, batch: dict[str, Any], device: torch.device) -> AceViews:
        """Both crops, augmented, and the labels, which follow from the origins alone."""
        zoom = self.student.zoom
        if (batch["zoom"] != torch.tensor(zoom)).any():
            raise AliceError(
                f"student_def::zoom is {list(zoom)} and the crops have {batch['zoom'][0].tolist()}: both must be that of "
                "train::dataset."
            )
        crop = torch.cat([batch["crop_small"], batch["crop_large"]])
        if self.view is not None:
            crop = self.view(crop, torch.cat([batch["seed"], batch["seed"] + 1]))
        cells = tokens_along(crop.shape[2:], self.student.encoder.patch, zoom)
        kernels = kernels_for(cells, zoom) if isinstance(self.kernels, str) else self.kernels
        found = match_targets(batch["o_large"], batch["o_small"], cells, zoom, kernels, self.sigma)
        targets = Targets(*(part.to(device, non_blocking=True) for part in found))
        return AceViews(crop, torch.cat([targets.inside_small, targets.inside_large]), targets)

    def target(self, views: AceViews) -> AceTarget:
        """The teacher's tokens, and its logits of what both crops show and of the rest."""
        assert isinstance(self.teacher, Teacher)
        tokens = self.teacher.tokens(views.crop)
        shared, rest = (mean_over(tokens, chosen) for chosen in (views.inside, ~views.inside))
        logits = self.teacher.project("head", torch.cat([shared, rest])).chunk(2)
        return AceTarget(self.teacher.project("dense", tokens), *logits)

    def online(self, student: nn.Module, views: AceViews, target: AceTarget) -> AceOutput:
        """The student's merged and split tokens, and its logits of the overlap."""
        return student(views.crop, views.inside)

    def losses(self, output: AceOutput, views: AceViews, target: AceTarget, step: int) -> dict[str, Tensor]:
        """All terms; how far the local ones are above their least, and how often the best match is right."""
        small, large = target.dense.float().chunk(2)
        composed = large @ output.merged.float().transpose(1, 2) / self.match_temperature
        decomposed = small @ output.split.float().transpose(1, 2) / self.match_temperature
        labels = views.targets
        l_comp = weighted_bce(composed, labels.composition, self.alphas[0])
        l_decomp = weighted_bce(decomposed, labels.decomposition, self.alphas[1])

        logits, taught = output.logits.float(), target.logits.float()
        crossed = taught.roll(len(taught) // 2, dims=0)  # the small crop's against the large one's, and back
        heats = self.temperature, self.teacher_temperature
        l_global = centred_cross_entropy(logits, crossed, self.loss.centre, *heats).mean()
        unsure = entropy(taught, self.loss.centre, self.teacher_temperature)
        if self.loss.training:
            move_centre(self.loss.centre, self._mean_logits(views.inside, taught, target.rest.float()))
        self.loss.see(unsure, log_of(taught.shape[-1]))
        return {
            "l_comp": l_comp,
            "l_decomp": l_decomp,
            "l_global": l_global,
            "total": self.weight_local * (l_comp + l_decomp) / 2 + self.weight_global * l_global,
            "l_comp/excess": l_comp.detach() - least_bce(labels.composition, self.alphas[0]),
            "l_comp/hits": hits(composed, labels.composition, labels.inside_large),
            "l_decomp/excess": l_decomp.detach() - least_bce(labels.decomposition, self.alphas[1]),
            "l_decomp/hits": hits(decomposed, labels.decomposition, labels.inside_small),
            "l_global/entropy": unsure,
            "l_global/kl": l_global.detach() - unsure,
        }

    @staticmethod
    def _mean_logits(inside: Tensor, shared: Tensor, rest: Tensor) -> Tensor:
        """Mean of the teacher's logits (1, K) over all means of tokens that exist (a small crop often has no rest; ours)."""
        there = torch.cat([inside.any(dim=1), (~inside).any(dim=1)]).to(shared.dtype)
        return (there @ torch.cat([shared, rest]) / there.sum())[None]

    def vectors(self, output: AceOutput, target: AceTarget, batch: dict[str, Any]) -> Vectors:
        """Logits of what both crops show."""
        return vectors_of(output.logits, target.logits, batch)

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """The teacher answers all classes alike."""
        return self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the heads."""
        own = self.student
        return {"online": [own.encoder], "heads": [own.dense, own.merge, own.split, own.head]}

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        names = ("kernels", "sigma", "alphas", "match_temperature", "weight_local", "weight_global")
        loss = {name: getattr(self, name) for name in (*names, "temperature", "teacher_temperature")}
        loss["kernels"] = self.kernels if isinstance(self.kernels, str) else list(self.kernels)
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": loss, "view": view, "notice": NOTICE}
