"""What visible-only encoding saves in a pre-training step, beside MONAI's dense modules on the same weights and masks.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_step.py --networks vit_b swin --crops 96 192 --repeats 3

Dense means: MONAI's own forward on the crop with hidden voxels zeroed, visible tokens picked afterwards; the target
encoder is MONAI's too. Times are CPU seconds of one process and thread, taken in turn (A B A B), medians with their
range; peak live bytes are metered on the meta device and repeat exactly. nnFormer mixes neighbours by convolution,
so it has no visible-only form: its row gives its times alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import gather_visible, hidden_voxels, hide_tokens, visible_index
from custom.encoders.nnformer import NNFormer
from custom.encoders.tokens import SwinTokens, TokenEncoder, Tokens, ViTTokens, token_encoder
from custom.engine.cost import count_flops, peak_live_bytes
from custom.engine.ema import EMA
from custom.engine.schedules import decay_groups
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss

CROPS = {"96": (96, 96, 96), "192": (192, 192, 64)}


def build(name: str, crop: tuple[int, int, int]) -> nn.Module:
    """A network of the benchmark by its name."""
    if name == "vit_b":
        return MaskedViT(1, crop, 16, pos_embed_type="sincos")
    if name.startswith("swin"):
        depths = [2, 2, 18, 2] if name == "swin_deep" else [2, 2, 2, 2]
        return MaskedSwin(1, 48, (7, 7, 7), (2, 2, 2), depths=depths, num_heads=[3, 6, 12, 24])
    return NNFormer(1, 1, img_size=crop, drop_path_rate=0.0)


class DenseViT(ViTTokens):
    """MONAI's ViT on the zeroed crop, visible tokens picked from its output."""

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        tokens, _ = ViT.forward(self.encoder, _zeroed(crop, hidden, 16))
        return Tokens(_visible(tokens, hidden), self.units(tuple(crop.shape[2:])))


class DenseSwin(SwinTokens):
    """MONAI's Swin on the zeroed crop."""

    def forward(self, crop: Tensor, hidden: Tensor | None = None, plan: Any = None) -> Tokens:
        maps = SwinTransformer.forward(self.encoder, _zeroed(crop, hidden, 32))
        coarse = F.interpolate(maps[4], scale_factor=2, mode="nearest")
        tokens = self._fuse(*(m.flatten(2).transpose(1, 2) for m in (maps[3], coarse)))
        x, y, z = (2 * u for u in self.units(tuple(crop.shape[2:])))
        return Tokens(_visible(tokens, None if hidden is None else self.token_mask(hidden)), (x, y, z))


def _zeroed(crop: Tensor, hidden: Tensor | None, unit: int) -> Tensor:
    return crop if hidden is None else crop.masked_fill(hidden_voxels(hidden, unit).to(crop.device), 0.0)


def _visible(tokens: Tensor, hidden: Tensor | None) -> Tensor:
    return (
        tokens
        if hidden is None
        else gather_visible(tokens, visible_index(hidden.flatten(1)).to(tokens.device))
    )


def encoder_step(encoder: TokenEncoder, crop: Tensor, hidden: Tensor) -> None:
    """Forward and backward of the student's encoder."""
    encoder.zero_grad(set_to_none=True)
    tokens = encoder(crop, hidden).tokens
    (tokens * torch.ones_like(tokens)).sum().backward()


def target_forward(encoder: TokenEncoder, crop: Tensor) -> None:
    """Forward of the target encoder."""
    with torch.no_grad():
        encoder(crop)


class WholeStep:
    """Student, teacher, losses, backward, optimizer, EMA on one Q and K."""

    def __init__(self, encoder: TokenEncoder) -> None:
        self.student = StudentBranch(encoder)
        self.teacher = self.student.make_teacher()
        self.loss, self.ema = AliceLoss(encoder.patch), EMA(self.teacher, self.student)
        self.optimizer = torch.optim.AdamW(decay_groups(self.student, 0.05), lr=1e-5, fused=True)

    def __call__(self, crop: Tensor, hidden: Tensor) -> None:
        output = self.student(crop, hidden, self.teacher(crop), self.teacher.casa)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(output, crop, hidden)["total"].backward()
        self.optimizer.step()
        self.ema.update(0.996)


