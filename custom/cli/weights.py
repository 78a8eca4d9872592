"""Commands about weights: export and convert."""

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
    format: str | None = None,
    license: str | None = None,
    data: str | None = None,
    which: str | None = None,
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
        format: hf, with --to a folder: model.safetensors, config.json and a model card, as the Hugging Face hub has them.
        license: of the weights, for their record and the card.
        data: what they were trained on, in words, for their record and the card.
        which: student or teacher of a run; without it the one that the method exports (docs/methods.md).
    """
    from custom.bundles import deploy
    from custom.bundles import network as bundle_network

    folder = Path(run)
    _check_format(format, to)
    if to not in deploy.SUFFIXES:
        if bundle_network.is_bundle(folder):
            raise AliceError(f"{run}: is a bundle; export it with --to torchscript, onnx or openvino.")
        if o or weights or config or tolerance is not None:
            raise AliceError(
                f"-o, --weights, --config and --tolerance go with --to torchscript, onnx or openvino, not {to!r}."
            )
        told = {key: value for key, value in (("license", license), ("data", data)) if value is not None}
        _export_encoder(run, which, to, half, img_size, told, format == "hf")
        return
    if license or data:
        raise AliceError("--license and --data go with an encoder's weights, not with a whole network.")
    if img_size is not None:
        raise AliceError("--img_size goes with an encoder's weights (--to encoder.pt), which have positions.")
    if which is not None and bundle_network.is_bundle(folder):
        raise AliceError(
            "--which goes with a run, which has a student and a teacher; a bundle has one network."
        )
    if bundle_network.is_bundle(folder):
        overrides = [config] if isinstance(config, str) else list(config)
        network = bundle_network.read_bundle(folder, weights, overrides)
        models, stem = folder / "models", "model"
    elif weights or config:
        raise AliceError(
            f"{run}: is no bundle, and a run knows its network: leave --weights and --config out."
        )
    else:
        network, stem = _run_network(run, which), "encoder"
        models = folder.parent if folder.is_file() else folder
    path = Path(o) if o else models / f"{stem}{deploy.SUFFIXES[to]}"
    found = deploy.export_network(network, to, path, half=half, tolerance=tolerance)
    print(f"{path}: {found}; weights sha256 {network.metadata['sha256'][:16]}...")


def _check_format(format: str | None, to: str) -> None:
    from custom.bundles import deploy

    if format not in (None, "hf"):
        raise AliceError(
            f"--format {format}: is not known; hf writes a folder, without it --to names a file."
        )
    if format == "hf" and (to in deploy.SUFFIXES or Path(to).suffix in (".safetensors", ".pt")):
        raise AliceError(f"--to {to}: --format hf writes a folder; name one, such as --to my_encoder.")


def _export_encoder(
    run: str,
    which: str | None,
    to: str,
    half: bool,
    img_size: Sequence[int] | None,
    told: dict[str, Any],
    as_folder: bool,
) -> None:
    """An encoder's weights, ready for ``load_encoder``."""
    from custom.engine.run_log import read_log
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import resize_encoder, save_encoder
    from custom.transfer.hub import save_folder

    loaded = load_run(run, which)
    encoder, about = loaded.student.encoder.encoder, _shareable(loaded) | told
    if img_size is not None:
        encoder = resize_encoder(encoder, about["network"], img_size)
        about |= {"network": about["network"] | {"img_size": list(img_size)}}
    if as_folder:
        log = read_log(loaded.folder if loaded.folder.is_dir() else loaded.folder.parents[1])
        written = save_folder(to, encoder, about, probe=_probe_of(log, loaded.iteration), half=half)
    else:
        written = save_encoder(to, encoder, about, half)
    print(
        f"{to}: {written['network_type']} after {loaded.iteration} iterations, sha256 {written['sha256'][:16]}..."
    )


def _probe_of(log: Sequence[dict[str, Any]], iteration: int) -> dict[str, float]:
    """A run's first probe, and the newest one that is no younger than its checkpoint: figure and step -> value."""
    told = [
        {
            f"{k.removeprefix('probe/')}, step {line['step']}": float(v)
            for k, v in line.items()
            if k.startswith("probe/")
        }
        for line in log
        if line.get("step", iteration + 1) <= iteration
    ]
    told = [figures for figures in told if figures]
    return told[0] | told[-1] if told else {}


def convert(
    file: str,
    to: str = "encoder.safetensors",
    which: str = "",
    drop_class_token: bool = False,
    num_heads: int | None = None,
    trained_size: Sequence[int] | None = None,
    img_size: Sequence[int] | None = None,
    half: bool = False,
    spacing: Sequence[float] | None = None,
    window_hu: Sequence[float] | None = None,
    license: str | None = None,
    format: str | None = None,
) -> None:
    """Write the encoder of a published checkpoint as a file of ours: all of it, or the reason why not.

    Args:
        file: of torch.save or safetensors; docs/checkpoints.md lists the layouts that are known.
        to: a .safetensors, or a .pt with a .json beside it.
        which: student or teacher, or another key or prefix, if the file holds several encoders.
        drop_class_token: leave out the class token of a transformer trained with one; its features then differ.
        num_heads: of a plain transformer, whose tensors do not show it; by default one for 64 channels.
        trained_size: voxels of the crops that a plain transformer was trained on, "[96,96,96]"; by default a cube.
        img_size: crops of fine-tuning, to which a plain transformer's position table is interpolated.
        half: store float16.
        spacing: millimetres that the authors trained on, for the file's record.
        window_hu: stored values that were 0 and 1 in training, for the file's record.
        license: of the weights, for the file's record.
        format: hf, with --to a folder, as of alice export.
    """
    from custom.transfer.convert import convert as read
    from custom.transfer.encoder_weights import resize_encoder, save_encoder
    from custom.transfer.hub import save_folder

    _check_format(format, to)
    found = read(
        file, which=which, drop_class_token=drop_class_token, num_heads=num_heads, trained_size=trained_size
    )
    encoder, about = found.encoder, found.metadata
    if img_size is not None:
        encoder = resize_encoder(encoder, about["network"], img_size)
        about |= {"network": about["network"] | {"img_size": list(img_size)}}
    told = {"spacing": spacing, "window_hu": window_hu, "license": license}
    about |= {key: value for key, value in told.items() if value is not None}
    if format == "hf":
        written = save_folder(to, encoder, about, half=half)
    else:
        written = save_encoder(to, encoder, about, half)
    print(found.report)
    for note in found.assumed:
        print(f"assumed: {note}")
    print(f"{to}: {written['network_type']}, sha256 {written['sha256'][:16]}...")


def _run_network(run: str, which: str | None) -> Deployable:
    """The encoder of a run as a network of its own."""
    from custom.bundles.network import Deployable
    from custom.encoders.features import FeatureMap
    from custom.methods.run_folder import load_run
    from custom.transfer.encoder_weights import sha256_of

    loaded = load_run(run, which)
    encoder = loaded.student.encoder.encoder
    channels = loaded.summary["network"].get("in_channels", 1)
    about = _shareable(loaded) | {"sha256": sha256_of(encoder.state_dict())}
    return Deployable(FeatureMap(encoder).eval(), (channels, *loaded.summary["crop_size"]), about)


def _shareable(loaded: Run) -> dict[str, Any]:
    """A run's summary without the names of scans and folders, which stay with the run."""
    private = ("held_back", "store_dir")
    kept = {key: value for key, value in loaded.summary.items() if key not in private}
    return kept | {"trained_iterations": loaded.iteration}
