"""SIM: visible tokens of one crop predict the teacher's tokens of another (Tao et al., CVPR 2023, arXiv 2206.01204)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from custom.encoders.masking import visible_index
from custom.encoders.positions import positions_at, sincos_at, sincos_positions
from custom.encoders.tokens import TokenEncoder, Tokens, token_encoder
from custom.engine.method import Method, Student, Vectors
from custom.errors import AliceError
from custom.methods.rivals.two_views import Teacher, freeze_embedding
from custom.processes import mean_over_processes


class SimViews(NamedTuple):
    """What is seen of two crops of one scan."""

    crop: Tensor  # (B, 1, X, Y, Z), crop 1, augmented
    hidden: Tensor  # bool over mask units (B, ux, uy, uz), of crop 1, on the CPU
    plan: Any  # what the encoder's planner made of it, or None
    target: Tensor  # (B, 1, X, Y, Z), crop 2, augmented
    shift: Tensor  # (B, 3) tokens, where crop 2 begins in crop 1


class Projector(nn.Module):
    """A linear layer and transformer blocks on an encoder's tokens.

    Args:
        in_width: channels of the tokens.
        width: channels inside and out; divisible by 6.
        depth, num_heads: of the blocks.
    """

    def __init__(self, in_width: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, width)
        self.blocks = transformer(width, depth, num_heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, V, in_width) -> (B, V, width)."""
        found = self.embed(tokens)
        for block in self.blocks:
            found = block(found)
        return found


def transformer(width: int, depth: int, num_heads: int) -> nn.ModuleList:
    """MONAI's blocks, without their cross attention, which nothing calls."""
    blocks = nn.ModuleList(
        TransformerBlock(width, 4 * width, num_heads, qkv_bias=True, use_flash_attention=True)
        for _ in range(depth)
    )
    for name, parameter in blocks.named_parameters():
        if "cross_attn" in name:
            parameter.requires_grad_(False)
    return blocks


class SimStudent(Student):
    """Encoder of visible tokens, projector, and a decoder that is asked for places of the other crop.

    Args:
        encoder: gives tokens on one grid, visible ones only.
        decoder_width: channels of projector and decoder, and of what is predicted; divisible by 6 (the authors: 768).
        projector_depth: blocks of the projector (the authors: 2).
        decoder_depth, decoder_heads: of the decoder (the authors: 4 blocks).
        frozen_embedding: keep a ViT's random patch embedding (the authors, for stability).
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        decoder_width: int = 384,
        projector_depth: int = 2,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        frozen_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "encoder", "__class__")}
        self.encoder, self.width = encoder, decoder_width
        self.projector = Projector(encoder.width, decoder_width, projector_depth, decoder_heads)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = transformer(decoder_width, decoder_depth, decoder_heads)
        self.norm = nn.LayerNorm(decoder_width)
        self.predict = nn.Linear(decoder_width, decoder_width)
        if frozen_embedding:
            freeze_embedding(encoder)

    def forward(self, crop: Tensor, hidden: Tensor, shift: Tensor, plan: Any = None) -> Tensor:
        """Crop 1, its mask, and where crop 2 begins in it, (B, 3) tokens -> predicted tokens of crop 2 (B, N, width)."""
        encoded: Tokens = self.encoder(crop, hidden, plan)
        known = self.projector(encoded.tokens)
        index = visible_index(self.encoder.token_mask(hidden).flatten(1)).to(crop.device, non_blocking=True)
        table = sincos_positions(tuple(encoded.grid), self.width, str(crop.device)).to(known.dtype)
        asked = sincos_at(grid_places(encoded.grid, shift), self.width).to(known.dtype)
        tokens = torch.cat(
            [known + positions_at(table, index), self.mask_token.to(known.dtype) + asked], dim=1
        )
        for block in self.decoder:
            tokens = block(tokens)
        return self.predict(self.norm(tokens[:, known.shape[1] :]))


def grid_places(grid: tuple[int, int, int], shift: Tensor) -> Tensor:
    """Places of a shifted grid's tokens, (B, N, 3) in tokens of the grid that is not shifted; ``shift`` is (B, 3)."""
    axes = [torch.arange(g, dtype=torch.float32, device=shift.device) for g in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2) + shift[:, None]


