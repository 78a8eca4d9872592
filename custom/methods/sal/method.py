"""SAL: Self-supervised Alignment Learning (Li, Ouyang, Wan; arXiv 2406.15699), in 3D.

What we know of the paper is its abstract page; what is ours is said in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student
from custom.engine.monitors import embedding_std
from custom.errors import AliceError
from custom.methods.rivals.two_views import AlikeAlarm, log_of
from custom.methods.sal.losses import check_windows, global_term, local_term, variance
from custom.processes import mean_over_processes, world_size

LEAST_VARIANCE = 0.05  # below it, and below a third of what it was untrained, a run warns (ours)


class CollapseAlarm(AlikeAlarm):
    """Remembers how far tokens differed in the untrained network, since in a deep one that may be little."""

    untrained: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "untrained", torch.zeros(2)
        )  # of embedded tokens, of the encoder's; 0 before step 1

    @torch.no_grad()
    def remember(self, variances: Tensor) -> None:
        """Keep the first step's variances (2,)."""
        if self.training:
            self.untrained.copy_(torch.where(self.untrained == 0, variances, self.untrained))

    def least(self) -> list[float]:
        """The variances below which a run warns."""
        return (self.untrained / 3).clamp(max=LEAST_VARIANCE).tolist()


class SalOutput(NamedTuple):
    """What the student says of n crops."""

    tokens: Tensor  # (n, N, C) of the encoder
    local: Tensor  # (n, N, E), compared place by place
    whole: Tensor  # (n, D), one vector a crop


class SalViews(NamedTuple):
    """The n = S K crops of S scans, and which belong together."""

    crop: Tensor  # (n, 1, X, Y, Z)
    pairs: Tensor  # (P, 2) rows of crops of one scan that are near each other
    positions: Tensor  # (n, 2) numerators and denominators
    threshold: Fraction  # how near positions are that attract each other


class SalStudent(Student):
    """Encoder, a linear embedding of its tokens, and a head on their mean.

    Args:
        encoder: gives tokens on one grid.
        embed_dim: channels of the tokens that are compared; no bias (the size is ours).
        embed: false compares the encoder's own tokens.
        out_width: of the head (512: the lineage).
    """

    def __init__(
        self, encoder: TokenEncoder, embed_dim: int = 128, embed: bool = True, out_width: int = 512
    ) -> None:
        super().__init__()
        if embed_dim < 1 or out_width < 1:
            raise AliceError(f"embed_dim and out_width must be positive, got {embed_dim} and {out_width}.")
        self.settings = {"embed_dim": embed_dim, "embed": embed, "out_width": out_width}
        self.encoder = encoder
        self.embed = nn.Linear(encoder.width, embed_dim, bias=False) if embed else nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(encoder.width, encoder.width), nn.ReLU(), nn.Linear(encoder.width, out_width)
        )

    def forward(self, crop: Tensor) -> SalOutput:
        """(n, 1, X, Y, Z) -> tokens, embedded tokens and one vector a crop."""
        tokens = self.encoder(crop).tokens
        return SalOutput(tokens, self.embed(tokens), self.head(tokens.mean(dim=1)))


def build_student(network: nn.Module, settings: dict[str, Any]) -> SalStudent:
    """A student as a checkpoint describes it."""
    return SalStudent(token_encoder(network), **settings)


