"""Encoders as folders of the Hugging Face hub: weights, config.json and a model card; read from a folder or by id."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from custom.errors import AliceError
from custom.files import read_json, write_text
from custom.transfer.encoder_weights import (
    WeightsError,
    build_encoder,
    load_encoder,
    read_content,
    save_encoder,
)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STOCK = {
    "MaskedViT": "UNETR",
    "MaskedSwin": "SwinUNETR",
    "SwinTransformer": "SwinUNETR",
    "NNFormer": "NNFormer (custom.encoders.nnformer)",
}


def save_folder(
    folder: str | Path,
    encoder: nn.Module,
    metadata: Mapping[str, Any],
    *,
    probe: Mapping[str, float] | None = None,
    half: bool = False,
) -> dict[str, Any]:
    """Write an encoder as a folder that the hub, and ``from_pretrained``, read.

    Args:
        folder: is made; files of an encoder in it are replaced.
        encoder: as for ``save_encoder``.
        metadata: as for ``save_encoder``; ``license`` and ``data`` go onto the card.
        probe: figures of the run's probe, by name.
        half: store float16.

    Returns:
        The metadata as written.

    Raises:
        WeightsError: if a file stands in the folder's place, or it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder}: is a file; name a folder for --format hf.")
    written = save_encoder(folder / WEIGHTS, encoder, dict(metadata), half)
    config = {"model_type": "alice-encoder", "architectures": [written["network_type"]], **written}
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n", error=WeightsError)
    write_text(folder / CARD, model_card(written, probe or {}), error=WeightsError)
    return written


def from_pretrained(
    id_or_folder: str | Path, network: nn.Module | None = None, *, revision: str | None = None, **options: Any
) -> nn.Module:
    """The encoder of a folder of ``alice export --format hf``, or of such a repository on the Hugging Face hub.

    Args:
        id_or_folder: a folder, or ``owner/name`` on the hub, which needs ``pip install 'alice-monai[hub]'``. A folder of that name
            goes first.
        network: a stock network whose encoder is filled, see ``load_encoder``; by default the encoder itself is built.
        revision: branch, tag or commit of the hub's repository.
        options: of ``load_encoder``.

    Returns:
        ``network``, or the encoder in evaluation mode, on the CPU.

    Raises:
        WeightsError: if there is no such folder or repository, the hub is out of reach, or the weights do not fit.
    """
    path = _weights_of(id_or_folder, revision)
    if network is None:
        metadata = read_content(path)[1] or _config_beside(path)
        network = build_encoder(metadata).eval()
        target = network.encoder if metadata["network_type"] == "NNFormer" else network
        load_encoder(network, path, **options)
        assert isinstance(target, nn.Module)
        return target
    load_encoder(network, path, **options)
    return network


def model_card(metadata: Mapping[str, Any], probe: Mapping[str, float]) -> str:
    """A model card: data, licence, how to load it, and the probe's figures if there are some."""
    license = metadata.get("license")
    head = ["---", f"license: {license}" if license else "license: other", "library_name: monai"]
    head += ["tags: [medical, ct, self-supervised, alice-monai]", "---", ""]
    rows = {
        "network": metadata["network_type"],
        "method": metadata.get("method", "not recorded"),
        "iterations": metadata.get("trained_iterations", "not recorded"),
        "data": metadata.get("data") or _data(metadata),
        "spacing, mm": metadata.get("spacing", "not recorded"),
        "window (stored values that become 0 and 1)": metadata.get("window_hu", "not recorded"),
        "orientation": metadata.get("orientation", "not recorded"),
        "crops, voxels": metadata.get("crop_size", "not recorded"),
        "licence": license or "not stated by whoever exported it: ask before you use or share the weights",
        "sha256 of the tensors": metadata["sha256"],
    }
    lines = [
        *head,
        f"# A {metadata['network_type']} encoder",
        "",
        "Self-supervised pre-training with Alice for MONAI.",
    ]
    lines[-1] = (
        "Converted from a published checkpoint by Alice for MONAI." if "converted" in metadata else lines[-1]
    )
    if "notice" in metadata:  # of those who published the method
        lines += ["", f"**Notice.** {metadata['notice']}"]
    lines += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    stock = _STOCK.get(metadata["network_type"], "the network it was trained in")
    lines += [f"It fills the encoder of {stock}, all tensors or an error:", "", "```python"]
    lines += [
        "from custom.transfer import from_pretrained",
        "",
        'encoder = from_pretrained("FOLDER or OWNER/NAME")',
        "```",
        "",
    ]
    if probe:
        lines += ["## Probe on held-back patients", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in sorted(probe.items())]
        lines += [
            "",
            "Small patient numbers: read these as signs that the encoder learns, not as a benchmark.",
            "",
        ]
    else:
        lines += ["No probe was run.", ""]
    lines += ["Not a medical device. For research only.", ""]
    return "\n".join(lines)


def _data(metadata: Mapping[str, Any]) -> str:
    if "converted" in metadata:
        return f"that of {metadata['converted']['file']}"
    scans = metadata.get("scans")
    return f"{scans} CT scans; their names stay with the run" if scans else "not recorded"


def _weights_of(id_or_folder: str | Path, revision: str | None) -> Path:
    folder = Path(id_or_folder)
    if folder.is_dir():
        if not (folder / WEIGHTS).is_file():
            raise WeightsError(
                f"{folder}: holds no {WEIGHTS}. Make it with: alice export RUN --to {folder} --format hf"
            )
        return folder / WEIGHTS
    if folder.is_file():
        raise WeightsError(f"{folder}: is a file; give it to load_encoder, or name the folder around it.")
    name = str(id_or_folder)
    if not _ID.fullmatch(name) or name.startswith("."):
        raise WeightsError(f"{name}: there is no such folder, and an id of the hub reads owner/name.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise WeightsError(
            f"{name}: there is no such folder here, and to ask the hub: pip install 'alice-monai[hub]'"
        ) from error
    try:
        hf_hub_download(name, CONFIG, revision=revision)  # beside the weights, in the same snapshot
        return Path(hf_hub_download(name, WEIGHTS, revision=revision))
    except AliceError:
        raise
    except Exception as error:  # of the hub or of the network: no such repository, no access, offline
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{name}: the hub gives no {WEIGHTS} ({why}). Offline, name a folder that holds one."
        ) from error


def _config_beside(path: Path) -> dict[str, Any]:
    """The metadata of weights that another program wrote anew, without ours inside."""
    config: dict[str, Any] = read_json(path.with_name(CONFIG), error=WeightsError, advice="Export it again.")
    return config
