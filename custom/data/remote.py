"""Files at a URL: each is fetched once, whole, through fsspec into a local folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec

from custom.data.errors import StoreError
from custom.files import is_plain_name, replacing, stays_inside

CACHE = ".cache/alice/stores"  # in the home folder; the default place for copies


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL that fsspec must read, such as ``s3://bucket/store``."""
    return isinstance(path, str) and "://" in path


class RemoteFolder:
    """The files of a folder at a URL. Each is copied when it is first needed.

    A copy is complete or absent, so many processes can share the folder. fsspec's own ``simplecache`` writes into the
    final file, where another process could find half of it.

    Args:
        url: of the folder, with any protocol that fsspec knows.
        cache: local folder for copies; each URL gets a folder of its own in it.
    """

    def __init__(self, url: str, cache: str | Path | None = None) -> None:
        self.url = url.rstrip("/")
        root = Path(cache) if cache is not None else Path.home() / CACHE
        self.folder = root / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def fetch(self, name: str, version: str = "", refresh: bool = False) -> Path:
        """The local copy of a file.

        Args:
            name: of the file, relative to the URL.
            version: of its content; every version has its own copy.
            refresh: fetch it even if there is a copy.

        Raises:
            StoreError: if the file does not exist, cannot be fetched, or its copy would lie outside of the folder.
        """
        if not stays_inside(name) or not is_plain_name(version[:16] or "none"):
            raise StoreError(
                f"{self.url}: names a file {name!r} of version {version[:16]!r}, which leads out of the folder for "
                "copies. Nothing was fetched; ask whoever made it for another copy."
            )
        local = self.folder / (f"{version[:16]}/{name}" if version else name)
        if local.is_file() and not refresh:
            return local
        try:
            with replacing(local, error=None) as draft:
                system, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
                system.get_file(path, str(draft))
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}/{name}: missing.") from error
        except (OSError, ValueError, ImportError) as error:
            what = f"{type(error).__name__}: {error}"
            raise StoreError(
                f"{self.url}/{name}: cannot be fetched into {self.folder} ({what}). Install fsspec's package for "
                "this protocol, set up your credentials for it, or copy the store."
            ) from error
        return local
