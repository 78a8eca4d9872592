"""Sliding-window inference on a CPU: PyTorch beside OpenVINO in float32 and bfloat16, and windows saved by the body's box.

    OMP_NUM_THREADS=1 python benchmarks/inference.py speed --feature-size 48
    OMP_NUM_THREADS=1 python benchmarks/inference.py speed --bundle BUNDLE --scan CT.nii.gz [--label LABEL.nii.gz]
    python benchmarks/inference.py windows CT.nii.gz [CT.nii.gz ...] --bundle bundles/alice_seg_flare

``speed`` sends every window of one volume through all networks in turn, in one process and one thread, and stitches each
with the same Gaussian weights. Times are CPU seconds of this process, which other work on the machine disturbs less than
the clock on the wall. Without a bundle the network has random weights: its margins between labels are tiny, so label
agreement is then a lower bound, and there is no truth to score against.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR
from monai.transforms import (
    Compose,
    CropForegroundd,
    LoadImage,
    Orientation,
    ResizeWithPadOrCrop,
    ScaleIntensityRange,
    Spacing,
)
from torch import Tensor

from custom.bundles.deploy import OpenVINONetwork, export_network, sample_window
from custom.bundles.network import Deployable, read_bundle
from custom.transfer.encoder_weights import sha256_of

Network = Callable[[Tensor], Tensor]


def in_turn(
    networks: dict[str, Network], seconds: dict[str, list[float]]
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A predictor that runs all networks on each window and notes the CPU time of each."""

    def predict(window: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for name, network in networks.items():
            start = time.process_time()
            outputs.append(network(window))
            seconds[name].append(time.process_time() - start)
        return tuple(outputs)

    return predict


def prepared(scan: str, metadata: dict[str, Any], is_label: bool = False) -> Tensor:
    """A scan (1, X, Y, Z) on the bundle's grid and in its window; a label by its nearest voxels."""
    steps: list[Callable] = [
        LoadImage(ensure_channel_first=True),
        Orientation(axcodes=metadata.get("orientation", "RAS"), labels=None),
        Spacing(pixdim=metadata["spacing"], mode="nearest" if is_label else "bilinear"),
    ]
    if not is_label:
        steps.append(ScaleIntensityRange(*metadata["window_hu"], *metadata["scaled_to"], clip=True))
    return Compose(steps)(scan).as_tensor()


def dice(found: Tensor, reference: Tensor, classes: int) -> float:
    """Mean over the foreground classes that the reference holds."""
    scores = []
    for value in range(1, classes):
        a, b = found == value, reference == value
        if b.any():
            scores.append(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    return float(np.mean(scores)) if scores else float("nan")


def speed(options: argparse.Namespace) -> None:
    """Times, label agreement and Dice, as Markdown."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    truth = None
    size = tuple(options.volume)
    if options.bundle:
        network = read_bundle(options.bundle)
        crop = ResizeWithPadOrCrop(size)
        volume = crop(prepared(options.scan, network.metadata))[None]
        if options.label:
            truth = crop(prepared(options.label, network.metadata, is_label=True))[0]
    else:
        net = SwinUNETR(in_channels=1, out_channels=14, feature_size=options.feature_size).eval()
        about = {"sha256": sha256_of(net.state_dict())}
        network = Deployable(net, (1, *options.roi), about)
        volume = sample_window((1, 1, *size), seed=2)
    roi = network.input_shape[1:]
    options.folder.mkdir(parents=True, exist_ok=True)
    xml = options.folder / f"{network.metadata['sha256'][:16]}_{'x'.join(map(str, roi))}.xml"
    if not xml.is_file():
        start = time.process_time()
        print(
            f"export: {export_network(network, 'openvino', xml)}; {time.process_time() - start:.0f} CPU seconds"
        )
    networks: dict[str, Network] = {
        "PyTorch float32": network.network,
        "OpenVINO float32": OpenVINONetwork(xml, "f32", num_threads=1),
        "OpenVINO bfloat16": OpenVINONetwork(xml, "bf16", num_threads=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    inferer = SlidingWindowInferer(roi, sw_batch_size=1, overlap=options.overlap, mode="gaussian")
    predict = in_turn(networks, seconds)
    with torch.no_grad():
        if not options.no_warm_up:
            predict(torch.zeros(1, *network.input_shape))
            for times in seconds.values():
                times.clear()
        logits = dict(zip(networks, inferer(volume.float(), predict), strict=True))

    base = next(iter(networks))
    labels = {name: found.argmax(1)[0] for name, found in logits.items()}
    classes = logits[base].shape[1]
    print(
        f"{type(network.network).__name__}, {sum(p.numel() for p in network.network.parameters()) / 1e6:.1f} M parameters, "
        f"{classes} classes, volume {size}, {len(seconds[base])} windows of {roi}, overlap {options.overlap}, Gaussian\n"
    )
    print(
        "| runtime | CPU s, all windows | CPU s a window | times faster | same label | Dice to PyTorch's labels | Dice to the truth |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[base], times, strict=True)]
        same = (labels[name] == labels[base]).float().mean().item()
        cells = [
            f"{sum(times):.1f}",
            f"{statistics.median(times):.2f} [{min(times):.2f}, {max(times):.2f}]",
            f"**{sum(seconds[base]) / sum(times):.2f}** [{min(ratios):.2f}, {max(ratios):.2f}]",
            f"{same:.3%}",
            f"{dice(labels[name], labels[base], classes):.5f}",
            "-" if truth is None else f"{dice(labels[name], truth, classes):.5f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def count_windows(shape: tuple[int, ...], roi: tuple[int, ...], overlap: float) -> int:
    """How often MONAI's inferer would call the network."""
    calls = 0

    def predict(window: Tensor) -> Tensor:
        nonlocal calls
        calls += len(window)
        return window

    with torch.no_grad():
        SlidingWindowInferer(roi, sw_batch_size=1, overlap=overlap)(torch.zeros(1, 1, *shape), predict)
    return calls


def windows(options: argparse.Namespace) -> None:
    """Windows on the whole scan and on the body's box, cut as the bundle's inference config cuts it, as Markdown."""
    rows = []
    for spacing in options.spacing:
        parser = ConfigParser()
        parser.read_config(str(Path(options.bundle) / "configs" / "inference.yaml"))
        parser["spacing"] = [float(side) for side in spacing.split(",")]
        roi = tuple(options.roi or parser.get_parsed_content("inferer").roi_size)
        steps = parser.get_parsed_content("preprocessing").transforms
        whole = Compose([step for step in steps if not isinstance(step, CropForegroundd)])
        for scan in options.scans:
            shape, inner = (
                tuple(int(n) for n in run({"image": scan})["image"].shape[1:])
                for run in (whole, Compose(steps))
            )
            for overlap in options.overlap:
                before, after = (count_windows(sides, roi, overlap) for sides in (shape, inner))
                grids = " | ".join(" x ".join(map(str, sides)) for sides in (shape, inner, roi))
                rows.append(
                    f"| {Path(scan).name} | {spacing} | {grids} | {overlap} | {before} | {after} | **{before / after:.2f}** |"
                )
    print(
        "| scan | spacing, mm | voxels | in the box | window | overlap | windows | in the box | times fewer |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("speed")
    part.add_argument("--bundle", help="its network, weights and preprocessing; a random SwinUNETR otherwise")
    part.add_argument("--scan", help="for the bundle's network")
    part.add_argument("--label", help="of the scan, with the bundle's values")
    part.add_argument(
        "--feature-size", type=int, default=48, help="of the random SwinUNETR; 48 is the published one"
    )
    part.add_argument(
        "--volume", type=int, nargs=3, default=(192, 192, 96), help="voxels; the middle of the scan"
    )
    part.add_argument("--roi", type=int, nargs=3, default=(96, 96, 96), help="of the random SwinUNETR")
    part.add_argument("--overlap", type=float, default=0.5)
    part.add_argument("--folder", type=Path, default=Path("build/inference"), help="where the export is kept")
    part.add_argument("--no-warm-up", action="store_true")
    part.set_defaults(run=speed)
    part = parts.add_parser("windows")
    part.add_argument("scans", nargs="+")
    part.add_argument("--spacing", nargs="+", default=["1.5,1.5,2.0"])
    part.add_argument("--bundle", default="bundles/alice_seg_flare")
    part.add_argument("--roi", type=int, nargs=3, help="other than the bundle's")
    part.add_argument("--overlap", type=float, nargs="+", default=[0.25, 0.5])
    part.set_defaults(run=windows)
    options = parser.parse_args()
    if options.run is speed and options.bundle and not options.scan:
        parser.error("--bundle needs --scan")
    warnings.filterwarnings("ignore")
    options.run(options)


if __name__ == "__main__":
    main()
