"""Release zips that run by themselves: a bundle's folder, with this package beside its configs where it needs it.

python -m custom.bundles.release package dist [URL]      URL: where the zips will lie, for models/model_info.json
python -m custom.bundles.release unpacked FOLDER         the bundles as their zips hold them
python -m custom.bundles.release show bundles/alice_pretrain/configs/train.yaml
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from monai.bundle import ConfigParser

from custom import __version__
from custom.bundles.copies import copies, needs_own_code
from custom.errors import AliceError
from custom.files import replacing

REPO = Path(__file__).resolve().parents[2]
MODEL_INFO = REPO / "models" / "model_info.json"
# relative to the repository's page, as the file cannot know where it is published
RELEASE_URL = f"releases/download/v{__version__}"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PARTS = ("LICENSE", "configs", "docs", "models", "scripts*")  # what runs leave in the folder stays at home
_WEIGHTS = {"model.pt", "model.safetensors"}
_MODELS = _WEIGHTS | {"model.json", "README.md"}  # not model_finetuned.pt, model.ts and their like


def package(target: Path, bundles: Path = REPO / "bundles") -> list[Path]:
    """Write ``<name>_v<version>.zip`` for every bundle, and ``SHA256SUMS``.

    Args:
        target: folder to write.
        bundles: folder of bundles.

    Returns:
        The zips.

    Raises:
        AliceError: if a bundle cannot be released, see :func:`zip_bundle`; nothing is written then.
    """
    built = {f"{release_name(b)}.zip": zip_bundle(b) for b in list_bundles(bundles)}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in built.items())
    for name, data in {**built, "SHA256SUMS": sums.encode()}.items():
        with replacing(target / name) as draft:
            draft.write_bytes(data)
    return [target / name for name in built]


def unpack(target: Path, bundles: Path = REPO / "bundles") -> list[Path]:
    """Write every bundle that has weights as its zip holds it, and return the folders.

    Args:
        target: folder to write; it must not hold a bundle yet, since old files would stay among the new ones.
        bundles: folder of bundles.

    Raises:
        AliceError: if a bundle cannot be released, or lies in ``target`` already.
    """
    sources = [bundle for bundle in list_bundles(bundles) if has_weights(bundle)]
    for folder in (target / bundle.name for bundle in sources):
        if folder.exists():
            raise AliceError(f"{folder}: is there already. Delete it, or name another folder.")
    for bundle in sources:
        zipfile.ZipFile(io.BytesIO(zip_bundle(bundle))).extractall(target)
    return [target / bundle.name for bundle in sources]


def list_bundles(bundles: Path) -> list[Path]:
    """The folders below ``bundles`` that hold a bundle, by name."""
    return sorted(p.parent.parent for p in bundles.glob("*/configs/metadata.json"))


def has_weights(bundle: Path) -> bool:
    """Whether the bundle's ``models`` holds weights to release."""
    return any((bundle / "models" / name).is_file() for name in _WEIGHTS)


def release_name(bundle: Path) -> str:
    """``<name>_v<version>`` of a bundle, the version as in its metadata.

    Raises:
        AliceError: if MONAI could not take name and version apart again.
    """
    file = bundle / "configs" / "metadata.json"
    version = json.loads(file.read_text(encoding="utf-8")).get("version")
    if not re.fullmatch(r"\d+\.\d+\.\d+", str(version)):
        raise AliceError(f"{file}: a release needs a version like 0.1.0, got {version!r}.")
    if "_v" in bundle.name:  # MONAI takes the first _v for the start of the version
        raise AliceError(f"{bundle}: a bundle's name must not hold '_v', rename the folder.")
    return f"{bundle.name}_v{version}"


def zip_bundle(bundle: Path, own_code: bool = True) -> bytes:
    """One bundle as a zip: the same files give the same bytes on every machine.

    Members are stored, not deflated, since compressors differ between machines and weights hardly shrink. JSON configs
    and ``model.pt`` are made here (see :func:`custom.bundles.copies.copies`); ``model.pt`` is as the installed torch
    writes it.

    Args:
        bundle: its folder; the zip holds one folder of that name.
        own_code: put this package beside the configs that need it; an installed copy does without.

    Returns:
        The zip.

    Raises:
        AliceError: if the bundle has no weights or two different ones, or a link leads out of it.
    """
    if not has_weights(bundle):
        raise AliceError(f"{bundle / 'models'}: no weights ({' or '.join(sorted(_WEIGHTS))}) to release.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(_members(bundle, own_code).items()):
            info = zipfile.ZipInfo(f"{bundle.name}/{name}", _EPOCH)
            info.create_system, info.external_attr = 3, 0o100644 << 16  # a plain file, also from Windows
            archive.writestr(info, content if isinstance(content, bytes) else content.read_bytes())
    return buffer.getvalue()


def _members(bundle: Path, own_code: bool = True) -> dict[str, Path | bytes]:
    """Name inside the bundle's folder -> file or content, of everything that is released."""
    members: dict[str, Path | bytes] = {}
    for part in [path for pattern in _PARTS for path in bundle.glob(pattern)]:
        for name, file in _files(part, bundle):
            if part.name != "models" or name.split("/")[1] in _MODELS:
                members[name] = file
    if own_code and needs_own_code(bundle):
        members |= _files(REPO / "custom", REPO)
    return members | copies(bundle)


def _files(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Files of a folder (or the file itself), named from ``root``; caches and hidden files are left out."""
    for file in [folder, *folder.rglob("*")]:
        name = file.relative_to(root)
        if any(p.startswith((".", "__pycache__")) or p.endswith((".tmp", "~")) for p in name.parts):
            continue
        if not file.resolve().is_relative_to(root.resolve()):
            raise AliceError(f"{file}: leads out of {root} to {file.resolve()}; put a copy there.")
        if file.is_file():
            yield name.as_posix(), file


def model_info(bundles: Path = REPO / "bundles", url: str = RELEASE_URL) -> dict[str, dict[str, str]]:
    """What MONAI reads from ``models/model_info.json`` to find versions: this release's zips, no older ones.

    Older versions would be looked for, and missed, in the release of the same tag.

    Args:
        bundles: folder of bundles; those without weights are passed over.
        url: where the zips lie.

    Returns:
        ``<name>_v<version>`` -> ``checksum`` (SHA-1 of the zip), ``source`` (its address).
    """
    return {
        release_name(bundle): {
            "checksum": hashlib.sha1(zip_bundle(bundle)).hexdigest(),
            "source": f"{url.rstrip('/')}/{release_name(bundle)}.zip",
        }
        for bundle in list_bundles(bundles)
        if has_weights(bundle)
    }


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
    """``package FOLDER [URL]``, ``unpacked FOLDER`` or ``show CONFIG``."""
    match arguments:
        case ["package", folder, *url] if len(url) < 2:
            for path in _or_exit(package, Path(folder)):
                print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
            MODEL_INFO.parent.mkdir(exist_ok=True)
            text = json.dumps(model_info(url=url[0] if url else RELEASE_URL), indent=1)
            MODEL_INFO.write_text(text + "\n", encoding="utf-8")
            print(MODEL_INFO)
        case ["unpacked", folder]:
            print(*_or_exit(unpack, Path(folder)), sep="\n")
        case ["show", config]:
            print(show(Path(config)))
        case _:
            sys.exit(__doc__)


def _or_exit(make: Callable[[Path], list[Path]], folder: Path) -> list[Path]:
    try:
        return make(folder)
    except AliceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
