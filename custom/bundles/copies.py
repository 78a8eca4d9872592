"""Second forms of a bundle's files, for programs that read one form only: python -m custom.bundles.copies [BUNDLE ...]

git holds ``configs/*.yaml`` and ``models/model.safetensors``. ``monai.bundle.load`` reads JSON and ``model.pt``, and MONAI
Label reads ``model.pt``. Releases hold both forms; ``make bundles`` writes the second one into a checkout.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from safetensors.torch import load_file

from custom.errors import AliceError
from custom.files import read_torch, replacing

REPO = Path(__file__).resolve().parents[2]
_CONFIGS = ("train", "inference")
_OWN_CODE = re.compile(r"(?<![\w.])custom\.\w")


def copies(bundle: Path) -> dict[str, bytes]:
    """Make the second forms of a bundle's files.

    A bundle that needs this package gets the weights alone, since the programs that read JSON cannot run it.

    Args:
        bundle: its folder.

    Returns:
        Name inside the bundle -> content: ``configs/train.json``, ``configs/inference.json``, ``models/model.pt``.

    Raises:
        AliceError: if ``model.pt`` lies there and holds other weights than ``model.safetensors``.
    """
    made = {}
    for name in () if needs_own_code(bundle) else _CONFIGS:
        if (path := bundle / "configs" / f"{name}.yaml").is_file():
            content = json.dumps(ConfigParser.load_config_file(path), indent=1)
            made[f"configs/{name}.json"] = f"{content}\n".encode()
    if (path := bundle / "models" / "model.safetensors").is_file():
        made["models/model.pt"] = _as_pt(path)
    return made


def _as_pt(path: Path) -> bytes:
    """A file of ``torch.save`` with the same tensors."""
    state = load_file(path)
    beside = path.with_suffix(".pt")
    if beside.is_file():
        other = read_torch(beside)
        if other.keys() != state.keys() or not all(torch.equal(other[k], state[k]) for k in state):
            raise AliceError(
                f"{beside}: holds other weights than {path.name} beside it. Move one of them away."
            )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_copies(bundle: Path) -> list[Path]:
    """Write the second forms beside the first ones.

    MONAI and MONAI Label take a JSON before a YAML. So write them again after editing a YAML.

    Returns:
        The files.
    """
    made = copies(bundle)
    for name, content in made.items():
        with replacing(bundle / name) as draft:
            draft.write_bytes(content)
    return [bundle / name for name in made]


def needs_own_code(bundle: Path) -> bool:
    """Whether training or inference needs this package. Other configs on top of them may need it all the same."""
    files = [p for name in _CONFIGS for p in (bundle / "configs").glob(f"{name}.*")]
    return any(_OWN_CODE.search(text) for file in files for text in _strings(file))


def _strings(config: Path) -> Iterator[str]:
    """Every text in a config, comments apart."""
    stack: list[object] = [ConfigParser.load_config_file(config)]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def main(arguments: list[str]) -> None:
    """Write the copies of the bundles named, or of all bundles of this checkout."""
    folders = [Path(a) for a in arguments] or sorted((REPO / "bundles").iterdir())
    try:
        for path in [path for folder in folders for path in write_copies(folder)]:
            print(path)
    except AliceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
