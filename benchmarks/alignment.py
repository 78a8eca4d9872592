"""How well does each aligner find a point? The tables of the SAM bundle's model card, from scans held back from training.

    alice phantom PHANTOMS --n 10 --seed 2000
    OMP_NUM_THREADS=1 python benchmarks/alignment.py OUT --phantoms PHANTOMS --openkbp OPENKBP --abdomen CT.nii.gz --lungs LUNGS

Four tests, the same points for every aligner, errors in mm with 95 % intervals (pairs drawn with replacement):
phantoms of known correspondence; a real abdomen and phantoms deformed by a known warp; structures of
OpenKBP patients; right and left lungs (labels 201 and 202) of chest CT.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from custom.data.store.build import build_store
from custom.data.store.volume_store import VolumeStore
from custom.landmarks.aligners.make import make_aligner
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.embeddings.embed import embed_store
from custom.landmarks.quality.alignment_errors import Figures, Row, known_warp, query_aligner, truth_error
from custom.landmarks.quality.check_alignment import draw_pairs
from custom.landmarks.quality.ground_truth import phantom_truth
from custom.landmarks.quality.known_warp import Warp, write_warped
from custom.landmarks.quality.label_transfer import label_transfer
from custom.landmarks.sam.weights import load_sam_weights, read_sam_metadata
from custom.space import to_world

ALIGNERS = ("sam", "sam_nearest", "affine", "coordinate", "random")
STATISTICS = ("mean", "median", "P90", "within 10 mm")
HEAD_AND_NECK = {1: "brainstem", 2: "cord", 3: "right parotid", 4: "left parotid"}
LUNGS = {201: "right lung", 202: "left lung"}
MM = (2.0, 2.0, 2.0)


def main() -> None:
    """Read the command line, run what is asked for, print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for stores, embeddings and figures.json")
    parser.add_argument("--weights", default="bundles/sam_landmarks/models/model.safetensors")
    parser.add_argument("--phantoms", type=Path, help="of alice phantom, of a seed not trained on")
    parser.add_argument("--openkbp", type=Path, help="folder with validation_*_ct.nii.gz and their labels")
    parser.add_argument("--lungs", type=Path, help="folder of *_ct.nii.gz with *_label.nii.gz")
    parser.add_argument("--abdomen", type=Path, nargs="*", default=[], help="CT to deform")
    parser.add_argument("--aligners", nargs="*", default=ALIGNERS)
    parser.add_argument("--pairs", type=int, default=30, help="of phantoms")
    parser.add_argument("--points", type=int, default=40, help="a pair, and a structure and pair")
    asked = parser.parse_args()

    tables: dict[str, list[Row]] = {}
    if asked.phantoms:
        store = stored(asked.phantoms / "images", asked.out / "phantoms")
        aligners = made(asked, store, asked.out / "phantoms_embedded")
        pairs = draw_pairs(store, asked.pairs)
        truth = phantom_truth(store, asked.phantoms)
        tables["Phantoms of known correspondence"] = [
            row
            for name, aligner in aligners.items()
            for row in rows_of(name, "error, mm", truth_error(aligner, store, truth, pairs, asked.points))
        ]
        tables["Phantoms deformed by a known warp"] = warped(
            asked, store, store.names[:10], "phantoms_warped"
        )
    if asked.abdomen:
        folder = asked.out / "abdomen_scans"
        folder.mkdir(parents=True, exist_ok=True)
        for path in asked.abdomen:
            shutil.copy(path, folder / path.name)
        store = stored(folder, asked.out / "abdomen")
        tables["Real CT deformed by known warps"] = warped(asked, store, store.names, "abdomen_warped")
    if asked.openkbp:
        folder = asked.out / "openkbp_scans"
        folder.mkdir(parents=True, exist_ok=True)
        for path in asked.openkbp.glob("validation_*.nii.gz"):
            shutil.copy(path, folder / path.name)
        store = stored(folder, asked.out / "openkbp")
        aligners = made(asked, store, asked.out / "openkbp_embedded")
        pairs = draw_pairs(store, 10_000)
        for kind, rows in structures(aligners, store, pairs, asked.points, HEAD_AND_NECK, (3, 4)).items():
            tables[f"OpenKBP validation patients: {kind}"] = rows
    if asked.lungs:
        store = stored(asked.lungs, asked.out / "lungs")
        aligners = made(asked, store, asked.out / "lungs_embedded")
        pairs = draw_pairs(store, 10_000)
        for kind, rows in structures(aligners, store, pairs, asked.points, LUNGS, (201, 202)).items():
            tables[f"Lungs: {kind}"] = rows
    for title, rows in tables.items():
        print(f"\n{title}\n\n{markdown(rows)}")
    (asked.out / "figures.json").write_text(json.dumps(tables, indent=1), encoding="utf-8")


