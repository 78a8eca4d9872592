"""iBOT: DINO, and the same for each hidden token of a masked crop (Zhou et al., ICLR 2022, arXiv 2111.07832)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.heads import ProjectionHead
from custom.methods.rivals.dino import dino_loss, freeze_prototypes_while, temperature_at
from custom.methods.rivals.masked_input import MaskedInput
from custom.methods.rivals.two_views import (
    AlikeAlarm,
    Teacher,
    TwoViews,
    entropy,
    log_of,
    stack_views,
    vectors_of,
)
from custom.methods.terms import centred_cross_entropy, masked_mean, move_centre
from custom.methods.views import generator_of


class Logits(NamedTuple):
    """Logits of two stacked views."""

    pooled: Tensor  # (2B, K)
    tokens: Tensor  # (2B, N, K)


class IbotStudent(Student):
    """A dense encoder, the vector of hidden patches, and one head for the crop and for its tokens.

    Args:
        encoder: gives tokens on one grid; their mean stands for the crop (ours: no class token).
        head_width, bottleneck: of the head (the authors: 2048, 256).
        prototypes: classes K of the head (the authors: 8,192; ours: 512).
    """

    def __init__(
        self, encoder: TokenEncoder, head_width: int = 2048, bottleneck: int = 256, prototypes: int = 512
    ) -> None:
        super().__init__()
        self.settings = {"head_width": head_width, "bottleneck": bottleneck, "prototypes": prototypes}
        self.encoder = encoder
        self.masked = MaskedInput(encoder)
        self.head = ProjectionHead(encoder.width, head_width, bottleneck, prototypes)

    def forward(self, crop: Tensor, hidden: Tensor) -> Logits:
        """(2B, 1, X, Y, Z) and bool over mask units -> logits."""
        tokens = self.masked(self.encoder, crop, hidden).tokens
        return logits_of(self.head, tokens)


def logits_of(head: nn.Module, tokens: Tensor) -> Logits:
    """Logits of the mean token and of every token, by one call of the head."""
    found = head(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1))
    return Logits(found[:, 0], found[:, 1:])


def build_student(network: nn.Module, settings: dict[str, Any]) -> IbotStudent:
    """A student as a checkpoint describes it."""
    return IbotStudent(token_encoder(network), **settings)


class BoxMasking:
    """Masks of boxes: in some crops none, in the others a random share.

    Args:
        ratio: middle of the share of hidden units (the authors: 0.3).
        spread: largest distance from it (the authors: 0.2).
        unmasked: probability of a crop that hides nothing (the authors: 0.5).

    Raises:
        AliceError: for settings out of range.
    """

    def __init__(self, ratio: float = 0.3, spread: float = 0.2, unmasked: float = 0.5) -> None:
        if not 0 <= ratio - spread <= ratio + spread < 1 or not 0 <= unmasked <= 1:
            raise AliceError(f"Shares must lie in [0, 1): {ratio=}, {spread=}, {unmasked=}.")
        self.ratio, self.spread, self.unmasked = ratio, spread, unmasked
        self.settings = {"ratio": ratio, "spread": spread, "unmasked": unmasked, "kind": "boxes"}

    def __call__(self, seeds: Tensor, grid: Sequence[int]) -> Tensor:
        """Seeds (B,) on the CPU -> bool (B, ux, uy, uz) on the CPU; samples hide unequal numbers."""
        return torch.stack([self._draw(generator_of(seed, "mask"), grid) for seed in seeds.tolist()])

    def _draw(self, generator: torch.Generator, grid: Sequence[int]) -> Tensor:
        hidden = torch.zeros(*grid, dtype=torch.bool)
        draws = torch.rand(2, generator=generator)
        if float(draws[0]) < self.unmasked:
            return hidden
        share = self.ratio + (2 * float(draws[1]) - 1) * self.spread
        wanted = min(max(round(share * hidden.numel()), 1), hidden.numel() - 1)
        while (left := wanted - int(hidden.sum())) > 0:
            sides = [int(torch.randint(1, max(side // 2, 1) + 1, (1,), generator=generator)) for side in grid]
            start = [
                int(torch.randint(g - s + 1, (1,), generator=generator))
                for g, s in zip(grid, sides, strict=True)
            ]
            box = torch.zeros_like(hidden)
            box[tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))] = True
            new = (box & ~hidden).flatten().nonzero()[:, 0]
            hidden.view(-1)[new[:left]] = True  # of the last box only what is still wanted
        return hidden


class IbotLoss(AlikeAlarm):
    """The teacher's running centres of crops and of tokens."""

    centre: Tensor
    centre_tokens: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("centre_tokens", torch.zeros(prototypes))


