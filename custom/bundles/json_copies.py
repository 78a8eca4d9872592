"""JSON copies of configs, for ``monai.bundle.load``, which reads no YAML: python -m custom.bundles.json_copies [BUNDLE ...]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from monai.bundle import ConfigParser

from custom.files import write_text

REPO = Path(__file__).resolve().parents[2]
COPIED = ("train", "inference")


def write_copies(bundle: Path) -> list[Path]:
    """Write ``configs/<name>.json`` beside ``configs/<name>.yaml``; MONAI and MONAI Label take the JSON first.

    Args:
        bundle: a segmentation bundle.

    Returns:
        The files.

    Raises:
        FileNotFoundError: if the bundle has no such YAML.
    """
    written = []
    for name in COPIED:
        content = ConfigParser.load_config_file(bundle / "configs" / f"{name}.yaml")
        path = bundle / "configs" / f"{name}.json"
        write_text(path, json.dumps(content, indent=1) + "\n")
        written.append(path)
    return written


if __name__ == "__main__":
    for folder in [Path(a) for a in sys.argv[1:]] or sorted((REPO / "bundles").glob("alice_seg_*")):
        for copy in write_copies(folder):
            print(copy)
