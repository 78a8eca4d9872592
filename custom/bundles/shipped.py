"""The bundles that come with this package: in a checkout, or installed from a wheel."""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import os
import shutil
import zipfile
from pathlib import Path

from custom.bundles.release import REPO, list_bundles, zip_bundle
from custom.errors import AliceError


def bundles_folder() -> Path:
    """The folder of the bundles.

    Raises:
        AliceError: if this copy of the package came without bundles, as the one inside a release's zip.
    """
    places = [REPO / "bundles"]
    with contextlib.suppress(ModuleNotFoundError):
        places.append(Path(str(importlib.resources.files("alice_monai") / "bundles")))
    for place in places:
        if list_bundles(place):
            return place
    raise AliceError(
        f"No bundles lie in {' or '.join(map(str, places))}. Install alice-monai, or download a release (docs/releases.md)."
    )


def get_bundle(name: str, folder: str | Path) -> Path:
    """Write a bundle with its weights into a folder, ready to run with this package installed.

    Args:
        name: of the bundle.
        folder: is made; the bundle becomes ``folder/name``.

    Returns:
        ``folder/name``.

    Raises:
        AliceError: if there is no such bundle, or ``folder/name`` is there already; nothing is written then.
    """
    known = {bundle.name: bundle for bundle in list_bundles(bundles_folder())}
    if name not in known:
        raise AliceError(f"{name}: there is no such bundle; known: {', '.join(known)}.")
    target = Path(folder) / name
    if target.exists():
        raise AliceError(f"{target}: is there already. Delete it, or name another folder.")
    draft = target.with_name(f"{name}.{os.getpid()}.tmp")
    try:
        zipfile.ZipFile(io.BytesIO(zip_bundle(known[name], own_code=False))).extractall(draft)
        os.replace(draft / name, target)
    except OSError as error:
        raise AliceError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def shipped_sam() -> str:
    """The weights of SAM in the bundle ``sam_landmarks``."""
    return str(bundles_folder() / "sam_landmarks" / "models" / "model.safetensors")