class Ibot(Method):
    """l_cls between the two crops, and l_patch on hidden tokens of each.

    Args:
        student: encoder and head.
        view: the augmentation of both crops.
        temperature: of the student (the authors: 0.1).
        teacher_temperature: of the teacher, from and to (the authors: 0.04 to 0.07).
        teacher_warmup: steps between these (the authors: a tenth of the run).
        frozen_steps: first steps in which the prototypes stay as they are.
    """

    name = "ibot"
    terms = ("l_cls", "l_patch")
    meters = ("l_cls/entropy", "l_cls/kl")
    compiles = False
    exported = "teacher"

    def __init__(
        self,
        student: IbotStudent,
        view: Any = None,
        temperature: float = 0.1,
        teacher_temperature: Sequence[float] = (0.04, 0.07),
        teacher_warmup: int = 0,
        frozen_steps: int = 0,
    ) -> None:
        if min(temperature, *teacher_temperature) <= 0 or min(frozen_steps, teacher_warmup) < 0:
            raise AliceError(
                f"Temperatures must be positive and counts not negative: {temperature=}, {teacher_temperature=}, "
                f"{frozen_steps=}, {teacher_warmup=}."
            )
        self.student: IbotStudent = student
        self.teacher = Teacher(encoder=student.encoder, head=student.head)
        self.loss: IbotLoss = IbotLoss(student.head.out_width)
        self.view, self.temperature = view, temperature
        self.teacher_temperature, self.teacher_warmup = tuple(teacher_temperature), teacher_warmup
        self.frozen_steps, self._step = frozen_steps, 0
        freeze_prototypes_while(student.head, lambda: self._step < self.frozen_steps)

    def start_step(self, step: int) -> None:
        """The prototypes are frozen at first."""
        self._step = step

    def views(self, batch: dict[str, Any], device: torch.device) -> TwoViews:
        """Both crops, augmented, and their masks."""
        return stack_views(batch, self.view)

    def target(self, views: TwoViews) -> Logits:
        """The teacher's logits of crops with nothing hidden."""
        assert isinstance(self.teacher, Teacher)
        return logits_of(self.teacher.get_submodule("head"), self.teacher.tokens(views.crop))

    def online(self, student: nn.Module, views: TwoViews, target: Logits) -> Logits:
        """The student's logits of masked crops."""
        return student(views.crop, views.hidden)

    def losses(self, output: Logits, views: TwoViews, target: Logits, step: int) -> dict[str, Tensor]:
        """l_cls, l_patch; the teacher's entropy, and l_cls without it."""
        heat = temperature_at(self.teacher_temperature, self.teacher_warmup, step)
        student, teacher = (logits.float().unflatten(0, (2, -1)) for logits in (output.pooled, target.pooled))
        l_cls = dino_loss(student, teacher, self.loss.centre, self.temperature, heat)
        assert views.hidden is not None
        hidden = self.student.encoder.token_mask(views.hidden).flatten(1).to(l_cls.device, non_blocking=True)
        tokens = centred_cross_entropy(
            output.tokens.float(), target.tokens.float(), self.loss.centre_tokens, self.temperature, heat
        )
        l_patch = masked_mean(tokens, hidden)
        unsure = entropy(target.pooled, self.loss.centre, heat)
        if self.loss.training:
            move_centre(self.loss.centre, target.pooled)
            move_centre(self.loss.centre_tokens, target.tokens)
        self.loss.see(unsure, log_of(target.pooled.shape[-1]))
        told = {"l_cls/entropy": unsure, "l_cls/kl": l_cls.detach() - unsure}
        return {"l_cls": l_cls, "l_patch": l_patch, "total": l_cls + l_patch, **told}

    def vectors(self, output: Logits, target: Logits, batch: dict[str, Any]) -> Vectors:
        """Logits of both."""
        return vectors_of(output.pooled, target.pooled, batch)

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """The teacher answers all classes alike."""
        return self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the head."""
        return {"online": [self.student.encoder], "heads": [self.student.head]}

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        names = ("temperature", "teacher_temperature")  # the others follow from the run's length
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": {n: getattr(self, n) for n in names}, "view": view}
