"""MoCo v3: a crop's vector finds that of another crop of the same scan (Chen et al., ICCV 2021, arXiv 2104.02057)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.heads import mlp
from custom.methods.rivals.two_views import (
    AlikeAlarm,
    Teacher,
    TwoViews,
    freeze_embedding,
    log_of,
    no_batch_norm_in_small_batches,
    stack_views,
    vectors_of,
    with_batch_norm_of_all,
)
from custom.methods.terms import info_nce
from custom.processes import world_size


class MocoStudent(Student):
    """Encoder, projector and predictor.

    Args:
        encoder: gives tokens on one grid; their mean is projected (ours: no class token).
        hidden_width, out_width: of projector and predictor (the authors: 4096, 256).
        head_norm: ``layer`` (ours) or ``batch`` (the authors; 32 crops or more, and GPUs for several processes).
        frozen_embedding: keep a ViT's random patch embedding (the authors, for stability).
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        hidden_width: int = 4096,
        out_width: int = 256,
        head_norm: str = "layer",
        frozen_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.settings = {
            "hidden_width": hidden_width,
            "out_width": out_width,
            "head_norm": head_norm,
            "frozen_embedding": frozen_embedding,
        }
        self.encoder, self.head_norm = encoder, head_norm
        self.projector = mlp([encoder.width, hidden_width, hidden_width, out_width], head_norm)
        self.predictor = mlp([out_width, hidden_width, out_width], head_norm)
        if frozen_embedding:
            freeze_embedding(encoder)

    def forward(self, crop: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> predicted vectors (B, out_width)."""
        return self.predictor(self.projector(self.encoder(crop).tokens.mean(dim=1)))


def build_student(network: nn.Module, settings: dict[str, Any]) -> MocoStudent:
    """A student as a checkpoint describes it."""
    return MocoStudent(token_encoder(network), **settings)


class Moco(Method):
    """InfoNCE between two crops of a scan, both ways; negatives are the other samples of all processes. No queue.

    Args:
        student: encoder and heads.
        view: the augmentation of both crops.
        temperature: of the cosines (the authors: 0.2).
    """

    name = "moco"
    terms = ("l_c",)
    meters = ("l_c/alike",)

    def __init__(self, student: MocoStudent, view: Any = None, temperature: float = 0.2) -> None:
        if not temperature > 0:
            raise AliceError(f"temperature must be positive, got {temperature}.")
        self.student: MocoStudent = student
        self.teacher = Teacher(encoder=student.encoder, projector=student.projector)
        self.loss: AlikeAlarm = AlikeAlarm()
        self.view, self.temperature = view, temperature

    def views(self, batch: dict[str, Any], device: torch.device) -> TwoViews:
        """Both crops, augmented."""
        why = no_batch_norm_in_small_batches(self.student.head_norm, 2 * len(batch["crop_1"]))
        if why:
            raise AliceError(why)
        return stack_views(batch, self.view)

    def target(self, views: TwoViews) -> Tensor:
        """The teacher's vectors (2B, D) of the same views."""
        assert isinstance(self.teacher, Teacher)
        return self.teacher.project("projector", self.teacher.tokens(views.crop).mean(dim=1))

    def online(self, student: nn.Module, views: TwoViews, target: Tensor) -> Tensor:
        """The student's predictions (2B, D)."""
        return student(views.crop)

    def losses(self, output: Tensor, views: TwoViews, target: Tensor, step: int) -> dict[str, Tensor]:
        """l_c: crop 1 finds crop 2 and the other way round, each times 2 T; and its value when all vectors are alike."""
        (q_1, q_2), (k_1, k_2) = output.chunk(2), target.chunk(2)
        found = info_nce(q_1, k_2, self.temperature) + info_nce(q_2, k_1, self.temperature)
        l_c = 2 * self.temperature * found
        alike = 4 * self.temperature * log_of(len(q_1) * world_size())
        self.loss.see(l_c.detach(), alike)
        return {"l_c": l_c, "total": l_c, "l_c/alike": l_c.new_full((), alike)}

    def vectors(self, output: Tensor, target: Tensor, batch: dict[str, Any]) -> Vectors:
        """Predictions and the teacher's vectors."""
        return vectors_of(output, target, batch)

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """All vectors alike."""
        return self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the heads."""
        return {"online": [self.student.encoder], "heads": [self.student.projector, self.student.predictor]}

    def wrapped(self, device: torch.device) -> nn.Module:
        """The student for several processes; batch norm becomes that of all of them."""
        if self.student.head_norm == "batch":
            with_batch_norm_of_all(self.student, self.teacher, device)
        return super().wrapped(device)

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": {"temperature": self.temperature}, "view": view}
