"""The authors' architecture as a pair of branches: student and teacher are whole nnFormers (preset ``official``).

It follows the authors' code (commit d45cfcd) with its crashes mended. Two things differ on purpose: one head serves
pooled and token vectors in both networks (there the student's second last layer drops out of the EMA by its name),
and the teacher runs in evaluation mode.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from custom.encoders.masking import hidden_voxels
from custom.encoders.nnformer import NNFormer
from custom.encoders.patches import patchify
from custom.encoders.tokens import NNFormerTokens, Tokens
from custom.engine.method import Student
from custom.methods.alice.branch import StudentOutput, TeacherOutput
from custom.methods.alice.casa import OfficialCASA
from custom.methods.heads import ProjectionHead


class OfficialTeacher(nn.Module):
    """Target nnFormer, encoder and decoder, and its head; a stand-in for ``TeacherBranch``."""

    casa = None  # the student's serves both

    def __init__(self, network: NNFormer, adapters: nn.ModuleDict, head: ProjectionHead) -> None:
        super().__init__()
        self.network, self.adapters, self.head = network, adapters, head
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, crop: Tensor) -> TeacherOutput:
        """(B, 1, X, Y, Z) -> decoder tokens and pooled bottleneck, both after the head."""
        tokens, pooled, _ = _describe(self.network, self.head, self.adapters, crop)
        return TeacherOutput(tokens, pooled)


class OfficialStudent(Student):
    """Online nnFormer with the authors' head, CASA and image reconstruction.

    Args:
        network: an ``NNFormer`` with one output channel.
        prototypes: rows of the head's last layer (512).
    """

    def __init__(self, network: NNFormer, prototypes: int = 512) -> None:
        super().__init__()
        width = network.settings["embed_dim"]
        self.network = network
        self.encoder = NNFormerTokens(network.encoder, 8 * width)
        for norm in network.encoder.norms:  # here the decoder's skips use them
            norm.requires_grad_(True)
        self.adapters = nn.ModuleDict(
            {"encoder": nn.Linear(8 * width, 8 * width), "decoder": nn.Linear(4 * width, 8 * width)}
        )
        self.head = ProjectionHead(8 * width, prototypes=prototypes)
        self.casa = OfficialCASA(prototypes)
        self.settings: dict[str, Any] = {"official": True, "prototypes": prototypes}
        # what nothing calls must not wait for a gradient: upsampled logits of the coarser scales
        for final in list(network.final)[1:]:
            final.requires_grad_(False)

    def make_teacher(self) -> OfficialTeacher:
        """A teacher that starts as this student."""
        return OfficialTeacher(*(copy.deepcopy(m) for m in (self.network, self.adapters, self.head)))  # type: ignore[arg-type]

    def timed(self) -> dict[str, list[nn.Module]]:
        """Modules by the section of a step that they belong to."""
        return {"online": [self.network], "heads": [self.head, self.casa]}

    def forward(
        self,
        crop: Tensor,
        hidden: Tensor,
        target: TeacherOutput,
        teacher_casa: nn.Module | None = None,
        plan: Any = None,
    ) -> StudentOutput:
        """Arguments and result as ``StudentBranch.forward``; hidden voxels are zeroed in the image."""
        seen = crop.masked_fill(
            hidden_voxels(hidden, self.encoder.unit).to(crop.device, non_blocking=True), 0.0
        )
        context, pooled, (bottleneck, image) = _describe(self.network, self.head, self.adapters, seen)
        queries = self.head(self.adapters["encoder"](bottleneck.tokens))  # (B, 64, 512) at 64^3
        student_tokens = self.casa(queries, context)
        with torch.no_grad():
            aligned = self.casa(queries, target.tokens)
        return StudentOutput(
            pixels=patchify(image, self.encoder.patch),
            visible=bottleneck.tokens,
            student_pooled=pooled,
            teacher_pooled=target.pooled,
            student_tokens=student_tokens,
            teacher_tokens=aligned,
        )


def _describe(
    network: NNFormer, head: ProjectionHead, adapters: nn.ModuleDict, crop: Tensor
) -> tuple[Tensor, Tensor, tuple[Tokens, Tensor]]:
    """Decoder tokens and pooled bottleneck after the head; bottleneck tokens; the reconstructed image."""
    maps = network.encode(crop)
    decoded = network.decode(maps)
    bottleneck = maps[-1].flatten(2).transpose(1, 2)
    x, y, z = maps[-1].shape[2:]
    tokens = head(adapters["decoder"](decoded[0].flatten(2).transpose(1, 2)))  # 8^3 tokens at 64^3
    pooled = head(bottleneck.mean(dim=1))
    return tokens, pooled, (Tokens(bottleneck, (x, y, z)), network.final[0](decoded[-1]))
