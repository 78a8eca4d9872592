"""Cost of MaskedSwin beside MONAI's SwinTransformer: CPU time, FLOPs and live memory.

    OMP_NUM_THREADS=1 python benchmarks/swin_encoder.py --crop 96 96 96 --repeats 3 --json build/swin.json

Both run on the same weights in one process and one thread, in turn (A B A B). Times are CPU seconds of this
process, which a busy machine disturbs less than the clock on the wall; FLOPs and bytes are metered on the
meta device and repeat exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor

from custom.encoders.masked_swin import MaskedSwin, VisibleFeatures
from custom.encoders.masking import hide_tokens
from custom.engine.cost import count_flops, peak_live_bytes

Encode = Callable[[MaskedSwin, Tensor], object]


def training_step(net: MaskedSwin, x: Tensor, encode: Encode) -> None:
    """Forward and backward from all five scales, weighted at random (normed maps have a constant mean)."""
    net.zero_grad(set_to_none=True)
    features = encode(net, x)
    maps: Sequence[Tensor] = features.maps if isinstance(features, VisibleFeatures) else features  # type: ignore
    torch.stack([(scale * torch.randn_like(scale)).mean() for scale in maps]).sum().backward()


def target_step(net: MaskedSwin, x: Tensor, encode: Encode) -> None:
    """Forward as a target encoder runs it."""
    with torch.no_grad():
        encode(net, x)


def measure(
    net: MaskedSwin, crop: Sequence[int], steps: dict[str, tuple[Callable, Encode]], repeats: int
) -> dict:
    """Times, FLOPs and peak live bytes of each step, all on the same crop."""
    x = torch.rand(1, 1, *crop)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, (step, encode) in steps.items():
            start = time.process_time()
            step(net, x, encode)
            seconds[name].append(time.process_time() - start)

    meta_net, meta_x = net.to("meta"), x.to("meta")
    report = {}
    for name, (step, encode) in steps.items():

        def run(step: Callable = step, encode: Encode = encode) -> None:
            step(meta_net, meta_x, encode)

        report[name] = {
            "seconds": statistics.median(seconds[name]) if repeats else None,
            "seconds_min": min(seconds[name], default=None),
            "seconds_max": max(seconds[name], default=None),
            "gflops": count_flops(run) / 1e9,
            "peak_live_mib": peak_live_bytes(run) / 2**20,
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crop", type=int, nargs=3, default=(96, 96, 96), help="voxels, multiples of 32")
    parser.add_argument("--depths", type=int, nargs=4, default=(2, 2, 2, 2))
    parser.add_argument("--hidden-ratio", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=3, help="0 meters FLOPs and bytes only")
    parser.add_argument("--only", nargs="*", help="names of the steps to run")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = MaskedSwin(1, 48, (7, 7, 7), (2, 2, 2), arguments.depths, (3, 6, 12, 24))
    hidden = hide_tokens(1, [side // net.unit for side in arguments.crop], arguments.hidden_ratio)
    start = time.process_time()
    plan = net.plan(hidden)
    first_plan_seconds = time.process_time() - start  # with the tables that are cached for a crop size
    start = time.process_time()
    net.plan(hidden)
    plan_seconds = time.process_time() - start

    monai: Encode = SwinTransformer.forward
    steps: dict[str, tuple[Callable, Encode]] = {
        "train MONAI": (training_step, monai),
        "train visible": (training_step, lambda net, x: net(x, plan=plan)),
        "train dense": (training_step, lambda net, x: net(x)),
        "target MONAI": (target_step, monai),
        "target visible": (target_step, lambda net, x: net(x, plan=plan)),
        "target dense": (target_step, lambda net, x: net(x)),
    }
    if arguments.only:
        steps = {name: step for name, step in steps.items() if name in arguments.only}
    report = measure(net, arguments.crop, steps, arguments.repeats)

    print(f"crop {tuple(arguments.crop)}, {arguments.hidden_ratio:.0%} hidden, depths {arguments.depths}")
    print(f"plan: {plan_seconds:.3f} s ({first_plan_seconds:.3f} s for the first of this size)")
    for name, figures in report.items():
        base = report.get(name.split()[0] + " MONAI", figures)
        line = f"{name:15} {figures['gflops']:8.1f} GFLOP ({figures['gflops'] / base['gflops']:.3f})"
        line += (
            f" {figures['peak_live_mib']:8.0f} MiB ({figures['peak_live_mib'] / base['peak_live_mib']:.3f})"
        )
        if arguments.repeats:
            line += (
                f" {figures['seconds']:7.2f} s [{figures['seconds_min']:.2f}, {figures['seconds_max']:.2f}]"
            )
            line += f" {base['seconds'] / figures['seconds']:.2f}x"
        print(line)
    if arguments.json:
        figures = {"crop": arguments.crop, "depths": arguments.depths, "plan_seconds": plan_seconds, **report}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
