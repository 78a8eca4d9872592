"""Loss terms that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from custom.encoders.masking import refine_mask
from custom.encoders.patches import empty_patches, normalise_patches, patchify
from custom.processes import gather_rows, mean_over_processes, rank

RAW_MEAN, RAW_SPREAD = (
    0.35,
    0.3,
)  # of body voxels in the window, about (ours): the scale of a decoder of raw patches


def masked_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over samples of each sample's mean over the chosen tokens; a sample without any counts as 0."""
    weights = weights.to(values.dtype)
    return ((values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).mean()


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """``2 - 2 cos(a, stopgrad(b))`` over the last axis (BYOL, SimSiam)."""
    return 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=-1)


def masked_reconstruction(
    pixels: Tensor,
    crop: Tensor,
    hidden: Tensor,
    patch: Sequence[int],
    *,
    skip_empty: bool = True,
    normalise: bool = True,
) -> Tensor:
    """Squared error of predicted hidden patches (MAE; Alice, Eq. 1), in fp32.

    Args:
        pixels: (B, N, P) predicted patches.
        crop: (B, 1, X, Y, Z) what was to be predicted.
        hidden: bool over mask units (B, ux, uy, uz).
        patch: voxels per token along x, y, z.
        skip_empty: leave hidden patches of one flat value out (ours).
        normalise: every patch to zero mean and unit variance (MAE); else all to one scale, so that brightness counts (ours).

    Returns:
        The mean over samples of each sample's mean over hidden patches.
    """
    patches = patchify(crop.float(), patch)  # (B, N, P)
    grid = [side // p for side, p in zip(crop.shape[2:], patch, strict=True)]
    factor = [g // u for g, u in zip(grid, hidden.shape[1:], strict=True)]
    chosen = refine_mask(hidden, factor).flatten(1).to(crop.device, non_blocking=True)
    if skip_empty:
        chosen = chosen & ~empty_patches(patches)
    wanted = normalise_patches(patches) if normalise else (patches - RAW_MEAN) / RAW_SPREAD
    error = (pixels.float() - wanted).square().mean(dim=-1)
    return masked_mean(error, chosen)


def info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE: each row of the student finds its own row of the teacher among those of all processes.

    Args:
        student: (n, D).
        teacher: (n, D), without gradient.
        temperature: of the cosines.
    """
    keys = F.normalize(gather_rows(teacher.float()), dim=-1)
    logits = F.normalize(student.float(), dim=-1) @ keys.T / temperature
    right = torch.arange(len(student), device=student.device) + rank() * len(student)
    return F.cross_entropy(logits, right)


def centred_cross_entropy(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross entropy of the student's softmax against the teacher's, sharpened and centred (DINO, Eq. 2), by row.

    Args:
        student, teacher: (..., K) logits; no gradient reaches the teacher.
        centre: (K,), the teacher's running mean.
        student_temperature, teacher_temperature: the authors' are 0.1 and 0.04.

    Returns:
        (...).
    """
    target = torch.softmax((teacher.detach() - centre) / teacher_temperature, dim=-1)
    return -(target * F.log_softmax(student / student_temperature, dim=-1)).sum(dim=-1)


@torch.no_grad()
def move_centre(centre: Tensor, teacher: Tensor, momentum: float = 0.9) -> None:
    """Move a running mean towards the mean of the teacher's rows (..., K) of all processes (DINO, Eq. 4)."""
    mean = mean_over_processes(teacher.float().flatten(0, -2).mean(dim=0))
    centre.mul_(momentum).add_(mean, alpha=1 - momentum)
