"""Measure aligners: the same figures for each, with intervals, as a table and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.evaluation.scores.csv_rows import write_rows
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.embeddings.embed import embed_store
from custom.landmarks.quality.alignment_errors import (
    Figures,
    Pair,
    Row,
    cycle_figures,
    known_warp,
    landmark_error,
    truth_error,
)
from custom.landmarks.quality.ground_truth import Truth, read_landmarks
from custom.landmarks.quality.known_warp import write_warped
from custom.landmarks.quality.label_transfer import label_transfer
from custom.landmarks.quality.page import alignment_page
from custom.landmarks.sam.weights import load_sam_weights, read_sam_metadata


def alignment_table(
    aligners: Mapping[str, Aligner],
    store: VolumeStore,
    pairs: Sequence[Pair],
    *,
    num_points: int = 20,
    seed: int = 0,
    truth: Truth | None = None,
    landmarks: Mapping[str, Mapping[str, NDArray]] | None = None,
    label_names: Mapping[int, str] | None = None,
    landmark_pairs: Sequence[Pair] | None = None,
    labelled_pairs: Sequence[Pair] | None = None,
) -> list[Row]:
    """The same figures for every aligner.

    Args:
        aligners: by the name to show.
        store: the scans.
        pairs: (query, key) names.
        num_points: for each pair, and for each structure of a pair.
        seed: of all draws; the points are the same for every aligner.
        truth: true correspondence, if there is one.
        landmarks: see :func:`read_landmarks`.
        label_names: of label values.
        landmark_pairs, labelled_pairs: pairs of scans with landmarks, or with labels; by default those among
            ``pairs``.

    Returns:
        Rows of aligner, measure, statistic, value, its 95 % interval (low, high), pairs and points. Intervals
        are from pairs drawn with replacement; they are nan with fewer than three. A point without an answer
        counts as an infinite error.
    """
    rows: list[Row] = []
    if labelled_pairs is None:
        labelled_pairs = [pair for pair in pairs if all(store.has_label(name) for name in pair)]
    for name, aligner in aligners.items():

        def add(measure: str, figures: Figures, *statistics: str, of: str = name) -> None:
            rows.extend(figures.row(of, measure, statistic, seed) for statistic in statistics)

        cycle, score, accepted = cycle_figures(aligner, store, pairs, num_points, seed)
        add("accepted", accepted, "mean")
        add("score", score, "mean")
        add("cycle error, mm", cycle, "mean", "P90", "within 10 mm")
        if truth is not None:
            add(
                "error, mm",
                truth_error(aligner, store, truth, pairs, num_points, seed),
                "mean",
                "P90",
                "within 10 mm",
            )
        if landmarks:
            add(
                "landmark error, mm",
                landmark_error(aligner, landmarks, pairs if landmark_pairs is None else landmark_pairs),
                "mean",
                "P90",
                "within 10 mm",
            )
        if labelled_pairs:
            transfer = label_transfer(aligner, store, labelled_pairs, num_points, seed)
            for kind, by_value in zip(("in {}", "mm to {}", "centroid error, {}, mm"), transfer, strict=True):
                whole = [values for figures in by_value.values() for values in figures.by_pair]
                add(kind.format("same structure"), Figures(whole), "mean")
                for value, figures in by_value.items():
                    add(kind.format((label_names or {}).get(value, f"label {value}")), figures, "mean")
    return rows


def warp_rows(
    store: VolumeStore,
    names: Sequence[str],
    make_aligners: Callable[[VolumeStore, Path | None], Mapping[str, Aligner]],
    out_dir: str | Path,
    weights: str | Path | None = None,
    *,
    num_points: int = 100,
    seed: int = 0,
) -> list[Row]:
    """Target registration error between scans and copies of them that known smooth maps deformed.

    Args:
        store: the scans.
        names: which to deform.
        make_aligners: makes them from a store and the folder of its embeddings.
        out_dir: folder for ``warped``, a store of scans and copies, and ``warped_embeddings``.
        weights: of SAM, to embed both; None if no aligner needs embeddings.
        num_points: points in each body.
        seed: of the maps and points.

    Returns:
        Rows as :func:`alignment_table` gives.
    """
    out_dir = Path(out_dir)
    deformed, warps = write_warped(store, names, out_dir / "warped", seed=seed)
    embeddings = None
    if weights is not None:
        embeddings, info = out_dir / "warped_embeddings", read_sam_metadata(weights)
        network = load_sam_weights(weights)
        embed_store(
            network, info["sha256"], deformed, embeddings, threshold=info.get("threshold"), overwrite=True
        )
    return [
        known_warp(aligner, deformed, warps, num_points, seed).row(
            name, "known warp, error, mm", statistic, seed
        )
        for name, aligner in make_aligners(deformed, embeddings).items()
        for statistic in ("mean", "median", "P90", "within 10 mm")
    ]


def draw_pairs(
    store: VolumeStore, count: int, seed: int = 0, names: Sequence[str] | None = None
) -> list[Pair]:
    """Ordered pairs of scans of different patients: ``count`` at random, or all if there are fewer.

    Raises:
        AliceError: if there are none.
    """
    chosen = list(names) if names is not None else store.names
    every = [(q, k) for q in chosen for k in chosen if store.patient(q) != store.patient(k)]
    if not every:
        raise AliceError(
            f"{store.path}: a pair needs scans of two patients; there is none among {chosen[:5]}."
        )
    picked = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[i] for i in sorted(picked)]


def check_alignment(
    store: VolumeStore,
    aligners: Mapping[str, Aligner],
    out_dir: str | Path,
    *,
    pairs: int | Sequence[Pair] = 20,
    points: int = 20,
    seed: int = 0,
    names: Sequence[str] | None = None,
    truth: Truth | None = None,
    landmark_csv: str | Path | None = None,
    label_names: Mapping[int, str] | None = None,
    pictures: int = 6,
    more: Sequence[Row] = (),
) -> list[Row]:
    """Measure aligners and write ``table.csv``, ``index.html`` and a PNG per matched point.

    Args:
        store: the scans.
        aligners: by the name to show.
        out_dir: folder to write.
        pairs: number of pairs to draw, or the pairs.
        points: number for each pair, and for each structure of a pair.
        seed: of all draws.
        names: scans to draw from; None for all.
        truth: see :func:`alignment_table`; for phantoms, ``phantom_truth(store, folder)``.
        landmark_csv: see :func:`read_landmarks`.
        label_names: of label values.
        pictures: pairs in the gallery, each with one point and all aligners.
        more: further rows for the table, such as those of :func:`warp_rows`.

    Returns:
        The table's rows.

    Raises:
        AliceError: if there are no pairs, or the landmarks cannot be read or name no pair of the store's
            scans.
    """
    out_dir = Path(out_dir)
    landmarks = read_landmarks(landmark_csv) if landmark_csv is not None else None
    if landmarks is not None and not set(landmarks) & set(store.names):
        raise AliceError(
            f"{landmark_csv}: none of its scans ({', '.join(list(landmarks)[:3])}) is in {store.path}."
        )
    of_some: dict[str, list[Pair]] = {}
    if isinstance(pairs, int):
        chosen = draw_pairs(store, pairs, seed, names)
        # what only some scans have is measured on pairs of those scans
        offered = store.names if names is None else list(names)
        labelled = [name for name in offered if store.has_label(name)]
        if len({store.patient(name) for name in labelled}) > 1:
            of_some["labelled_pairs"] = draw_pairs(store, pairs, seed, labelled)
        if landmarks is not None:
            marked = [name for name in offered if name in landmarks]
            if len({store.patient(name) for name in marked}) < 2:
                raise AliceError(
                    f"{landmark_csv}: marks {', '.join(marked)} of {store.path}; a pair needs scans of two patients."
                )
            of_some["landmark_pairs"] = draw_pairs(store, pairs, seed, marked)
    else:
        chosen = list(pairs)
    rows = alignment_table(
        aligners,
        store,
        chosen,
        num_points=points,
        seed=seed,
        truth=truth,
        landmarks=landmarks,
        label_names=label_names,
        **of_some,
    )
    rows += more
    out_dir.mkdir(parents=True, exist_ok=True)
    write_rows(out_dir / "table.csv", rows)
    alignment_page(rows, aligners, store, chosen, out_dir, truth=truth, pictures=pictures, seed=seed).write(
        out_dir / "index.html"
    )
    return rows
