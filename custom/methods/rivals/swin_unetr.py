"""Swin UNETR's pretext: rotation, contrast and inpainting of one crop (Tang et al., CVPR 2022, arXiv 2111.14791)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.encoders.patches import patchify
from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.method import Method, Student
from custom.errors import AliceError
from custom.methods.views import generator_of

HEAD_INPUTS = ("mean", "token")
Box = tuple[slice, slice, slice]


class PretextViews(NamedTuple):
    """Two turned copies of every crop, stacked along the batch."""

    cut: Tensor  # (2B, 1, X, Y, Z), with boxes cut out
    whole: Tensor  # (2B, 1, X, Y, Z), the same without cut-outs
    turns: Tensor  # (2B,) quarter turns about z


class PretextOutput(NamedTuple):
    """What the student says of the cut copies."""

    rotation: Tensor  # (2B, 4) logits
    vector: Tensor  # (2B, D)
    pixels: Tensor  # (2B, N, P)


class PretextStudent(Student):
    """A dense encoder with a head for each of three tasks.

    Args:
        encoder: gives tokens on one grid.
        out_width: channels of the vector that is contrasted (the authors: 512).
        head_input: ``mean`` (ours: the mean token) or ``token`` (the authors' code: token 0 for the rotation, token 1 for the
            contrast).
    """

    def __init__(self, encoder: TokenEncoder, out_width: int = 512, head_input: str = "mean") -> None:
        super().__init__()
        if head_input not in HEAD_INPUTS:
            raise AliceError(f"head_input must be one of {', '.join(HEAD_INPUTS)}; got {head_input!r}.")
        self.settings = {"out_width": out_width, "head_input": head_input}
        self.encoder, self.head_input = encoder, head_input
        self.rotation = nn.Linear(encoder.width, 4)
        self.contrast = nn.Linear(encoder.width, out_width)
        self.pixels = nn.Linear(
            encoder.width, math.prod(encoder.patch)
        )  # ours; the authors: five convolutions that upsample

    def forward(self, crop: Tensor) -> PretextOutput:
        """(2B, 1, X, Y, Z) -> answers to the three tasks."""
        tokens = self.encoder(crop).tokens
        mean = tokens.mean(dim=1)
        turned, told = (mean, mean) if self.head_input == "mean" else (tokens[:, 0], tokens[:, 1])
        return PretextOutput(self.rotation(turned), self.contrast(told), self.pixels(tokens))


def build_student(network: nn.Module, settings: dict[str, Any]) -> PretextStudent:
    """A student as a checkpoint describes it."""
    return PretextStudent(token_encoder(network), **settings)


class SwinUnetrPretext(Method):
    """l_rot + l_c + l_rec. The contrast is between the samples of one process, as in the authors' code.

    Args:
        student: encoder and heads.
        temperature: of the contrast (the authors: 0.5).
        crop_size: voxels along x, y, z, to refuse unequal x and y before a run begins.
        most_cut: largest share of a copy that is cut out (the authors: 0.3).
        box_sides: smallest and largest side of a box, as shares of the crop's (the authors: 0.05, 0.25).
    """

    name = "swin_unetr"
    terms = ("l_rot", "l_c", "l_rec")
    meters = ("l_rot/right",)

    def __init__(
        self,
        student: PretextStudent,
        temperature: float = 0.5,
        crop_size: Sequence[int] | None = None,
        most_cut: float = 0.3,
        box_sides: Sequence[float] = (0.05, 0.25),
    ) -> None:
        if not temperature > 0 or not 0 <= most_cut < 1 or not 0 < box_sides[0] <= box_sides[1] <= 1:
            raise AliceError(f"Out of range: {temperature=}, {most_cut=}, {box_sides=}.")
        if crop_size is not None:
            _need_equal_sides(*crop_size[:2])
        self.student: PretextStudent = student
        self.loss = nn.Module()
        self.temperature, self.most_cut, self.box_sides = temperature, most_cut, tuple(box_sides)

    def views(self, batch: dict[str, Any], device: torch.device) -> PretextViews:
        """Two copies, each turned, then noise in boxes, then boxes of another sample."""
        crop, size = batch["crop"], len(batch["crop"])
        _need_equal_sides(*crop.shape[2:4])
        seeds = torch.cat([batch["seed"], batch["seed"] + 1]).tolist()
        generators = [generator_of(seed, "view") for seed in seeds]
        turns = [int(torch.randint(4, (1,), generator=g)) for g in generators]
        whole = torch.stack([torch.rot90(crop[i % size], k, (1, 2)) for i, k in enumerate(turns)])
        cut = whole.clone()
        for i, generator in enumerate(generators):
            for box in self._boxes(crop.shape[2:], generator):
                noise = torch.randn(_sides(box), generator=generator)
                noise = (noise - noise.min()) / (noise.max() - noise.min()).clamp(min=1e-6)
                cut[(i, 0, *box)] = noise.to(cut, non_blocking=True)
        noisy = cut.clone()
        for i, generator in enumerate(generators):
            side = i // size * size
            other = side + int(torch.randint(size, (1,), generator=generator))
            if other != i:
                for box in self._boxes(crop.shape[2:], generator):
                    cut[(i, 0, *box)] = noisy[(other, 0, *box)]
        return PretextViews(cut, whole, torch.tensor(turns).to(device, non_blocking=True))

    def _boxes(self, shape: Sequence[int], generator: torch.Generator) -> list[Box]:
        """Boxes until a random share of the copy is covered, counted with overlaps."""
        wanted = float(torch.rand(1, generator=generator)) * self.most_cut * math.prod(shape)
        boxes, covered = [], 0
        while covered < wanted:
            sides = []
            for side in shape:
                least = max(int(self.box_sides[0] * side), 1)
                most = max(int(self.box_sides[1] * side), least + 1)
                sides.append(int(torch.randint(least, most, (1,), generator=generator)))
            starts = [
                int(torch.randint(n - s + 1, (1,), generator=generator))
                for n, s in zip(shape, sides, strict=True)
            ]
            x, y, z = (slice(a, a + s) for a, s in zip(starts, sides, strict=True))
            boxes.append((x, y, z))
            covered += math.prod(sides)
        return boxes

    def online(self, student: nn.Module, views: PretextViews, target: None) -> PretextOutput:
        """Answers to the three tasks."""
        return student(views.cut)

    def losses(
        self, output: PretextOutput, views: PretextViews, target: None, step: int
    ) -> dict[str, Tensor]:
        """The three terms, their sum, and how many turns are told right."""
        l_rot = F.cross_entropy(output.rotation.float(), views.turns)
        l_c = simclr(output.vector, self.temperature)
        wanted = patchify(views.whole.float(), self.student.encoder.patch)
        l_rec = (output.pixels.float() - wanted).abs().mean()
        right = (output.rotation.argmax(dim=1) == views.turns).float().mean()
        return {
            "l_rot": l_rot,
            "l_c": l_c,
            "l_rec": l_rec,
            "total": l_rot + l_c + l_rec,
            "l_rot/right": right,
        }

    def timed(self) -> dict[str, list[nn.Module]]:
        """The encoder and the heads."""
        own = self.student
        return {"online": [own.encoder], "decoder": [own.pixels], "heads": [own.rotation, own.contrast]}

    def summary(self) -> dict[str, Any]:
        """Settings of student and loss."""
        names = ("temperature", "most_cut", "box_sides")
        return {"student": self.student.settings, "loss": {n: getattr(self, n) for n in names}}


def simclr(vectors: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, Eq. 1): of stacked rows (2B, D), row i and row i + B belong together; all others are wrong."""
    unit = F.normalize(vectors.float(), dim=-1)
    logits = unit @ unit.T / temperature
    logits = logits.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -math.inf)
    right = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return F.cross_entropy(logits, right)


def _need_equal_sides(x: int, y: int) -> None:
    if x != y:
        raise AliceError(
            f"swin_unetr turns crops about z: crop_size needs equal sides x and y, and has {x} and {y}."
        )


def _sides(box: Box) -> list[int]:
    return [part.stop - part.start for part in box]