def build_student(network: nn.Module, settings: dict[str, Any]) -> SimStudent:
    """A student as a checkpoint describes it."""
    return SimStudent(token_encoder(network), **settings)


class Sim(Method):
    """Predictions of another crop's tokens, kept apart by UniGrad's second term.

    Args:
        student: encoder, projector and decoder.
        view: changes intensities of both crops. One that turns or zooms is refused: tokens would no longer know their place.
        spread_weight: of the term that keeps vectors apart (the authors: 0.02).
    """

    name = "sim"
    terms = ("l_sim",)
    meters = ("l_sim/distance", "l_sim/spread")

    def __init__(self, student: SimStudent, view: Any = None, spread_weight: float = 0.02) -> None:
        if view is not None and (view.rotation or view.zoom or bool(view.flip.any())):
            raise AliceError(
                "SIM asks for places of the other crop: set rotation and zoom of method::view to 0, and flip to [0, 0, 0]."
            )
        if not spread_weight >= 0:
            raise AliceError(f"spread_weight must be 0 or more, got {spread_weight}.")
        self.student: SimStudent = student
        self.teacher = Teacher(encoder=student.encoder, projector=student.projector)
        self.loss = nn.Module()
        self.view, self.spread_weight = view, spread_weight

    def views(self, batch: dict[str, Any], device: torch.device) -> SimViews:
        """Both crops with intensities changed, the mask of the first, and the shift between them."""
        crop_1, crop_2 = batch["crop_1"], batch["crop_2"]
        if self.view is not None:
            crop_1, crop_2 = self.view(crop_1, batch["seed"]), self.view(crop_2, batch["seed"] + 1)
        plans = batch.get("plans", ())
        patch = torch.tensor(self.student.encoder.patch)
        shift = (batch["shift"] / patch).float().to(device, non_blocking=True)
        return SimViews(crop_1, batch["hidden_1"], plans[0] if len(plans) == 1 else None, crop_2, shift)

    def target(self, views: SimViews) -> Tensor:
        """The teacher's tokens of crop 2, (B, N, D), each normalised."""
        assert isinstance(self.teacher, Teacher)
        found = self.teacher.project("projector", self.teacher.tokens(views.target))
        return F.layer_norm(found.float(), found.shape[-1:])

    def online(self, student: nn.Module, views: SimViews, target: Tensor) -> Tensor:
        """Predicted tokens of crop 2."""
        return student(views.crop, views.hidden, views.shift, views.plan)

    def losses(self, output: Tensor, views: SimViews, target: Tensor, step: int) -> dict[str, Tensor]:
        """l_sim, and its two parts."""
        distance, spread = unigrad(output.float(), target)
        l_sim = (distance + self.spread_weight * spread) / output.shape[-1]
        return {
            "l_sim": l_sim,
            "total": l_sim,
            "l_sim/distance": distance.detach(),
            "l_sim/spread": spread.detach(),
        }

    def vectors(self, output: Tensor, target: Tensor, batch: dict[str, Any]) -> Vectors:
        """Mean predicted token, and mean token of the teacher."""
        return Vectors(output.detach().mean(dim=1), target.mean(dim=1), list(batch["patient"]))

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder, the decoder and the projector."""
        own = self.student
        return {"online": [own.encoder], "decoder": [*own.decoder], "heads": [own.projector, own.predict]}

    def summary(self) -> dict[str, Any]:
        """Settings of student, loss and view."""
        view = getattr(self.view, "settings", None)
        return {"student": self.student.settings, "loss": {"spread_weight": self.spread_weight}, "view": view}


def unigrad(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance to the target, and mean ``p^T C p`` with the targets' correlation C over all processes.

    Args:
        predicted: (B, N, D).
        target: (B, N, D), without gradient.
    """
    rows = target.flatten(0, 1)
    correlation = mean_over_processes(rows.T @ rows / len(rows))
    distance = (predicted - target).square().sum(dim=-1).mean()
    return distance, ((predicted @ correlation) * predicted).sum(dim=-1).mean()
