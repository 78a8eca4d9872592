"""DINO: the student says of one crop what the teacher says of another (Caron et al., ICCV 2021, arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.heads import ProjectionHead
from custom.methods.rivals.two_views import (
    AlikeAlarm,
    Teacher,
    TwoViews,
    entropy,
    log_of,
    stack_views,
    vectors_of,
)
from custom.methods.terms import centred_cross_entropy, move_centre
from custom.methods.views import generator_of


class DinoStudent(Student):
    """Encoder and head with prototypes.

    Args:
        encoder: gives tokens on one grid; their mean is projected (ours: no class token).
        head_width, bottleneck: of the head (the authors: 2048, 256).
        prototypes: classes K of the head (the authors: 65,536; ours: 512, as the authors of Alice).
    """

    def __init__(
        self, encoder: TokenEncoder, head_width: int = 2048, bottleneck: int = 256, prototypes: int = 512
    ) -> None:
        super().__init__()
        self.settings = {"head_width": head_width, "bottleneck": bottleneck, "prototypes": prototypes}
        self.encoder = encoder
        self.head = ProjectionHead(encoder.width, head_width, bottleneck, prototypes)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Crops of one or several sizes, each (n, 1, X, Y, Z) -> logits of all (sum of n, K)."""
        return self.head(torch.cat([self.encoder(crop).tokens.mean(dim=1) for crop in crops]))


def build_student(network: nn.Module, settings: dict[str, Any]) -> DinoStudent:
    """A student as a checkpoint describes it."""
    return DinoStudent(token_encoder(network), **settings)


class DinoLoss(AlikeAlarm):
    """The teacher's running centre."""

    centre: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(prototypes))


class Dino(Method):
    """Cross entropy between centred, sharpened softmaxes of different crops of one scan.

    Args:
        student: encoder and head.
        view: the augmentation of both crops.
        temperature: of the student (the authors: 0.1).
        teacher_temperature: of the teacher, from and to (the authors' default for ViT-B: 0.04 throughout).
        teacher_warmup: steps between these.
        local_crops: further crops of half the side a sample, for the student alone (the authors: 8; ours: 0).
        frozen_steps: first steps in which the prototypes stay as they are (the authors: the first epoch).
    """

    name = "dino"
    terms = ("l_d",)
    meters = ("l_d/entropy", "l_d/kl")
    exported = "teacher"

    def __init__(
        self,
        student: DinoStudent,
        view: Any = None,
        temperature: float = 0.1,
        teacher_temperature: Sequence[float] = (0.04, 0.04),
        teacher_warmup: int = 0,
        local_crops: int = 0,
        frozen_steps: int = 0,
    ) -> None:
        if min(temperature, *teacher_temperature) <= 0 or min(local_crops, frozen_steps, teacher_warmup) < 0:
            raise AliceError(
                f"Temperatures must be positive and counts not negative: {temperature=}, {teacher_temperature=}, "
                f"{local_crops=}, {frozen_steps=}, {teacher_warmup=}."
            )
        self.student: DinoStudent = student
        self.teacher = Teacher(encoder=student.encoder, head=student.head)
        self.loss: DinoLoss = DinoLoss(student.head.out_width)
        self.view, self.temperature, self.local_crops = view, temperature, local_crops
        self.teacher_temperature, self.teacher_warmup = tuple(teacher_temperature), teacher_warmup
        self.frozen_steps, self._step = frozen_steps, 0
        freeze_prototypes_while(student.head, lambda: self._step < self.frozen_steps)

    def start_step(self, step: int) -> None:
        """The prototypes are frozen at first."""
        self._step = step

    def views(self, batch: dict[str, Any], device: torch.device) -> TwoViews:
        """Both crops, augmented."""
        return stack_views(batch, self.view)

    def target(self, views: TwoViews) -> Tensor:
        """The teacher's logits (2B, K)."""
        assert isinstance(self.teacher, Teacher)
        return self.teacher.project("head", self.teacher.tokens(views.crop).mean(dim=1))

    def online(self, student: nn.Module, views: TwoViews, target: Tensor) -> Tensor:
        """The student's logits of both crops and of local ones, ((2 + L) B, K)."""
        return student([views.crop, *self._local(views)])

    def _local(self, views: TwoViews) -> list[Tensor]:
        if not self.local_crops:
            return []
        half, parts = len(views.crop) // 2, []
        sides = [side // 2 for side in views.crop.shape[2:]]
        for number in range(self.local_crops):
            rows = range(half) if number % 2 == 0 else range(half, 2 * half)
            for row in rows:
                generator = generator_of(int(views.seeds[row % half]) + 7919 * number, "local")
                start = [int(torch.randint(side + 1, (1,), generator=generator)) for side in sides]
                (x, y, z), (dx, dy, dz) = start, sides
                parts.append(views.crop[row, :, x : x + dx, y : y + dy, z : z + dz])
        return [torch.stack(parts)]

    def losses(self, output: Tensor, views: TwoViews, target: Tensor, step: int) -> dict[str, Tensor]:
        """l_d; the teacher's entropy, and l_d without it."""
        batch, logits = len(target) // 2, target.float()
        heat = temperature_at(self.teacher_temperature, self.teacher_warmup, step)
        l_d = dino_loss(
            output.float().view(-1, batch, output.shape[-1]),
            logits.view(2, batch, -1),
            self.loss.centre,
            self.temperature,
            heat,
        )
        unsure = entropy(logits, self.loss.centre, heat)
        if self.loss.training:
            move_centre(self.loss.centre, logits)
        self.loss.see(unsure, log_of(logits.shape[-1]))
        return {"l_d": l_d, "total": l_d, "l_d/entropy": unsure, "l_d/kl": l_d.detach() - unsure}

    def vectors(self, output: Tensor, target: Tensor, batch: dict[str, Any]) -> Vectors:
        """Logits of both."""
        return vectors_of(output[: len(target)], target, batch)

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """The teacher answers all classes alike."""
        return self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the head."""
        return {"online": [self.student.encoder], "heads": [self.student.head]}

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        names = (
            "temperature",
            "teacher_temperature",
            "local_crops",
        )  # the others follow from the run's length
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": {n: getattr(self, n) for n in names}, "view": view}


def dino_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean cross entropy over pairs of different views.

    Args:
        student: (V, B, K) logits; the first two views are the teacher's.
        teacher: (2, B, K) logits.
        centre: (K,).
        student_temperature, teacher_temperature: of the softmaxes.
    """
    pairs = [(t, s) for t in range(2) for s in range(len(student)) if s != t]
    found = [
        centred_cross_entropy(student[s], teacher[t], centre, student_temperature, teacher_temperature)
        for t, s in pairs
    ]
    return torch.stack(found).mean()


def temperature_at(values: Sequence[float], steps: int, step: int) -> float:
    """From the first to the second value over ``steps`` steps, linearly."""
    share = min(step / steps, 1.0) if steps > 0 else 1.0
    return values[0] + (values[1] - values[0]) * share


def freeze_prototypes_while(head: ProjectionHead, frozen: Any) -> None:
    """Set the gradient of a head's prototypes to 0 while ``frozen()`` is true; DDP still sees one."""
    assert head.prototypes is not None
    weight = head.prototypes.get_parameter("parametrizations.weight.original1")
    weight.register_hook(lambda gradient: torch.zeros_like(gradient) if frozen() else gradient)