def paired(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each way, taken in turn; one uncounted round first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if round_:
                seconds[name].append(time.process_time() - started)
    return seconds


def measure(
    name: str, crop_size: tuple[int, int, int], ratio: float, repeats: int, whole: bool
) -> list[dict[str, Any]]:
    """All rows of one network at one crop size."""
    torch.manual_seed(0)
    network = build(name, crop_size)
    ours = token_encoder(network)
    dense_kind = {"MaskedViT": DenseViT, "MaskedSwin": DenseSwin}.get(type(network).__name__)
    dense = dense_kind(network) if dense_kind else None  # type: ignore[arg-type]
    if isinstance(dense, SwinTokens) and isinstance(ours, SwinTokens):
        dense.from_fine, dense.from_coarse = ours.from_fine, ours.from_coarse
    # a single small crop would time the writing of ViT-B's 88 M gradients, not the encoding
    batch = 4 if name == "vit_b" and max(crop_size) <= 96 else 1
    crop, hidden = torch.rand(batch, 1, *crop_size), hide_tokens(batch, ours.units(crop_size), ratio)
    pair, hidden_pair = torch.rand(2, 1, *crop_size), hide_tokens(2, ours.units(crop_size), ratio)
    parts: dict[str, Callable[[TokenEncoder], Callable[[], None]]] = {
        "encoder forward+backward": lambda e: lambda: encoder_step(e, crop, hidden),
        "target forward": lambda e: lambda: target_forward(e, crop),
    }
    if whole:
        parts["whole step, Q and K"] = lambda e: _step_of(e, pair, hidden_pair)
    rows = []
    for part, make in parts.items():
        ways = {"ours": make(ours)} | ({"dense": make(dense)} if dense else {})
        seconds = paired(ways, repeats)
        crops = 2 if part.startswith("whole") else batch
        row: dict[str, Any] = {
            "network": name,
            "crop": "x".join(map(str, crop_size)),
            "crops": crops,
            "part": part,
        }
        for way, values in seconds.items():
            row[f"{way}_s"] = [round(v, 3) for v in (statistics.median(values), min(values), max(values))]
        if dense:
            row["times_faster"] = round(row["dense_s"][0] / row["ours_s"][0], 2)
        if part != "whole step, Q and K":
            row |= _metered(part, ours, dense, crop, hidden)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _step_of(encoder: TokenEncoder, crop: Tensor, hidden: Tensor) -> Callable[[], None]:
    step = WholeStep(copy.deepcopy(encoder))
    return lambda: step(crop, hidden)


def _metered(
    part: str, ours: TokenEncoder, dense: TokenEncoder | None, crop: Tensor, hidden: Tensor
) -> dict[str, Any]:
    """FLOPs and peak live bytes on the meta device."""
    found: dict[str, Any] = {}
    for way, encoder in {"ours": ours, "dense": dense}.items():
        if encoder is None:
            continue
        twin, x = copy.deepcopy(encoder).to("meta"), crop.to("meta")
        run = (
            (lambda t=twin, x=x: encoder_step(t, x, hidden))
            if "backward" in part
            else (lambda t=twin, x=x: target_forward(t, x))
        )
        found[f"{way}_gflop"], found[f"{way}_peak_mib"] = (
            round(count_flops(run) / 1e9, 1),
            round(peak_live_bytes(run) / 2**20),
        )
    if dense:
        found["flop_ratio"] = round(found["ours_gflop"] / found["dense_gflop"], 3)
        found["peak_ratio"] = round(found["ours_peak_mib"] / found["dense_peak_mib"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=["vit_b", "swin"], choices=["vit_b", "swin", "swin_deep", "nnformer"]
    )
    parser.add_argument("--crops", nargs="+", default=["96", "192"], choices=list(CROPS))
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-whole", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for crop in args.crops
        for name in args.networks
        for row in measure(name, CROPS[crop], args.ratio, args.repeats, not args.no_whole)
    ]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