class Sal(Method):
    """Local alignment of near crops of a scan, global perception of where a crop lies. No teacher.

    Args:
        student: encoder, embedding and head.
        windows: along x, y, z; a token's partner lies in the window at the same place. Along z a slab is searched whole,
            since near slabs are moved against each other (ours).
        tau: temperature of global perception (the lineage: 0.1).
        gp_scale: factor on it (the lineage: tau / 0.07; ours: 1).
        weight_la, weight_gp: of the two losses. A large weight_la makes all tokens alike.
        view: what each crop is made into, with intensity alone: crops of a scan are compared place by place.
        scan_view: the one change of geometry of all crops of a scan; None for none.
        crop_size: voxels along x, y, z, so that windows are checked before a run.

    Raises:
        AliceError: for settings out of range.
    """

    name = "sal"
    terms = ("l_la", "l_gp")
    meters = ("l_la/pairs", "l_gp/alike", "sal/local_variance", "sal/map_variance", "sal/spread")

    def __init__(
        self,
        student: SalStudent,
        windows: Sequence[int] = (2, 2, 1),
        tau: float = 0.1,
        gp_scale: float = 1.0,
        weight_la: float = 0.1,
        weight_gp: float = 1.0,
        view: Any = None,
        scan_view: Any = None,
        crop_size: Sequence[int] | None = None,
    ) -> None:
        if not tau > 0 or not gp_scale > 0:
            raise AliceError(f"tau and gp_scale must be positive, got {tau} and {gp_scale}.")
        if min(weight_la, weight_gp) < 0 or weight_la + weight_gp == 0:
            raise AliceError(
                f"weight_la and weight_gp must be 0 or more, and not both 0; got {weight_la} and {weight_gp}."
            )
        if view is not None and (view.rotation or view.zoom or view.flip.any()):
            raise AliceError(
                "Crops of a scan are compared place by place: set rotation, zoom and flip of method::view to 0. "
                "method::scan_view changes the geometry of all crops of a scan alike."
            )
        self.student: SalStudent = student
        self.loss: CollapseAlarm = CollapseAlarm()
        self.windows, self.tau, self.gp_scale = tuple(windows), tau, gp_scale
        self.weight_la, self.weight_gp = weight_la, weight_gp
        self.view, self.scan_view = view, scan_view
        if crop_size is not None:
            check_windows(self.windows, self._grid(crop_size))

    def _grid(self, crop_size: Sequence[int]) -> list[int]:
        return [side // p for side, p in zip(crop_size, self.student.encoder.patch, strict=True)]

    def views(self, batch: dict[str, Any], device: torch.device) -> SalViews:
        """All crops in one batch: the geometry of a scan is one, the intensity of each crop its own."""
        scans, each = batch["crops"].shape[:2]
        crop = batch["crops"].flatten(0, 1)
        if self.scan_view is not None:
            crop = self.scan_view(crop, batch["seed"].repeat_interleave(each))
        if self.view is not None:
            crop = self.view(crop, (batch["seed"][:, None] + torch.arange(each)).flatten())
        which, first, second = batch["pairs"].nonzero().unbind(1)
        pairs = torch.stack([which * each + first, which * each + second], dim=1)
        above, below = batch["threshold"][0].tolist()
        return SalViews(
            crop,
            pairs.to(device, non_blocking=True),
            batch["position"].flatten(0, 1),
            Fraction(above, below),
        )

    def online(self, student: nn.Module, views: SalViews, target: None) -> SalOutput:
        """Tokens and vectors of all crops."""
        return student(views.crop)

    def losses(self, output: SalOutput, views: SalViews, target: None, step: int) -> dict[str, Tensor]:
        """l_la and l_gp, and what tells learning from collapse."""
        grid = self._grid(views.crop.shape[2:])
        l_la = local_term(output.local, views.pairs, grid, self.windows)
        found = global_term(output.whole, views.positions, views.threshold, self.tau)
        alike = log_of(len(views.crop) * world_size() - 1)
        self.loss.see(found.detach(), alike)
        spread = torch.stack([variance(output.local), variance(output.tokens)])
        self.loss.remember(mean_over_processes(spread))
        l_gp = self.gp_scale * found
        return {
            "l_la": l_la,
            "l_gp": l_gp,
            "total": self.weight_la * l_la + self.weight_gp * l_gp,
            "l_la/pairs": l_la.new_full((), len(views.pairs)),
            "l_gp/alike": l_la.new_full((), self.gp_scale * alike),
            "sal/local_variance": spread[0],
            "sal/map_variance": spread[1],
            "sal/spread": embedding_std(output.whole.detach()),
        }

    def alarms(self, latest: Mapping[str, float], untrained: Mapping[str, float]) -> list[str]:
        """Tokens that become alike, and vectors that are."""
        found = []
        kinds = (("local_variance", "embedded tokens"), ("map_variance", "encoder's tokens"))
        for (name, whose), least in zip(kinds, self.loss.least(), strict=True):
            value = latest.get(f"sal/{name}", math.inf)
            if value < least:
                found.append(
                    f"the {whose} become alike (sal/{name} is {value:.4f}, below {least:.4f}): "
                    "raise weight_gp or lower weight_la, or lower learning_rate."
                )
        return found + self.loss.warnings()

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder; the embedding and the head."""
        return {"online": [self.student.encoder], "heads": [self.student.embed, self.student.head]}

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and views."""
        loss = {
            "windows": list(self.windows),
            "tau": self.tau,
            "gp_scale": self.gp_scale,
            "weight_la": self.weight_la,
            "weight_gp": self.weight_gp,
        }
        views = {name: getattr(getattr(self, name), "settings", None) for name in ("view", "scan_view")}
        return {"student": self.student.settings, "loss": loss} | views
