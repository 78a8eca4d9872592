"""Release zips that run by themselves: a bundle's folder, with this package beside its configs where it needs it.

python -m custom.release package dist
python -m custom.release show bundles/alice_pretrain/configs/train.yaml
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from monai.bundle import ConfigParser

REPO = Path(__file__).resolve().parents[1]
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same zip on every machine
_LEFT_OUT = {"__pycache__", ".DS_Store"}
_PARTS = (
    "LICENSE",
    "large_files.yml",
    "configs",
    "docs",
    "models",
)  # what runs leave in the folder stays at home


def package(target: Path, bundles: Path = REPO / "bundles") -> list[Path]:
    """Write ``<name>_v<version>.zip`` for every bundle, and ``SHA256SUMS``.

    Args:
        target: folder to write.
        bundles: folder of bundles.

    Returns:
        The zips.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for bundle in sorted(p.parent.parent for p in bundles.glob("*/configs/metadata.json")):
        version = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
        path = target / f"{bundle.name}_v{version}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, file in sorted(_members(bundle)):
                info = zipfile.ZipInfo(f"{bundle.name}/{name}", _EPOCH)
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(info, file.read_bytes(), compresslevel=9)
        written.append(path)
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in written)
    (target / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return written


def _members(bundle: Path) -> Iterator[tuple[str, Path]]:
    for part in _PARTS:
        for file in [bundle / part, *(bundle / part).rglob("*")]:
            if file.is_file() and not _LEFT_OUT & set(file.parts):
                yield file.relative_to(bundle).as_posix(), file
    configs = "".join(p.read_text(encoding="utf-8") for p in (bundle / "configs").glob("*.yaml"))
    if "_target_: custom." in configs:
        for file in (REPO / "custom").rglob("*"):
            if file.is_file() and not _LEFT_OUT & set(file.parts):
                yield f"custom/{file.relative_to(REPO / 'custom').as_posix()}", file


def show(config: Path) -> str:
    """A config as MONAI reads it, one flat line a value, nothing instantiated."""
    lines: list[str] = []

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}::{key}" if path else str(key))
        elif isinstance(node, list) and node and not all(isinstance(v, (int, float)) for v in node):
            for i, value in enumerate(node):
                walk(value, f"{path}::{i}")
        else:
            lines.append(f"{path}: {node}")

    walk(ConfigParser(ConfigParser.load_config_file(config)).get(), "")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """``package FOLDER`` or ``show CONFIG``."""
    if len(arguments) == 2 and arguments[0] == "package":
        for path in package(Path(arguments[1])):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    elif len(arguments) == 2 and arguments[0] == "show":
        print(show(Path(arguments[1])))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
