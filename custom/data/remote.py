"""Stores at a URL: whole files, fetched once through fsspec into a local folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec

from custom.data.errors import StoreError
from custom.files import replacing

CACHE = ".cache/alice/stores"  # in the home folder, unless another is given


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one that fsspec must read (``s3://bucket/store``)."""
    return isinstance(path, str) and "://" in path


class RemoteFolder:
    """The files of a folder at a URL, each copied when it is first asked for.

    Copies are complete or absent, so that many processes may share the folder. fsspec's own ``simplecache`` writes
    into its final file, where another process would find half of it.

    Args:
        url: of the folder, of any protocol that fsspec knows.
        cache: local folder for the copies; one of the URL's own is made in it.
    """

    def __init__(self, url: str, cache: str | Path | None = None) -> None:
        self.url = url.rstrip("/")
        root = Path(cache) if cache is not None else Path.home() / CACHE
        self.folder = root / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def fetch(self, name: str, version: str = "", refresh: bool = False) -> Path:
        """The local copy of a file.

        Args:
            name: relative to the URL.
            version: of its content; another version is another copy.
            refresh: fetch it even if it is there.

        Raises:
            StoreError: if it is not there, or cannot be fetched.
        """
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
                "this protocol, give your credentials as it wants them, or copy the store."
            ) from error
        return local
