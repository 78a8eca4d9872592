"""Embed many scans, one file each: a file that still fits is kept, a stale one is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from custom.data.grid.profiles import require_ct
from custom.data.scans import Scan, list_scans
from custom.data.store.volume_store import VolumeStore
from custom.errors import shown
from custom.files import sha256_of_file, write_text
from custom.landmarks.embeddings.file import FORMAT, EmbeddingError, Saved, save_embedding
from custom.landmarks.embeddings.folder import INDEX, embedding_path, read_folder_index
from custom.landmarks.embeddings.packing import bits_for
from custom.landmarks.embeddings.stored import StoredEmbedding
from custom.landmarks.sam.network import SAM, embed_scan
from custom.landmarks.sam.scan_grid import read_scan
from custom.processes import locked

logger = logging.getLogger(__name__)


def embed_store(
    model: SAM,
    weights_sha256: str,
    store: VolumeStore,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    threshold: float | None = None,
    fine_bits: int | None = None,
    slab: int = 32,
    overwrite: bool = False,
    progress: bool = True,
    allow_profile: bool = False,
) -> list[Saved]:
    """Embed every volume of a store as ``<out>/<name>.sam``. Files that are there and fit are kept.

    Args:
        model: in evaluation mode.
        weights_sha256: checksum of the weights.
        store: volumes in HU.
        out: folder to write; made if missing.
        names: volumes to embed; None for all.
        threshold: the calibrated score of the weights, stored with the embeddings unless the folder has its
            own.
        fine_bits: see :func:`save_embedding`; None keeps files of other bits.
        slab: see :func:`custom.landmarks.sam.network.embed_scan`.
        overwrite: replace files that were made with other weights or from other voxels.
        progress: show a bar.
        allow_profile: embed a store of another profile than ct, although SAM was not trained on it.

    Returns:
        The files written by this call.

    Raises:
        ProfileError: for a store of another profile, unless allowed.
        EmbeddingError: if the folder holds embeddings made with other weights, or of a scan that has changed,
            and ``overwrite`` is False; or if another process embeds into it.
    """
    require_ct(store.profile, store.path, "SAM", allow_profile)
    chosen = list(names) if names is not None else store.names
    sources = {name: store.records[name].voxels_sha256 for name in chosen}

    def read(name: str) -> tuple[Any, NDArray[np.float64]]:
        return store.read_crop(name, (0, 0, 0), store.shape(name)), store.affine(name)

    with _alone_in(out):
        return _embed_all(
            model,
            weights_sha256,
            sources,
            read,
            Path(out),
            threshold,
            fine_bits,
            slab,
            overwrite,
            progress,
            store.profile,
        )


def embed_folder(
    model: SAM,
    weights_sha256: str,
    source: str | Path | Sequence[Scan],
    out: str | Path,
    *,
    threshold: float | None = None,
    fine_bits: int | None = None,
    slab: int = 32,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Saved]:
    """As :func:`embed_store`, for a folder of NIfTI files, a datalist or a list of scans."""
    scans = list_scans(source) if isinstance(source, str | Path) else list(source)
    images = {scan.name: scan.image for scan in scans}
    sources = {name: sha256_of_file(image) for name, image in images.items()}

    def read(name: str) -> tuple[Any, NDArray[np.float64]]:
        volume, affine = read_scan(images[name])
        return volume.numpy(), affine

    with _alone_in(out):
        return _embed_all(
            model, weights_sha256, sources, read, Path(out), threshold, fine_bits, slab, overwrite, progress
        )


def _alone_in(out: str | Path) -> AbstractContextManager[None]:
    """Keep other processes from embedding into the folder."""
    return locked(Path(out) / "embed.lock", "alice embed", error=EmbeddingError)


def _embed_all(
    model: SAM,
    weights_sha256: str,
    sources: dict[str, str],
    read: Callable[[str], tuple[Any, NDArray[np.float64]]],
    out: Path,
    threshold: float | None,
    fine_bits: int | None,
    slab: int,
    overwrite: bool,
    progress: bool,
    profile: str = "ct",
) -> list[Saved]:
    bits_for(0, fine_bits)  # before anything is written
    made = _index_to_keep(out, overwrite)
    if made is not None:
        if made["weights_sha256"] != weights_sha256 and not overwrite:
            raise EmbeddingError(
                f"{out}: made with weights {made['weights_sha256'][:12]}, but {weights_sha256[:12]} are given, and "
                "their embeddings do not compare. Choose another folder, or --overwrite."
            )
        if made["profile"] != profile and not overwrite:
            raise EmbeddingError(
                f"{out}: made from intensities of profile {made['profile']!r}, but {profile!r} are given. "
                "Choose another folder."
            )
        if made["weights_sha256"] == weights_sha256 and made.get("threshold") is not None:
            threshold = made["threshold"]  # of these weights, maybe calibrated since they were saved
    todo = [
        name
        for name in sources
        if _needs_embedding(out, name, weights_sha256, sources[name], fine_bits, overwrite)
    ]
    index = {
        "format": FORMAT,
        "weights_sha256": weights_sha256,
        "threshold": threshold,
        "profile": profile,
        "network": model.settings,
    }
    write_text(out / INDEX, json.dumps(index, indent=1))

    written = []
    for name in tqdm(todo, desc="embed", disable=not progress or not todo):
        volume, affine = read(name)
        embedding = embed_scan(model, (volume, affine), slab=slab)
        if embedding.body is None:
            logger.warning(
                "%s: no body found (nothing above -500 HU); all of the scan is embedded.", shown(name)
            )
        saved = save_embedding(
            embedding_path(out, name),
            embedding,
            weights_sha256,
            sources[name],
            name=name,
            body=embedding.body,
            fine_bits=fine_bits,
        )
        logger.info(
            "%s: %.1f MiB, cosine to float32 %.5f on average, %.5f at worst",
            saved.path,
            saved.num_bytes / 2**20,
            saved.mean_cosine,
            saved.lowest_cosine,
        )
        written.append(saved)
    return written


def _index_to_keep(out: Path, overwrite: bool) -> dict[str, Any] | None:
    """A folder's index; None for a new folder, or for an unreadable index that may be overwritten."""
    try:
        return read_folder_index(out) if (out / INDEX).is_file() else None
    except EmbeddingError:
        if overwrite:
            return None
        raise


def _needs_embedding(
    out: Path, name: str, weights: str, source: str, fine_bits: int | None, overwrite: bool
) -> bool:
    path = embedding_path(out, name)
    if not path.is_file():
        return True
    try:
        header = StoredEmbedding(path).header
    except EmbeddingError:
        if overwrite:
            return True
        raise
    if header.weights_sha256 == weights and header.source_sha256 == source:
        return fine_bits not in (None, header.fine_bits)
    if overwrite:
        return True
    what = "with other weights" if header.weights_sha256 != weights else "from a scan that has changed since"
    raise EmbeddingError(f"{path}: made {what}. Delete it, choose another folder, or --overwrite.")
