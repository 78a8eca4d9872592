"""Commands about landmarks: embeddings, thresholds, how good an aligner is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from custom.errors import AliceError, shown

if TYPE_CHECKING:
    from custom.data.store.volume_store import VolumeStore


def embed(
    scans: str,
    out: str,
    weights: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_profile: bool = False,
    bits: int | None = None,
) -> None:
    """Write one compact embedding per scan, for the aligner ``sam``; resumable.

    Args:
        scans: a store (of alice build), a folder of scans, or a datalist.
        out: folder to write.
        weights: a .safetensors of ours, or the authors' SAM.pth; by default those of the bundle sam_landmarks.
        device: cpu or cuda.
        overwrite: replace what was made with other weights or from other voxels.
        allow_profile: embed a store of another profile than ct, which SAM was not trained on.
        bits: 4, 7 or 8 bits a number. By default 4 for the published network (128 numbers a vector), 7 for a compact
            one (32 numbers); files that are there already stay.
    """
    from custom.bundles.shipped import shipped_sam
    from custom.data.remote import is_url
    from custom.data.store.volume_store import VolumeStore
    from custom.files import sha256_of_file
    from custom.landmarks.embeddings.embed import embed_folder, embed_store
    from custom.landmarks.sam.weights import load_sam_weights, read_sam_metadata
    from custom.transfer.official import load_sam

    weights = weights or shipped_sam()
    ours = weights.endswith(".safetensors")
    network = (load_sam_weights(weights) if ours else load_sam(weights)).to(device)
    threshold = read_sam_metadata(weights).get("threshold") if ours else None
    # of the tensors: a threshold noted later leaves embeddings valid
    digest = read_sam_metadata(weights)["sha256"] if ours else sha256_of_file(Path(weights))
    if is_url(scans) or (Path(scans) / "index.json").is_file():
        written = embed_store(
            network,
            digest,
            VolumeStore(scans),
            out,
            threshold=threshold,
            overwrite=overwrite,
            allow_profile=allow_profile,
            fine_bits=bits,
        )
    else:
        written = embed_folder(
            network, digest, scans, out, threshold=threshold, overwrite=overwrite, fine_bits=bits
        )
    for saved in written:
        print(
            f"{shown(saved.path)}: {saved.num_bytes / 2**20:.1f} MiB, cosine to float32 {saved.mean_cosine:.5f} on average, "
            f"{saved.lowest_cosine:.5f} at worst"
        )
    print(f"{out}: {len(written)} written.")


def calibrate(
    store: str,
    embeddings: str,
    held_back: str,
    weights: str | None = None,
    pairs: int = 60,
    points: int = 25,
    reach_mm: float = 10.0,
    share: float = 0.9,
    seed: int = 0,
) -> None:
    """Find the score that a match of ``sam`` must have, on scans held back from its training; and keep it.

    Args:
        store: of alice build.
        embeddings: of alice embed; the score is written there.
        held_back: regular expression on the names of the scans to use.
        weights: a .safetensors to write the score to as well.
        pairs: ordered pairs of scans.
        points: per pair.
        reach_mm: how far from its start a match may come back, in mm.
        share: how many of the matches above the score must come back so near.
        seed: of the draws.
    """
    from custom.data.store.volume_store import VolumeStore
    from custom.landmarks.aligners.sam import SamAligner, calibrate_threshold
    from custom.landmarks.embeddings.folder import EmbeddingFolder
    from custom.landmarks.sam.weights import note_in_weights, read_sam_metadata

    volumes, made = VolumeStore(store), EmbeddingFolder(embeddings)
    if weights and read_sam_metadata(weights)["sha256"] != made.weights_sha256:
        raise AliceError(f"{embeddings}: made with other weights than {weights}.")
    names = [name for name in volumes.names if re.search(held_back, name)]
    if len({volumes.patient(name) for name in names}) < 2:
        raise AliceError(
            f"{store}: {held_back!r} is in the names of {len(names)} scans, and a score is calibrated on pairs of two patients'. "
            f"Scans are called {', '.join(volumes.names[:3])}, ... (alice scan --hash_ids False keeps the files' names)."
        )
    found = calibrate_threshold(
        SamAligner(volumes, made, threshold=0.0),
        volumes,
        names,
        num_pairs=pairs,
        num_points=points,
        reach_mm=reach_mm,
        share=share,
        seed=seed,
    )
    print(f"| score | accepted | come back within {reach_mm:g} mm | points |\n|---|---|---|---|")
    counts = [row["points"] for row in found.rows]
    for row, before in zip(found.rows, [0, *counts], strict=False):
        if row["points"] > before:  # lower scores accept nothing more
            print(f"| {row['score']:.3f} | {row['accepted']:.0%} | {row['within']:.0%} | {row['points']} |")
    if found.threshold is None:
        raise AliceError(
            f"No score makes {share:.0%} of the matches come back within {reach_mm:g} mm: nothing was kept. Ask for less "
            "(share, reach_mm), or train the network longer."
        )
    made.keep_threshold(found.threshold)
    if weights:
        note_in_weights(
            weights,
            {"threshold": found.threshold, "threshold_share": share, "threshold_reach_mm": reach_mm},
        )
    print(f"threshold {found.threshold}, kept in {embeddings}{f' and {weights}' if weights else ''}")


def check_alignment(
    store: str,
    out: str,
    embeddings: str | None = None,
    aligners: Sequence[str] = ("affine", "coordinate", "random"),
    pairs: int = 20,
    points: int = 20,
    seed: int = 0,
    phantoms: str | None = None,
    landmarks: str | None = None,
    names: Sequence[str] | None = None,
    warps: int = 0,
    weights: str | None = None,
) -> None:
    """Measure aligners on a store, and write a page with pictures: label transfer, centroids, cycle error, and the true error where it is known.

    Args:
        store: of alice build.
        out: folder for table.csv, index.html and pictures.
        embeddings: of alice embed; adds the aligners sam and sam_nearest.
        aligners: among affine (a registration of each pair, seconds), coordinate, random.
        pairs: of scans.
        points: in each of them.
        seed: of all draws.
        phantoms: the cohort the store was built from, for its exact correspondence.
        landmarks: CSV of scan,landmark,x,y,z in mm.
        names: scans to draw from.
        warps: so many of the scans are deformed by a known smooth map too, and each aligner has to find the way back:
            a truth that needs no label.
        weights: of SAM, to embed the deformed scans; those of ``embeddings``. By default of the bundle sam_landmarks.
    """
    from custom.bundles.shipped import shipped_sam
    from custom.data.store.volume_store import VolumeStore
    from custom.landmarks.aligners.make import make_aligner
    from custom.landmarks.aligners.protocol import Aligner
    from custom.landmarks.embeddings.folder import EmbeddingFolder
    from custom.landmarks.quality import check_alignment as quality
    from custom.landmarks.quality.ground_truth import phantom_truth
    from custom.landmarks.quality.page import table_cells
    from custom.landmarks.sam.weights import read_sam_metadata

    volumes, weights = VolumeStore(store), weights or (shipped_sam() if warps else "")
    asked = dict.fromkeys([*(("sam", "sam_nearest") if embeddings else ()), *_words(aligners)])
    names = _words(names) if names is not None else None

    def made(scans: VolumeStore, embedded: str | Path | None) -> dict[str, Aligner]:
        return {
            name: make_aligner(name, scans, embedded if name.startswith("sam") else None) for name in asked
        }

    chosen = made(volumes, embeddings)
    more = []
    if (
        warps
        and embeddings
        and read_sam_metadata(weights)["sha256"] != EmbeddingFolder(embeddings).weights_sha256
    ):
        raise AliceError(
            f"{embeddings}: made with other weights than {weights}, which would embed the deformed scans: give --weights."
        )
    if warps:
        deformed = (volumes.names if names is None else names)[:warps]
        more = quality.warp_rows(
            volumes, deformed, made, out, weights if embeddings else None, num_points=5 * points, seed=seed
        )
    truth = phantom_truth(volumes, Path(phantoms)) if phantoms else None
    rows = quality.check_alignment(
        volumes,
        chosen,
        out,
        pairs=pairs,
        points=points,
        seed=seed,
        names=names,
        truth=truth,
        landmark_csv=landmarks,
        more=more,
    )
    headers, cells = table_cells(rows)
    for line in (headers, *cells):
        print(" | ".join(shown(cell) for cell in line))
    print(f"{Path(out) / 'index.html'}")


def _words(value: str | Sequence[str]) -> list[str]:
    """Of a list, or of text with commas: fire makes a list only of words without hyphens."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)