def stored(scans: Path, path: Path) -> VolumeStore:
    """The scans at SAM's own 2 mm."""
    return build_store(scans, path, spacing=MM, workers=1)


def made(asked: argparse.Namespace, store: VolumeStore, embeddings: Path) -> dict[str, Aligner]:
    """The aligners, with embeddings of the store's scans."""
    info = read_sam_metadata(asked.weights)
    if any(name.startswith("sam") for name in asked.aligners):
        network = load_sam_weights(asked.weights)
        embed_store(network, info["sha256"], store, embeddings, threshold=info.get("threshold"))
    return {n: make_aligner(n, store, embeddings if n.startswith("sam") else None) for n in asked.aligners}


def warped(asked: argparse.Namespace, store: VolumeStore, names: Sequence[str], part: str) -> list[Row]:
    """Target registration error between scans and themselves deformed."""
    warps: Mapping[str, Warp]
    deformed, warps = write_warped(store, names, asked.out / part)
    aligners = made(asked, deformed, asked.out / f"{part}_embedded")
    return [
        row
        for name, aligner in aligners.items()
        for row in rows_of(name, "error, mm", known_warp(aligner, deformed, warps, 5 * asked.points))
    ]


def structures(
    aligners: Mapping[str, Aligner],
    store: VolumeStore,
    pairs: Sequence[tuple[str, str]],
    points: int,
    named: Mapping[int, str],
    twins: tuple[int, int],
) -> dict[str, list[Row]]:
    """Label transfer, centroid errors, and points of twins (right and left) found on the wrong side."""
    rows: dict[str, list[Row]] = {"in the same structure": [], "centroid error, mm": [], "wrong side": []}
    for name, aligner in aligners.items():
        transfer = label_transfer(aligner, store, pairs, points, labels=list(named))
        for value, structure in named.items():
            rows["in the same structure"].append(transfer.inside[value].row(name, structure, "mean"))
            rows["centroid error, mm"].append(transfer.centroid_mm[value].row(name, structure, "mean"))
        for own, other in (twins, twins[::-1]):
            figures = wrong_side(aligner, store, pairs, own, other, points)
            rows["wrong side"].append(figures.row(name, named[own], "mean"))
    return rows


def wrong_side(
    aligner: Aligner,
    store: VolumeStore,
    pairs: Sequence[tuple[str, str]],
    own: int,
    other: int,
    points: int,
) -> Figures:
    """1 where a point of one structure was found nearer to the middle of its twin than to its own, else 0."""
    found = []
    for index, (scan_q, scan_k) in enumerate(pairs):
        label_q, label_k = (store.read_label_crop(n, (0, 0, 0), store.shape(n)) for n in (scan_q, scan_k))
        if not all((label_q == own).any() and (label_k == v).any() for v in (own, other)):
            continue
        voxels = np.argwhere(label_q == own)
        rng = np.random.default_rng([index, own])
        answers = query_aligner(
            aligner,
            (scan_q, scan_k),
            to_world(store.affine(scan_q), voxels[rng.integers(len(voxels), size=points)]),
        )
        own_mm, other_mm = (
            np.linalg.norm(
                answers.points_mm - to_world(store.affine(scan_k), np.argwhere(label_k == v).mean(axis=0)),
                axis=1,
            )
            for v in (own, other)
        )
        found.append(np.where(np.isfinite(answers.points_mm).all(axis=1), other_mm < own_mm, np.nan))
    return Figures(found)


def rows_of(aligner: str, measure: str, figures: Figures) -> list[Row]:
    """One row a statistic."""
    return [figures.row(aligner, measure, statistic) for statistic in STATISTICS]


def markdown(rows: Sequence[Row]) -> str:
    """A table: aligners down, measures or statistics across."""
    by_measure = len({row["measure"] for row in rows}) > 1
    columns = list(dict.fromkeys(row["measure" if by_measure else "statistic"] for row in rows))
    lines = [
        f"| aligner | {' | '.join(columns)} | pairs | points |",
        f"|---|{'---|' * (len(columns) + 2)}",
    ]
    for name in dict.fromkeys(row["aligner"] for row in rows):
        own = [row for row in rows if row["aligner"] == name]
        cells = []
        for row in own:
            text = f"{row['value']:.3g}"
            if not math.isnan(row["low"]):
                text += f" [{row['low']:.3g}, {row['high']:.3g}]"
            cells.append(text)
        lines.append(f"| {name} | {' | '.join(cells)} | {own[0]['pairs']} | {own[0]['points']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
