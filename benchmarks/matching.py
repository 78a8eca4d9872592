"""How long does it take to find a point, and to draw an aligned pair of crops? Against the authors' arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/matching.py [--points 40] [--slices 200]

Embeddings are synthetic (random Fourier features of place, the key's place warped smoothly, noise on top), as in
``performance.md``; times are medians of ``process_time``, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from custom.data.grid.profiles import window
from custom.data.store.build import build_store
from custom.files import write_text
from custom.landmarks.aligners.sam import SamAligner
from custom.landmarks.embeddings.file import FORMAT, save_embedding
from custom.landmarks.embeddings.folder import INDEX, embedding_path
from custom.landmarks.embeddings.stored import StoredEmbedding
from custom.landmarks.matching.points import Matches, match_points
from custom.landmarks.matching.search import REFUSED, upsample
from custom.landmarks.sam.body_cells import body_cells
from custom.landmarks.sam.network import EMBEDDING_DIM
from custom.landmarks.sam.scan_grid import Level, ScanEmbedding, cell_to_world, world_to_cell
from custom.space import to_voxels, to_world

SPACING = (0.8, 0.8, 1.5)
CROP = np.array([192, 192, 64])
LENGTHS_MM: dict[Level, list[float]] = {"fine": [8.0, 12.0, 20.0, 40.0], "coarse": [25.0, 40.0, 60.0]}


def warp(points_mm: np.ndarray, amount_mm: float = 12.0) -> np.ndarray:
    """A smooth map without folds: where a place of the key lies in the query."""
    rng, out = np.random.default_rng(1), points_mm.copy()
    for axis in range(3):
        for _ in range(3):
            out[..., axis] += (
                amount_mm / 3 * np.sin(points_mm @ (rng.normal(size=3) / 80) + rng.uniform(0, 6.28))
            )
    return out


def structured(
    shape: tuple[int, int, int], affine: np.ndarray, noise: float, warped: bool, seed: int = 0
) -> ScanEmbedding:
    """Embeddings of a scan whose 2 mm grid has this shape (x, y, z) and affine."""
    fine = (shape[2] // 2, -(-shape[1] // 2), -(-shape[0] // 2))
    coarse = (-(-fine[0] // 2), -(-shape[1] // 16), -(-shape[0] // 16))
    maps = []
    for level, grid in (("fine", fine), ("coarse", coarse)):
        rng = np.random.default_rng([seed, level == "coarse"])
        directions = rng.normal(size=(3, EMBEDDING_DIM)) / rng.choice(LENGTHS_MM[level], EMBEDDING_DIM)  # type: ignore[index]
        phases = rng.uniform(0, 2 * np.pi, EMBEDDING_DIM)
        rng = np.random.default_rng([seed, level == "coarse", warped, 7])
        out = np.empty((*grid, EMBEDDING_DIM), np.float32)
        for z in range(grid[0]):
            cells = np.stack(np.meshgrid([z], np.arange(grid[1]), np.arange(grid[2]), indexing="ij"), -1)
            places = cell_to_world(cells, affine, level)  # type: ignore[arg-type]
            values = np.cos((warp(places) if warped else places) @ directions + phases)
            values /= np.linalg.norm(values, axis=-1, keepdims=True)
            values += rng.normal(size=values.shape) * (noise / np.sqrt(EMBEDDING_DIM))
            out[z] = (values / np.linalg.norm(values, axis=-1, keepdims=True))[0]
        maps.append(torch.from_numpy(out).permute(3, 0, 1, 2).contiguous())
    return ScanEmbedding(maps[0], maps[1], affine, shape)


def write_scan(path: Path, slices: int, seed: int) -> None:
    """A body in air, 512 x 512 pixels, with the noise of a CT."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, 512), np.linspace(-1, 1, 512), indexing="ij")
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    volume = np.empty((512, 512, slices), np.int16)
    for z in range(slices):
        organs = 40 + 40 * np.sin(9 * x + z / 20) * np.cos(7 * y)
        volume[..., z] = np.where(body, organs, -1000) + rng.normal(0, 12, body.shape)
    affine = np.diag([*SPACING, 1.0])
    nib.save(nib.Nifti1Image(volume, affine), path)


def official_match(
    point_mm: np.ndarray, query: ScanEmbedding, key: ScanEmbedding
) -> tuple[np.ndarray, float]:
    """The authors' arithmetic for one point: nothing is kept from one to the next (Alice's reader)."""
    cell = np.floor(world_to_cell(point_mm, query.affine, "fine") + 0.5).astype(int)
    place = (slice(None), *cell)
    vector_f = query.fine[place].float()
    vector_c = upsample(query.coarse[None].float(), query.fine.shape[1:])[0][place]
    total = torch.nn.functional.conv3d(key.fine[None].float(), vector_f.view(1, -1, 1, 1, 1))
    coarse = upsample(key.coarse[None].float(), key.fine.shape[1:])
    total = (total + torch.nn.functional.conv3d(coarse, vector_c.view(1, -1, 1, 1, 1))) / 2
    best = np.unravel_index(int(total.argmax()), total.shape[2:])
    return cell_to_world(best, key.affine, "fine"), float(total.max())


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return float(np.median(times))


