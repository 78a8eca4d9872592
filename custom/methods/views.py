"""Views of a batch on its device: which tokens to hide, and the intact view turned, scaled and made noisy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from custom.encoders.masking import hide_columns, hide_tokens
from custom.errors import AliceError

MASKINGS = ("random", "column")


class Masking:
    """Masks for the online encoder, one generator a sample, so that batches and ranks change nothing.

    Args:
        ratio: share of hidden units (0.75: MAE; the Alice paper says "following MAE").
        kind: ``random`` (the paper) or ``column`` along z (the authors' code).
    """

    def __init__(self, ratio: float = 0.75, kind: str = "random") -> None:
        if kind not in MASKINGS:
            raise AliceError(f"masking must be one of {', '.join(MASKINGS)}; got {kind!r}.")
        if not 0.0 <= ratio < 1.0:
            raise AliceError(f"hidden_ratio must be in [0, 1), got {ratio}.")
        self.ratio, self.kind = ratio, kind
        self.settings = {"ratio": ratio, "kind": kind}

    def __call__(self, seeds: Tensor, grid: Sequence[int]) -> Tensor:
        """Seeds (B,) on the CPU -> bool (B, ux, uy, uz) on the CPU."""
        draw = hide_tokens if self.kind == "random" else hide_columns
        return torch.cat([draw(1, grid, self.ratio, generator_of(seed, "mask")) for seed in seeds.tolist()])


class MaskedBatch:
    """Collates samples, and draws their masks (and the encoder's plans) in the loader's worker.

    Args:
        masking: draws masks from seeds.
        grid: mask units along x, y, z.
        keys: of the crops that are masked; ``crop_q`` gets its mask as ``hidden_q``, ``crop`` as ``hidden``. Key number
            ``i`` is masked from the sample's seed plus ``i``, so crops of one sample hide different places.
        planner: what the encoder prepares from a mask ahead of time; None for nothing.
        parts: into how many parts the trainer splits a batch; each gets its own plan.
    """

    def __init__(
        self,
        masking: Masking,
        grid: Sequence[int],
        keys: Sequence[str] = ("crop",),
        planner: Callable[[Tensor], Any] | None = None,
        parts: int = 1,
    ) -> None:
        self.masking, self.grid, self.keys = masking, tuple(grid), tuple(keys)
        self.planner, self.parts = planner, parts
        # refuse a crop too small to mask before any worker starts
        masking(torch.zeros(1, dtype=torch.int64), self.grid)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch with masks, bool (B, ux, uy, uz), and ``plans``, one a part."""
        batch = default_collate(samples)
        masks = [self.masking(batch["seed"] + i, self.grid) for i in range(len(self.keys))]
        batch |= {key.replace("crop", "hidden", 1): mask for key, mask in zip(self.keys, masks, strict=True)}
        if self.planner is not None and masks:
            parts = zip(*(mask.chunk(self.parts) for mask in masks), strict=True)
            batch["plans"] = [self.planner(torch.cat(part)) for part in parts]
        return batch


class TargetView:
    """The augmented view for the target encoder (Alice, Sec. 4.2: rotation, resizing, flips, intensity).

    The geometry is drawn in millimetres, so that a rotation on anisotropic voxels is one. All draws are
    uniform; the ranges are ours, as the paper gives none.

    Args:
        spacing: mm along x, y, z.
        rotation: largest angle about each axis, degrees.
        zoom: largest relative change of size.
        flip: probability of a flip along x, y, z. Left and right stay apart by default.
        scale, shift: largest relative change, and largest offset, of intensity.
        noise: largest standard deviation of Gaussian noise, in units of [0, 1].
    """

    def __init__(
        self,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        rotation: float = 15.0,
        zoom: float = 0.1,
        flip: Sequence[float] = (0.0, 0.0, 0.0),
        scale: float = 0.1,
        shift: float = 0.1,
        noise: float = 0.05,
    ) -> None:
        if not 0 <= rotation <= 180 or not 0 <= zoom < 1 or min(scale, shift, noise) < 0:
            raise AliceError(
                f"View strengths are out of range: {rotation=}, {zoom=}, {scale=}, {shift=}, {noise=}."
            )
        if len(flip) != 3 or not all(0 <= p <= 1 for p in flip):
            raise AliceError(f"flip must be three probabilities, got {list(flip)}.")
        self.spacing = torch.tensor([float(s) for s in spacing])
        self.rotation, self.zoom, self.flip = rotation, zoom, torch.tensor([float(p) for p in flip])
        self.scale, self.shift, self.noise = scale, shift, noise
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}

    def __call__(self, crop: Tensor, seeds: Tensor) -> Tensor:
        """Augment (B, 1, X, Y, Z) with seeds (B,) on the CPU; what leaves the crop is filled with 0 (air)."""
        draws = torch.stack([torch.rand(12, generator=generator_of(seed, "view")) for seed in seeds.tolist()])
        if self.rotation or self.zoom or self.flip.any():
            theta = self.matrices(draws[:, :7], crop.shape[2:]).to(crop, non_blocking=True)
            grid = F.affine_grid(theta, list(crop.shape), align_corners=False)
            crop = F.grid_sample(crop, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        signed = (2 * draws[:, 7:9] - 1) * torch.tensor([self.scale, self.shift])
        factors, offsets = ((signed[:, i].to(crop, non_blocking=True)).view(-1, 1, 1, 1, 1) for i in (0, 1))
        crop = crop * (1 + factors) + offsets
        if self.noise:
            noise = torch.stack([self._noise(seed, crop[i]) for i, seed in enumerate(seeds.tolist())])
            crop = crop + noise * (draws[:, 9] * self.noise).to(crop, non_blocking=True).view(-1, 1, 1, 1, 1)
        return crop.clamp(0.0, 1.0)

    def seen_at(self, places_mm: Tensor, seeds: Tensor, shape: Sequence[int]) -> Tensor:
        """Which place of the crop a view shows at a place of its own.

        Args:
            places_mm: (B, N, 3) mm from the view's corner.
            seeds: (B,), as the view was made with.
            shape: voxels of the crop along x, y, z.

        Returns:
            (B, N, 3) mm from the crop's corner; it may lie outside of the crop.
        """
        if not (self.rotation or self.zoom or self.flip.any()):
            return places_mm
        draws = torch.stack([torch.rand(12, generator=generator_of(seed, "view")) for seed in seeds.tolist()])
        linear = self.matrices(draws[:, :7], shape)[:, :, :3].flip(1).flip(2)  # x, y, z; over [-1, 1]
        half = torch.tensor([float(n) for n in shape]) * self.spacing / 2  # mm
        return ((places_mm - half) / half) @ linear.transpose(1, 2) * half + half

    def matrices(self, draws: Tensor, shape: Sequence[int]) -> Tensor:
        """Uniform draws (B, 7) in [0, 1): 3 angles, zoom, 3 flips -> (B, 3, 4) for ``affine_grid``."""
        angles = (2 * draws[:, :3] - 1) * math.radians(self.rotation)
        rotation = _rotations(angles)
        zoom = 1 + (2 * draws[:, 3] - 1) * self.zoom
        signs = torch.where(draws[:, 4:7] < self.flip, -1.0, 1.0)
        # output voxel -> mm -> rotated, zoomed, flipped mm -> input voxel; torch's grid runs over [-1, 1]
        # and names its axes z, y, x from the last of the tensor, hence the reversal
        half = torch.tensor([float(n) for n in shape]) * self.spacing / 2
        moved = rotation * signs[:, None, :] / zoom[:, None, None]
        linear = moved * half[None, None, :] / half[None, :, None]
        theta = torch.zeros(len(draws), 3, 4)
        theta[:, :, :3] = linear.flip(1).flip(2)
        return theta

    @staticmethod
    def _noise(seed: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed ^ _STREAMS["noise"])
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


_STREAMS = {"mask": 0x5DEECE66D, "view": 0x1B873593, "noise": 0x2545F4914F, "local": 0x9E3779B97F}


def generator_of(seed: int, stream: str) -> torch.Generator:
    """The CPU generator of one sample. Masks, views, noise and local crops each have their own."""
    return torch.Generator().manual_seed(seed ^ _STREAMS[stream])


def _rotations(angles: Tensor) -> Tensor:
    """Angles (B, 3) about x, y, z in radians -> rotation matrices (B, 3, 3), x first."""
    cos, sin = angles.cos(), angles.sin()
    one, zero = torch.ones(len(angles)), torch.zeros(len(angles))
    about_x = torch.stack([one, zero, zero, zero, cos[:, 0], -sin[:, 0], zero, sin[:, 0], cos[:, 0]], -1)
    about_y = torch.stack([cos[:, 1], zero, sin[:, 1], zero, one, zero, -sin[:, 1], zero, cos[:, 1]], -1)
    about_z = torch.stack([cos[:, 2], -sin[:, 2], zero, sin[:, 2], cos[:, 2], zero, zero, zero, one], -1)
    x, y, z = (m.view(-1, 3, 3) for m in (about_x, about_y, about_z))
    return z @ y @ x
