"""What the data of a run take: bytes of the store and the embeddings, and seconds to read a pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from custom.data.intake.scan_folder import Manifest
from custom.data.remote import is_url
from custom.data.scans import Scan, list_scans
from custom.errors import AliceError
from custom.landmarks.embeddings.packing import bits_for
from custom.landmarks.sam.network import EMBEDDING_DIM

_CELL_MM3 = 64.0  # a fine cell of an embedding: 2 voxels of 2 mm a side
_BODY_SHARE = 0.5  # of a scan, about (ours)
# CPU seconds a voxel of reading and windowing a crop, one Zen 4 core (benchmarks/data_loading.py)
READ_SECONDS = 4.5e-9


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def scans_of(source: str | Path) -> list[Scan]:
    """The scans of a manifest (or its URL), folder or datalist, with what a manifest knows of their grids.

    Nothing is decoded, or fetched but the manifest.
    """
    if is_url(str(source)):
        return Manifest.load(str(source)).scans(fetch=False)
    source = Path(source)
    if not source.is_file() or not is_manifest(source):
        return list_scans(source)
    return Manifest.load(source).scans(fetch=False)


def is_manifest(path: Path) -> bool:
    """Whether a file is one that ``alice scan`` wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return '"alice-manifest' in file.read(4096)


class MadeUpPairs(Dataset):
    """One pair of noise in the shape of real ones, again and again: for a dry step where no store is built yet."""

    def __init__(self, crop_size: Sequence[int]) -> None:
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise AliceError(f"crop_size must be three positive numbers of voxels, got {list(crop_size)}.")
        crops = torch.rand(2, 1, *crop_size, generator=torch.Generator().manual_seed(0))
        point = torch.zeros(3, dtype=torch.float64)
        self.pair = {"crop_q": crops[0], "crop_k": crops[1], "point_q": point, "point_k": point, "score": 1.0}
        self.pair |= {"redraws": 0, "rejected": 0, "fallback": False}
        self.pair |= {"scan_q": "q", "scan_k": "k", "patient_q": "q", "patient_k": "k"}

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As ``PairDataset`` gives them; masks and views differ from pair to pair."""
        return self.pair | {"seed": index}


def seconds_a_pair(dataset: Dataset, collate: Callable | None, batch: int, at_least: float = 2.0) -> float:
    """CPU seconds of this process to make one pair ready, masks and plans included; the median of batches.

    Args:
        dataset: of pairs.
        collate: what the loader's workers do to a batch.
        batch: pairs in it.
        at_least: seconds to spend; at least two batches after one of warm-up.
    """
    times: list[float] = []
    began = time.perf_counter()
    for number in range(1000):
        started = time.process_time()
        pairs = [dataset[number * batch + i] for i in range(batch)]
        if collate is not None:
            collate(pairs)
        times.append((time.process_time() - started) / batch)
        if number >= 2 and time.perf_counter() - began > at_least:
            break
    return float(np.median(times[1:]))


def held_by_bodies(names: int, voxels: float, most: int = 64) -> float:
    """Bytes of the body voxels that a worker keeps: three int64 for each cell of 8 voxels a side (store.py)."""
    return min(names, most) * voxels * 0.4 / 8**3 * 24


def embedding_bytes(volume_mm3: float) -> float:
    """Of one scan's embedding by the authors' network (128 channels); ours has 32, and takes two fifths."""
    cells = _BODY_SHARE * volume_mm3 / _CELL_MM3
    # fine cells, means of eight of them, and 7 bytes a cell for blocks, norms and scales
    return cells * (EMBEDDING_DIM * (bits_for(EMBEDDING_DIM) / 8 + 1 / 8) + 7)