def one_by_one(points: np.ndarray, query: Any, key: Any, **options: Any) -> tuple[Matches, float]:
    """Answers, and the median CPU time of one point."""
    match_points(points[:1], query, key, **options)  # what is prepared once is not counted
    answers, times = [], []
    for point in points:
        start = time.process_time()
        answers.append(match_points(point, query, key, **options))
        times.append(time.process_time() - start)
    return Matches(*(np.concatenate(part) for part in zip(*answers, strict=True))), float(np.median(times))


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--official-points", type=int, default=8)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.25)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def run(folder: Path, options: argparse.Namespace) -> None:
    """Everything in one folder."""
    (folder / "scans").mkdir()
    for index, name in enumerate("qk"):
        write_scan(folder / "scans" / f"{name}.nii.gz", options.slices, index)
    store = build_store(folder / "scans", folder / "store", spacing=SPACING, progress=False)
    embeddings, saved, eight = {}, {}, {}
    for name in "qk":
        hu, affine = store.read_crop(name, (0, 0, 0), store.shape(name)), store.affine(name)
        extent = np.array(store.shape(name)) * SPACING
        grid_affine = np.diag([-2.0, -2.0, 2.0, 1.0])
        last = np.array([*store.shape(name)[:2], 1]) - 1
        grid_affine[:3, 3] = to_world(affine, last) + np.array([-0.6, -0.6, 0.25])
        size = np.ceil(extent / 2 - 1e-3).astype(int)
        embedding = structured(
            (int(size[0]), int(size[1]), int(size[2])), grid_affine, options.noise, name == "k"
        )
        embeddings[name] = embedding
        body = body_cells(hu, affine, embedding)
        path = embedding_path(folder / "embeddings", name)
        saved[name] = save_embedding(path, embedding, "w", store.records[name].voxels_sha256, body=body)
        eight[name] = save_embedding(folder / f"{name}.sam", embedding, "w", "s", body=body, fine_bits=8)
        with open(folder / f"{name}.pkl", "wb") as file:  # the authors' storage
            pickle.dump([embedding.fine.half().numpy(), embedding.coarse.half().numpy()], file)
    write_text(
        folder / "embeddings" / INDEX, f'{{"format": "{FORMAT}", "weights_sha256": "w", "profile": "ct"}}'
    )

    query, key = embeddings["q"], embeddings["k"]
    stored_q, stored_k = (StoredEmbedding(saved[name].path) for name in "qk")
    voxels = store.body_voxels("q")
    near = np.abs(voxels - np.array(store.shape("q")) / 2).max(axis=1) < 0.4 * min(
        store.shape("q")
    )  # warped places stay inside
    points = to_world(
        store.affine("q"), voxels[near][np.random.default_rng(0).integers(near.sum(), size=options.points)]
    )

    few = points[: options.official_points]
    official = [official_match(point, query, key) for point in few]
    official_s = seconds(lambda: official_match(few[0], query, key), max(3, len(few) // 2))
    rows = [("official arithmetic, float32", official_s, "", "")]
    exact, exact_s = one_by_one(points, query, key)
    same = [np.allclose(exact.points_mm[i], official[i][0]) for i in range(len(few))]
    rows.append(
        (
            "exact, float32 in memory",
            exact_s,
            f"{sum(same)} of {len(few)} the official answer",
            _error(exact, points),
        )
    )
    for title, maps, kwargs in (
        ("fast, float32 in memory", (query, key), {"method": "fast"}),
        ("exact, from the file", (stored_q, stored_k), {}),
        ("fast, from the file", (stored_q, stored_k), {"method": "fast"}),
        (
            "fast and refined, from the file (what `sam_nearest` does)",
            (stored_q, stored_k),
            {"method": "fast", "refine": True},
        ),
    ):
        found, spent = one_by_one(points, *maps, **kwargs)
        agree = np.linalg.norm(found.points_mm - exact.points_mm, axis=1)
        rows.append(
            (
                title,
                spent,
                f"{(agree < 0.1).mean():.1%} as exact, largest difference {agree.max():.0f} mm",
                _error(found, points),
            )
        )
    print(
        f"\nFine map {tuple(query.fine.shape[1:])} cells, noise {options.noise}, {options.points} points, one thread\n"
    )
    print(
        "| way | ms a point | faster by | answers | mean error to the truth |\n| --- | --- | --- | --- | --- |"
    )
    for title, spent, agreement, error in rows:
        print(f"| {title} | {spent * 1e3:.2f} | {official_s / spent:.0f}x | {agreement} | {error} |")

    compression(query, key, stored_q, stored_k, saved, eight, folder, points)
    drawing(folder, store, options)


def compression(
    query: Any,
    key: Any,
    stored_q: Any,
    stored_k: Any,
    saved: Any,
    eight: Any,
    folder: Path,
    points: np.ndarray,
) -> None:
    """What storing costs, against float32, refined answers."""
    body = stored_k.body.mean()
    bits, dim = stored_k.header.fine_bits, stored_k.header.dim
    cube = (75**3 * (dim * bits / 8 + 3) + 38**3 * (dim + 2) + 19**3 * (2 * dim + 12)) * body + 1.05e6
    exact = match_points(points, query, key, refine=True)
    pickled = (folder / "k.pkl").stat().st_size
    print(
        "\n| storage of the key | MB | within 2 mm of float32 (refined) | lowest cosine |\n| --- | --- | --- | --- |"
    )
    print(f"| pickle, fp16 (the authors) | {pickled / 1e6:.1f} | | |")
    for title, files in ((f"{bits} bits", saved), ("8 bits", eight)):
        pair = [StoredEmbedding(files[name].path) for name in "qk"]
        found = match_points(points, *pair, refine=True)
        share = (np.linalg.norm(found.points_mm - exact.points_mm, axis=1) <= 2).mean()
        print(
            f"| ours, {title} | {files['k'].num_bytes / 1e6:.1f} | {share:.1%} | {files['k'].lowest_cosine:.4f} |"
        )
    print(
        f"\n{body:.0%} of the cells are body or near it; 300 x 300 x 300 mm with that share: {cube / 1e6:.1f} MB ({bits} bits)."
    )


def drawing(folder: Path, store: Any, options: argparse.Namespace) -> None:
    """One aligned pair of crops, both ways."""
    nearest = SamAligner(store, folder / "embeddings", 0.0, consensus=False)
    agreed = SamAligner(store, folder / "embeddings", 0.0)
    rng, voxels = np.random.default_rng(0), store.body_voxels("q")
    answered: list[bool] = []

    def ours(aligner: SamAligner, new_scans: bool = False, first_time: bool = False) -> None:
        agreed.few_map.cache_clear()  # pairs seldom meet twice
        if new_scans or first_time:  # nothing is kept of either, their files are opened anew
            agreed.blocks.cache_clear()
            agreed.embeddings._open.cache_clear()
        if first_time:  # a process compares a file's checksum once
            agreed.embeddings._whole.clear()
        point = to_world(store.affine("q"), voxels[rng.integers(len(voxels))])
        match = aligner.align("q", point, "k", rng)
        answered.append(match.score > REFUSED)
        for name, place in (("q", point), ("k", match.point_mm)):
            start = np.rint(to_voxels(store.affine(name), place)).astype(int) - CROP // 2
            window(store.read_crop(name, start, CROP), -175.0, 250.0)

    def theirs() -> None:
        volumes, maps = {}, {}
        for name in "qk":
            image = nib.load(folder / "scans" / f"{name}.nii.gz")
            volumes[name] = np.asarray(image.dataobj)
            with open(folder / f"{name}.pkl", "rb") as file:
                maps[name] = [torch.from_numpy(part) for part in pickle.load(file)]
        known = {name: StoredEmbedding(embedding_path(folder / "embeddings", name)) for name in "qk"}
        pair = [ScanEmbedding(maps[n][0], maps[n][1], known[n].affine, known[n].shape) for n in "qk"]
        point = to_world(store.affine("q"), voxels[rng.integers(len(voxels))])
        found, _ = official_match(point, *pair)
        for name, place in (("q", point), ("k", found)):
            start = np.rint(to_voxels(store.affine(name), place)).astype(int) - CROP // 2
            inner = tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(start, CROP, strict=True))
            window(volumes[name][inner], -175.0, 250.0)

    ways = {
        "`sam_nearest`": lambda: ours(nearest),
        "`sam`, both scans drawn a moment ago": lambda: ours(agreed),
        "`sam`, two other scans than the last time": lambda: ours(agreed, True),
        "`sam`, two scans that this process never opened": lambda: ours(agreed, first_time=True),
    }
    theirs_s = seconds(theirs, 2)
    print(
        f"\n| one aligned pair of crops {tuple(int(n) for n in CROP)}, 512 x 512 x {options.slices} voxels | ms | |\n| --- | --- | --- |"
    )
    print(f"| decode both .nii.gz, unpickle both embeddings, official arithmetic | {theirs_s * 1e3:.0f} | |")
    for title, way in ways.items():
        way()
        answered.clear()
        ours_s = seconds(way, options.draws)
        print(
            f"| store and embedding files, {title}; {np.mean(answered):.0%} matched | {ours_s * 1e3:.1f} | {theirs_s / ours_s:.0f}x |"
        )


def _error(found: Matches, points: np.ndarray) -> str:
    return f"{np.linalg.norm(warp(found.points_mm) - points, axis=1).mean():.2f} mm"


if __name__ == "__main__":
    main()
