"""A folder of embeddings from one network: opened by name, refused when stale."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom.data.layouts import is_passed_over
from custom.data.store.volume_store import VolumeStore
from custom.files import is_plain_name, read_json, write_text
from custom.landmarks.embeddings.file import FORMAT, EmbeddingError
from custom.landmarks.embeddings.stored import StoredEmbedding

SUFFIX = ".sam"
INDEX = "embeddings.json"


class EmbeddingFolder:
    """A folder of embeddings made by one network.

    A process compares the checksum of a file when it opens it for the first time. Can be pickled: each
    process opens files for itself when they are needed, and keeps the last ones open.

    Args:
        path: folder that ``embed_store`` or ``embed_folder`` wrote.
        max_open: number of files to keep open.

    Raises:
        EmbeddingError: if the folder has no embeddings, or embeddings of another format.

    Attributes:
        weights_sha256: of the network that made them all.
        threshold: the calibrated score that a match needs; None if it was not calibrated.
        profile: of the intensities that they were made from.
    """

    def __init__(self, path: str | Path, *, max_open: int = 64) -> None:
        self.path, self.max_open = Path(path), max_open
        index = read_folder_index(self.path)
        self.weights_sha256: str = index["weights_sha256"]
        self.threshold: float | None = index.get("threshold")
        self.profile: str = index["profile"]
        self._whole: set[str] = set()
        self._open = functools.lru_cache(maxsize=max_open)(self._open_checked)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], max_open=state["max_open"])  # type: ignore[misc]

    def __getitem__(self, name: str) -> StoredEmbedding:
        return self._open(name)

    @property
    def names(self) -> list[str]:
        """All scans in the folder, sorted."""
        found = [p.name.removesuffix(SUFFIX) for p in self.path.glob(f"*{SUFFIX}")]
        return sorted(name for name in found if not is_passed_over(name))

    def require(self, store: VolumeStore, names: Sequence[str] | None = None) -> None:
        """Refuse embeddings that are missing or were made from other scans.

        Raises:
            EmbeddingError: naming the first such scans and the way out.
        """
        if self.profile != store.profile:
            raise EmbeddingError(
                f"{self.path}: made from intensities of profile {self.profile!r}, {store.path} holds {store.profile!r}. "
                f"Embed the store's scans: alice embed {store.path} EMBEDDINGS"
            )
        wrong, stale = [], False
        for name in names if names is not None else store.names:
            if not embedding_path(self.path, name).is_file():
                wrong.append(f"{name} (missing)")
            elif self._open_file(name).header.source_sha256 != store.records[name].voxels_sha256:
                wrong.append(f"{name} (made from other voxels)")
                stale = True
        if wrong:
            way_out = f"Embed the rest: alice embed {store.path} {self.path}"
            if stale:
                way_out = f"Embed them again: alice embed {store.path} {self.path} --overwrite"
            if len(wrong) == len(names if names is not None else store.names):
                way_out = f"If these are of another store, give its folder, or a new one: alice embed {store.path} EMBEDDINGS"
            raise EmbeddingError(
                f"{self.path}: {len(wrong)} of {len(store)} scans of {store.path} have no embedding that fits: "
                f"{', '.join(wrong[:3])}. {way_out}"
            )

    def keep_threshold(self, threshold: float) -> None:
        """Store the calibrated score of the weights with the embeddings."""
        content = {**read_folder_index(self.path), "threshold": threshold}
        write_text(self.path / INDEX, json.dumps(content, indent=1))
        self.threshold = threshold

    def _open_checked(self, name: str) -> StoredEmbedding:
        stored = self._open_file(name)
        if name not in self._whole:
            stored.check()
            self._whole.add(name)
        return stored

    def _open_file(self, name: str) -> StoredEmbedding:
        stored = StoredEmbedding(embedding_path(self.path, name))
        if stored.header.weights_sha256 != self.weights_sha256:
            raise EmbeddingError(
                f"{stored.path}: made with weights {stored.header.weights_sha256[:12]}, but the folder's are "
                f"{self.weights_sha256[:12]}, and these do not compare. Delete the file and embed again."
            )
        return stored


def embedding_path(folder: Path, name: str) -> Path:
    """The file of a scan's embeddings.

    Raises:
        EmbeddingError: if the scan's name would lead out of the folder.
    """
    if not is_plain_name(name):
        raise EmbeddingError(
            f"{folder}: a scan is called {name!r}, which cannot name a file there. Rename it."
        )
    return folder / f"{name}{SUFFIX}"


def read_folder_index(folder: Path) -> dict[str, Any]:
    """The index of the folder, checked for its format."""
    path = folder / INDEX
    if not path.is_file():
        raise EmbeddingError(
            f"{folder}: no embeddings here ({INDEX} is missing). Make them: alice embed STORE {folder}"
        )
    index = read_json(path, error=EmbeddingError, advice="Delete the folder and embed again.")
    if not isinstance(index, dict):
        raise EmbeddingError(f"{path}: holds no index. Delete the folder and embed again.")
    if index.get("format") != FORMAT or "profile" not in index:
        raise EmbeddingError(
            f"{path}: format {index.get('format')!r}, profile {index.get('profile')!r}; this version reads {FORMAT!r} "
            "with a profile. Embed again, with overwrite: "
            f"alice embed STORE {folder} --overwrite"
        )
    return index
