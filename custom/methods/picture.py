"""A picture of what a run has learnt: its curves, a reconstruction, and one place found in another patient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from custom.encoders.masking import hidden_voxels
from custom.encoders.patches import patchify, unpatchify
from custom.methods.terms import RAW_MEAN, RAW_SPREAD


def predicts_raw(summary: dict[str, Any]) -> bool:
    """Whether a run's decoder predicts raw patches, not normalised ones."""
    return bool(summary.get("loss", {}).get("reconstruction") == "raw")


@torch.no_grad()
def reconstruction(student: Any, crop: Tensor, hidden: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
    """What the student sees of a crop, and how it fills in the rest.

    Args:
        crop: (1, 1, X, Y, Z) in [0, 1].
        hidden: bool over mask units (1, ux, uy, uz).

    Returns:
        The masked crop and the crop with hidden patches predicted, both (X, Y, Z). Where normalised patches are predicted
        (MAE) each is shown with its patch's true mean and spread; ``raw`` predictions need no such help.
    """
    encoder = student.encoder
    encoded = encoder(crop, hidden)
    decoded = student.decoder(encoded.tokens, encoded.grid, encoder.token_mask(hidden))
    patches = patchify(crop, encoder.patch)
    spread, mean = patches.std(dim=-1, keepdim=True), patches.mean(dim=-1, keepdim=True)
    if raw:
        spread, mean = torch.tensor(RAW_SPREAD), torch.tensor(RAW_MEAN)
    predicted = unpatchify(student.decoder.pixels(decoded) * spread + mean, encoded.grid, encoder.patch)
    unseen = hidden_voxels(hidden, encoder.unit)
    return torch.where(unseen, 0.0, crop)[0, 0], torch.where(unseen, predicted.clamp(0, 1), crop)[0, 0]


@torch.no_grad()
def token_similarity(student: Any, crop_q: Tensor, crop_k: Tensor, voxel: Sequence[int]) -> Tensor:
    """Cosine of Q's token at a voxel with every token of K, centred over both crops: (X, Y, Z), upsampled."""
    encoder = student.encoder
    encoded = encoder(torch.cat([crop_q, crop_k]))
    tokens = F.normalize(encoded.tokens - encoded.tokens.mean(dim=(0, 1)), dim=-1)
    place = [v // p for v, p in zip(voxel, encoder.patch, strict=True)]
    index = int(np.ravel_multi_index(place, encoded.grid))
    field = (tokens[1] @ tokens[0, index]).view(1, 1, *encoded.grid)
    return F.interpolate(field, size=crop_k.shape[2:], mode="trilinear", align_corners=False)[0, 0]


def run_picture(
    student: Any,
    log: list[dict[str, Any]],
    terms: Sequence[str],
    crop_q: Tensor,
    crop_k: Tensor,
    hidden: Tensor,
    raw: bool = False,
) -> Figure:
    """All of it on one figure. A student without a decoder of pixels shows no reconstruction.

    Args:
        student: in evaluation mode; has an ``encoder``.
        log: lines of the run's ``log.jsonl``.
        terms: names of the loss terms.
        crop_q, crop_k: (1, 1, X, Y, Z) of two held-back patients at the same anatomy.
        hidden: bool over mask units (1, ux, uy, uz).
        raw: the decoder predicts raw patches, not normalised ones.
    """
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 4)
    _curves(axes[0, 0], log, terms, "loss terms")
    _curves(axes[1, 0], log, ("probe/retrieval", "probe/chance", "probe/linear"), "held-back patients")
    middle = crop_q.shape[4] // 2
    _slice(axes[0, 1], crop_q[0, 0][..., middle], "held-back crop Q")
    if hasattr(student, "decoder") and hasattr(student.decoder, "pixels"):
        masked, filled = reconstruction(student, crop_q, hidden, raw)
        share = float(hidden.float().mean())
        _slice(axes[0, 2], masked[..., middle], f"what the encoder sees ({share:.0%} hidden)")
        help_given = "" if raw else " (their true mean and spread are given)"
        _slice(axes[0, 3], filled[..., middle], f"hidden patches filled in{help_given}")
    else:
        axes[0, 2].set_axis_off()
        axes[0, 3].set_axis_off()
    voxel = [n // 2 for n in crop_q.shape[2:]]
    field = token_similarity(student, crop_q, crop_k, voxel)
    _slice(axes[1, 1], crop_q[0, 0][..., middle], "a place in Q")
    axes[1, 1].plot(voxel[0], voxel[1], "+", color="tab:red", markersize=16, markeredgewidth=2)
    _slice(axes[1, 2], crop_k[0, 0][..., middle], "the same place in K, another patient")
    axes[1, 2].plot(voxel[0], voxel[1], "+", color="tab:red", markersize=16, markeredgewidth=2)
    _slice(axes[1, 3], crop_k[0, 0][..., middle], "how like that place K's tokens are")
    shown = axes[1, 3].imshow(field[..., middle].T, origin="lower", cmap="magma", alpha=0.6, vmin=-1, vmax=1)
    figure.colorbar(shown, ax=axes[1, 3], shrink=0.7, label="cosine")
    return figure


def _curves(axis: Any, log: list[dict[str, Any]], names: Sequence[str], title: str) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if any(value for _, value in points):  # a term that is off is left out
            axis.plot(
                *zip(*points, strict=True),
                label=name.removeprefix("probe/"),
                marker="." if len(points) < 30 else None,
            )
    axis.set(title=title, xlabel="step", ylim=(0, None))
    if axis.lines:
        axis.legend(fontsize=8)


def _slice(axis: Any, image: Tensor, title: str) -> None:
    axis.imshow(image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
