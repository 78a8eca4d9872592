"""Commands about weights: export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom.errors import AliceError

if TYPE_CHECKING:
    from custom.bundles.network import Deployable
    from custom.methods.run_folder import Run


def export(
    run: str,
    to: str = "encoder.safetensors",
    half: bool = False,
    o: str | None = None,
    weights: str | None = None,
    config: Sequence[str] = (),
    tolerance: float | None = None,
    img_size: Sequence[int] | None = None,
) -> None:
    """Write a run's encoder for stock MONAI networks, or a bundle's network as TorchScript, ONNX or OpenVINO.

    Args:
        run: a run's output_dir, or one of its checkpoints; or a bundle's folder.
        to: a .safetensors (with metadata inside) or .pt file (with a .json beside it) for the encoder of a run;
            torchscript, onnx or openvino for a whole network: a bundle's, or a run's encoder as a map of features.
        half: store float16 (encoder, openvino), for a file of half the size.
        o: the file for torchscript (.ts), onnx (.onnx), openvino (.xml); by default in the bundle's models/.
        weights: other than the bundle's models/model.pt.
        config: files on top of the bundle's inference config, as swin_unetr.yaml.
        tolerance: largest difference to the original network, over its largest output; 1e-3, or 1e-2 with half.
        img_size: of the encoder: crops of fine-tuning, "[96,96,96]"; its position table is interpolated to them, as
            ``pretrained`` of the segmentation bundles needs it.
    """
    from custom.bundles import deploy
    from custom.bundles import network as bundle_network

    folder = Path(run)
    if to not in deploy.SUFFIXES:
        if bundle_network.is_bundle(folder):
            raise AliceError(f"{run}: is a bundle; export it with --to torchscript, onnx or openvino.")
        if o or weights or config or tolerance is not None:
            raise AliceError(
                f"-o, --weights, --config and --tolerance go with --to torchscript, onnx or openvino, not {to!r}."
            )
        _export_encoder(run, to, half, img_size)
        return
    if img_size is not None:
        raise AliceError("--img_size goes with an encoder's weights (--to encoder.pt), which have positions.")
    if bundle_network.is_bundle(folder):
        overrides = [config] if isinstance(config, str) else list(config)
        network = bundle_network.read_bundle(folder, weights, overrides)
        models, stem = folder / "models", "model"
    elif weights or config:
        raise AliceError(
            f"{run}: is no bundle, and a run knows its network: leave --weights and --config out."
        )
    else:
        network, models, stem = _run_network(run), folder.parent if folder.is_file() else folder, "encoder"
    path = Path(o) if o else models / f"{stem}{deploy.SUFFIXES[to]}"
    found = deploy.export_network(network, to, path, half=half, tolerance=tolerance)
    print(f"{path}: {found}; weights sha256 {network.metadata['sha256'][:16]}...")


def _export_encoder(run: str, to: str, half: bool, img_size: Sequence[int] | None) -> None:
    """The online encoder's weights, ready for ``load_encoder``."""
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import resize_encoder, save_encoder

    loaded = load_run(run)
    encoder, about = loaded.student.encoder.encoder, _shareable(loaded)
    if img_size is not None:
        encoder = resize_encoder(encoder, about["network"], img_size)
        about |= {"network": about["network"] | {"img_size": list(img_size)}}
    written = save_encoder(to, encoder, about, half)
    print(
        f"{to}: {written['network_type']} after {loaded.iteration} iterations, sha256 {written['sha256'][:16]}..."
    )


def _run_network(run: str) -> Deployable:
    """The online encoder of a run as a network of its own."""
    from custom.bundles.network import Deployable
    from custom.encoders.features import FeatureMap
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import sha256_of

    loaded = load_run(run)
    encoder = loaded.student.encoder.encoder
    channels = loaded.summary["network"].get("in_channels", 1)
    about = _shareable(loaded) | {"sha256": sha256_of(encoder.state_dict())}
    return Deployable(FeatureMap(encoder).eval(), (channels, *loaded.summary["crop_size"]), about)


def _shareable(loaded: Run) -> dict[str, Any]:
    """A run's summary without the names of scans and folders, which stay with the run."""
    private = ("held_back", "store_dir")
    kept = {key: value for key, value in loaded.summary.items() if key not in private}
    return kept | {"trained_iterations": loaded.iteration}
