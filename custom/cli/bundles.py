"""The command about bundles: which there are, and a copy of one."""

from __future__ import annotations

import json
from pathlib import Path

from custom.errors import AliceError


def bundle(action: str, name: str | None = None, folder: str = ".") -> None:
    """List the bundles that are installed, or write one with its weights into a folder: alice bundle list | get NAME DIR.

    Args:
        action: list or get.
        name: of the bundle to get.
        folder: where NAME is made.
    """
    from custom.bundles.release import list_bundles
    from custom.bundles.shipped import bundles_folder, get_bundle

    if action not in ("list", "get"):
        raise AliceError(f"bundle {action}: is not known; alice bundle list, or alice bundle get NAME DIR.")
    if action == "get":
        if name is None:
            raise AliceError("bundle get: name a bundle; alice bundle list shows them.")
        made = get_bundle(name, folder)
        print(
            f"{made}: python -m monai.bundle run --config_file {made}/configs/train.yaml --bundle_root {made} ..."
        )
        return
    if name is not None:
        raise AliceError(f"bundle list: takes no {name!r}; to copy it: alice bundle get {name} DIR.")
    for found in list_bundles(bundles_folder()):
        about = json.loads((found / "configs" / "metadata.json").read_text(encoding="utf-8"))
        weights = next(
            (p for p in sorted((found / "models").glob("model.*")) if p.suffix in (".pt", ".safetensors")),
            None,
        )
        size = f"{weights.stat().st_size / 2**20:.1f} MiB of weights" if weights else "no weights"
        print(f"{found.name:<17} {about['version']}  {size:<21} {about.get('task', '')}")
    print(f"in {Path(bundles_folder())}")
