"""A random crop from the store against decoding the whole file, and what the store costs on disk.

    OMP_NUM_THREADS=1 python benchmarks/data_loading.py --data SCANS --repeats 9 --json loading.json

Ways: ``store`` is VolumeStore.read_crop; ``nibabel`` loads the .nii.gz and cuts; ``persistent`` is MONAI's
PersistentDataset (track_meta, its cache on disk) with a crop behind it. All three hold the same voxels, int16 on the
store's grid. Times are CPU seconds of this process, one thread, files in the page cache, taken in turn (A B C A B C),
medians with their range. Scans: a phantom at 512 x 512 x 200; real 512 x 512 slices, mirrored until there are 200,
as no real scan at hand has more than 20 of them; and real scans on their own grids. ``--workers`` is wall time on
this machine: crops a second through a DataLoader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropd
from torch.utils.data import DataLoader, Dataset

from custom.data.grid.resample import resample
from custom.data.phantom.cohort import make_phantom
from custom.data.scans import Scan
from custom.data.store.build import build_store
from custom.data.store.volume_store import VolumeStore

CROP = (192, 192, 64)
SLICES = 200


def phantom_512(slices: int) -> tuple[np.ndarray, np.ndarray]:
    """A phantom (176 voxels wide) resampled to 512 x 512, with noise of 12 HU, since resampling smooths its own away."""
    made = make_phantom(0, coverage="abdomen_pelvis", shape=(176, 176, slices))
    spacing = np.linalg.norm(made.affine[:3, :3], axis=0) * [176 / 512, 176 / 512, 1.0]
    volume, affine = resample(made.image, made.affine, spacing.tolist())
    noise = np.random.default_rng(0).normal(0, 12, volume.shape).astype(np.float32)
    noisy = np.where(volume > -950, volume + noise, volume)
    return np.clip(noisy, -1024, 3071).astype(np.int16), affine


def mirrored(path: Path, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """A real scan of few slices, there and back along z until there are enough."""
    image = nib.as_closest_canonical(nib.load(path))
    volume = np.asarray(image.dataobj).astype(np.int16)
    both = np.concatenate([volume, volume[..., ::-1]], axis=2)
    return np.tile(both, (1, 1, -(-slices // both.shape[2])))[..., :slices], image.affine


def sources(
    data: Path | None, slices: int
) -> Iterator[tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]]:
    """Names and makers of the volumes that are measured."""
    yield f"phantom 512x512x{slices}", lambda: phantom_512(slices)
    if data is None:
        return
    slab = data / "totalsegmentator" / "ts_petct_upperabd_portal_ct.nii.gz"
    chest = data / "lidc_idri" / "LIDC-IDRI-0314_chest_nc_1p5mm_ct.nii.gz"
    if slab.is_file():
        yield f"real slices 512x512x{slices} (mirrored)", lambda: mirrored(slab, slices)
    if chest.is_file():
        yield "real chest 266x222x183", lambda: mirrored(chest, 183)


def paired(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each way, taken in turn; one uncounted round first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if round_:
                seconds[name].append(time.process_time() - started)
    return seconds


def measure(name: str, volume: np.ndarray, affine: np.ndarray, folder: Path, repeats: int) -> dict[str, Any]:
    """Sizes and times of one volume."""
    spacing = [float(s) for s in np.linalg.norm(affine[:3, :3], axis=0)]
    folder.mkdir(parents=True)
    source = folder / "source.nii"
    nib.save(nib.Nifti1Image(volume, affine), source)
    store = build_store([Scan("scan", source, "patient")], folder / "store", spacing, progress=False)
    shape = store.shape("scan")
    whole = store.read_crop("scan", (0, 0, 0), shape)  # what the store holds: the other ways get the same
    files = {}
    for level in (1, 6):  # nibabel's own level, and gzip's
        files[level] = folder / f"level{level}.nii.gz"
        with nib.openers.Opener(str(files[level]), "wb", compresslevel=level) as stream:
            nib.Nifti1Image(whole, store.affine("scan")).to_stream(stream)
    source.unlink()
    rng = np.random.default_rng(1)
    size = tuple(min(c, n) for c, n in zip(CROP, shape, strict=True))

    def start() -> list[int]:
        return [int(rng.integers(0, n - s + 1)) for n, s in zip(shape, size, strict=True)]

    def from_store() -> None:
        store.read_crop("scan", start(), size).astype(np.float32)

    def from_nibabel(level: int) -> None:
        array = np.asanyarray(nib.load(files[level]).dataobj)
        array[tuple(slice(a, a + s) for a, s in zip(start(), size, strict=True))].astype(np.float32)

    load = Compose([
        LoadImaged("image", dtype=np.int16),
        EnsureChannelFirstd("image"),
        RandSpatialCropd("image", size, random_size=False),
    ])  # fmt: skip
    cached = PersistentDataset(
        [{"image": str(files[6])}], load, cache_dir=folder / "cache", track_meta=True, weights_only=False
    )
    cached[0]
    seconds = paired(
        {
            "store": from_store,
            "nibabel": lambda: from_nibabel(6),
            "persistent": lambda: cached[0]["image"].float(),
        },
        repeats,
    )
    on_disk = {
        "raw": whole.nbytes,
        "store": sum(p.stat().st_size for p in (folder / "store" / "volumes").glob("*.hu.b2nd")),
        "nii.gz level 1": files[1].stat().st_size,
        "nii.gz level 6": files[6].stat().st_size,
        "persistent": sum(p.stat().st_size for p in (folder / "cache").iterdir()),
    }
    row: dict[str, Any] = {"scan": name, "grid": list(shape), "crop": list(size)}
    for way, values in seconds.items():
        row[f"{way}_ms"] = [round(1e3 * v, 1) for v in (statistics.median(values), min(values), max(values))]
    for way in ("nibabel", "persistent"):
        row[f"{way}_over_store"] = round(row[f"{way}_ms"][0] / row["store_ms"][0], 1)
    row |= {f"{kind}_MB": round(size / 1e6, 1) for kind, size in on_disk.items()}
    row["store_over_niigz"] = round(on_disk["store"] / on_disk["nii.gz level 6"], 3)
    row["store_bytes_a_voxel"] = round(on_disk["store"] / whole.size, 3)
    return row


class Crops(Dataset):
    """Random crops of a store, as a loader's workers read them."""

    def __init__(self, store: VolumeStore, count: int) -> None:
        self.store, self.count = store, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = np.random.default_rng(index)
        shape = self.store.shape("scan")
        start = [int(rng.integers(0, max(1, n - c + 1))) for n, c in zip(shape, CROP, strict=True)]
        return torch.from_numpy(self.store.read_crop("scan", start, CROP))


def throughput(store: VolumeStore, workers: int, count: int = 96) -> dict[str, Any]:
    """Crops a second of wall time; the first batch, in which workers start, does not count."""
    loader = DataLoader(Crops(store, count), batch_size=4, num_workers=workers)
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    crops = sum(len(batch) for batch in batches)
    return {"workers": workers, "crops_a_second": round(crops / (time.perf_counter() - started), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with real scans; without it only the phantom is measured"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slices", type=int, default=SLICES)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, make) in enumerate(sources(args.data, args.slices)):
            rows.append(measure(name, *make(), Path(folder) / str(i), args.repeats))
            print(json.dumps(rows[-1]), flush=True)
        for workers in args.workers:
            row = throughput(VolumeStore(Path(folder) / "0" / "store"), workers)
            rows.append(row | {"cores": os.cpu_count()})
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
