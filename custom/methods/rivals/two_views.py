"""What methods with two augmented crops of one scan share: the views, and a teacher of encoder and head."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom.encoders.tokens import TokenEncoder
from custom.engine.method import Vectors
from custom.errors import AliceError

ALIKE, ALIKE_STEPS = 0.99, 100  # of the value that vectors have which are all alike, and for how long (ours)


class TwoViews(NamedTuple):
    """Both crops of every sample, stacked along the batch: the first half is crop 1, the second crop 2."""

    crop: Tensor  # (2B, 1, X, Y, Z), augmented
    hidden: Tensor | None  # bool over mask units (2B, ux, uy, uz) on the CPU, where crops are masked
    seeds: Tensor  # (2B,) on the CPU


def stack_views(batch: dict[str, Any], view: Any) -> TwoViews:
    """Augment both crops of a batch of ``TwoCrops``, each from a seed of its own."""
    crop = torch.cat([batch["crop_1"], batch["crop_2"]])
    seeds = torch.cat([batch["seed"], batch["seed"] + 1])
    hidden = [batch[key] for key in ("hidden_1", "hidden_2") if key in batch]
    return TwoViews(crop if view is None else view(crop, seeds), torch.cat(hidden) if hidden else None, seeds)


def vectors_of(student: Tensor, teacher: Tensor, batch: dict[str, Any]) -> Vectors:
    """Pooled vectors (2B, D) of stacked crops, and whose crops they show."""
    return Vectors(student.detach(), teacher.detach(), [*batch["patient"], *batch["patient"]])


class Teacher(nn.Module):
    """A frozen copy of modules of the student, under the same names.

    With batch norm in its head, the head goes on to norm by the batch, as the authors' momentum encoders do.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, copy.deepcopy(module))
        self.requires_grad_(False)

    def tokens(self, crop: Tensor) -> Tensor:
        """Tokens (B, N, C) of crops (B, 1, X, Y, Z), nothing hidden."""
        found: Tensor = self.get_submodule("encoder")(crop).tokens
        return found

    def project(self, name: str, tokens: Tensor) -> Tensor:
        """Tokens through a head, ``name`` as in the student."""
        found: Tensor = self.get_submodule(name)(tokens)
        return found

    def train(self, mode: bool = True) -> Teacher:
        """Evaluation mode, but for batch norm."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm):
                module.train()
        return self

    def eval(self) -> Teacher:
        """The same."""
        return self.train(False)


class AlikeAlarm(nn.Module):
    """Counts the steps in a row in which a loss has the value of vectors that are all alike."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def see(self, value: Tensor, alike: float) -> None:
        """One step's value; ``alike`` is what it is when all vectors are the same."""
        if self.training:
            self.steps.copy_(torch.where(value > ALIKE * alike, self.steps + 1, 0))

    def warnings(self) -> list[str]:
        """A sentence, after a hundred steps in a row."""
        steps = int(self.steps)
        if steps < ALIKE_STEPS:
            return []
        return [
            f"for {steps} steps the loss has had the value of vectors that are all alike. Lower learning_rate, or train longer."
        ]


def no_batch_norm_in_small_batches(norm: str, rows: int) -> str | None:
    """Why a batch is too small for batch norm in the heads, or None."""
    if norm == "batch" and rows < 32:
        return f"head_norm: batch needs at least 32 crops a step and process, and there are {rows}. Take head_norm: layer."
    return None


def with_batch_norm_of_all(student: nn.Module, teacher: nn.Module | None, device: torch.device) -> None:
    """Let batch norm in heads be that of all processes.

    Raises:
        AliceError: on CPUs, for which torch has none.
    """
    if device.type != "cuda":
        raise AliceError("head_norm: batch on several processes needs GPUs. Take head_norm: layer.")
    for module in (student, teacher):
        if module is not None:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)


def freeze_embedding(encoder: TokenEncoder) -> None:
    """Freeze a ViT's patch embedding (MoCo v3 and SIM, for stability); other encoders have none of its kind."""
    layer = getattr(encoder.encoder, "patch_embedding", None)
    if layer is not None:
        layer.patch_embeddings.requires_grad_(False)


def entropy(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Mean entropy of the teacher's centred softmax, rows (..., K)."""
    log_target = torch.log_softmax((logits.float() - centre) / temperature, dim=-1)
    return -(log_target.exp() * log_target).sum(dim=-1).mean()


def log_of(count: int) -> float:
    """Natural logarithm; 1 for a count of 1, so that nothing is compared with 0."""
    return math.log(count) if count > 1 else 1.0
