"""Alice as a method of the engine: aligned crops of two patients, masked for the student, intact for the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import token_encoder
from custom.engine.method import Method, Vectors
from custom.errors import AliceError
from custom.methods.alice.branch import StudentBranch, StudentOutput, TeacherOutput
from custom.methods.alice.losses import AliceLoss, Placed
from custom.methods.alice.official import OfficialStudent
from custom.methods.alice.places import token_centres
from custom.methods.views import TargetView

INDEX_ALARM, HITS_ALARM = 0.9, 0.95  # ours


class AliceViews(NamedTuple):
    """Both crops of every pair, stacked: the first half is Q, the second K."""

    crop: Tensor  # (2B, 1, X, Y, Z), of which the student sees what is not hidden
    intact: Tensor  # (2B, 1, X, Y, Z), augmented, for the teacher
    hidden: Tensor  # bool over mask units (2B, ux, uy, uz), on the CPU, where it is counted
    plan: Any  # what the encoder's planner made of it, or None
    places: Tensor | None = None  # (2B, N, 3) mm, of every token in the other crop, where the draw tells
    centres: Tensor | None = (
        None  # (2B, N, 3) mm, which place of its crop each token of the teacher's view shows
    )


def build_student(network: nn.Module, settings: dict[str, Any]) -> StudentBranch | OfficialStudent:
    """A student as a checkpoint describes it."""
    if settings.pop("official", False):
        return OfficialStudent(network, **settings)  # type: ignore[arg-type]
    return StudentBranch(token_encoder(network), **settings)


class Alice(Method):
    """l_r + l_dv + l_st on aligned pairs (Alice, ICCV 2023).

    Args:
        student: the online branch. The teacher is made from it.
        loss: the terms and their weights.
        view: ``(crop, seeds) -> crop``, the teacher's augmented view; None gives it the crop itself.
    """

    name = "alice"
    terms = ("l_r", "l_dv", "l_st")

    def __init__(
        self,
        student: StudentBranch | OfficialStudent,
        loss: AliceLoss,
        view: TargetView | None = None,
    ) -> None:
        self.student: StudentBranch | OfficialStudent = student
        self.teacher = student.make_teacher()
        self.loss: AliceLoss = loss
        self.view = view
        self.meters = loss.places.METERS if loss.places is not None else ()
        if (loss.places is not None) != bool(getattr(student, "places", False)):
            raise AliceError("method::loss::places and student_def::inter_volume: places go together.")

    def views(self, batch: dict[str, Any], device: torch.device) -> AliceViews:
        """Q and K stacked, and the teacher's view of them."""
        crop = torch.cat([batch["crop_q"], batch["crop_k"]])
        hidden = torch.cat([batch["hidden_q"], batch["hidden_k"]])
        seeds = torch.cat([batch["seed"], batch["seed"] + 1])
        plans = batch.get("plans", ())
        intact = crop if self.view is None else self.view(crop, seeds)
        plan = plans[0] if len(plans) == 1 else None
        if self.loss.places is None or "place_q" not in batch:
            return AliceViews(crop, intact, hidden, plan)
        places = torch.cat([batch["place_q"], batch["place_k"]]).to(device, non_blocking=True)
        grid = [side // p for side, p in zip(crop.shape[2:], self.loss.patch, strict=True)]
        centres = token_centres(grid, self.loss.places.pitch_mm).expand(len(crop), -1, -1)
        if self.view is not None:
            centres = self.view.seen_at(centres, seeds, crop.shape[2:])
        return AliceViews(crop, intact, hidden, plan, places, centres.to(device, non_blocking=True))

    def target(self, views: AliceViews) -> TeacherOutput:
        """Y and its mean, of intact crops."""
        assert self.teacher is not None
        return self.teacher(views.intact)

    def online(self, student: nn.Module, views: AliceViews, target: TeacherOutput) -> StudentOutput:
        """Predicted patches, and the student's vectors beside the teacher's."""
        assert self.teacher is not None
        return student(views.crop, views.hidden, target, self.teacher.casa, views.plan)

    def losses(
        self, output: StudentOutput, views: AliceViews, target: TeacherOutput, step: int
    ) -> dict[str, Tensor]:
        """Every term, and their weighted sum."""
        placed = None
        if views.places is not None and views.centres is not None:
            placed = Placed(target.tokens, views.places, views.centres)
        return self.loss(output, views.crop, views.hidden, step, placed)

    def vectors(self, output: StudentOutput, target: TeacherOutput, batch: dict[str, Any]) -> Vectors:
        """GAP(H) after the predictor, or GAP(phi(V)) where places are matched; and GAP(Y)."""
        owners = [*batch["patient_q"], *batch["patient_k"]]
        return Vectors(output.student_pooled.detach(), output.teacher_pooled, owners)

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """The shortcut of place matching: tokens tell their place in the crop, and no longer that in the body."""
        falls = latest.get("probe/retrieval", 1.0) < untrained.get("probe/retrieval", 0.0)
        index = latest.get("place/index_share", 0.0)
        if falls and (index > INDEX_ALARM or latest.get("place/hits", 0.0) > HITS_ALARM):
            return [
                f"place matching is answered by the token's place in the crop ({index:.0%} of the variance, "
                f"{latest['place/hits']:.0%} hits) while retrieval has fallen below the untrained encoder's. Raise max_offset, "
                "or look at the pairs (alice check-alignment)."
            ]
        return []

    def timed(self) -> dict[str, list[nn.Module]]:
        """The online encoder, the decoder and the heads."""
        return self.student.timed()

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": self.loss.settings, "view": view}
