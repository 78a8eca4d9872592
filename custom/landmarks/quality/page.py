"""The page of ``alice check-alignment``: the table of figures, and pictures of matched points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
from numpy.typing import NDArray

from custom.data.grid.profiles import window
from custom.data.store.volume_store import VolumeStore
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.quality.alignment_errors import Pair, Row, body_points, errors_mm, query_aligner
from custom.landmarks.quality.ground_truth import Truth
from custom.report import Page
from custom.space import to_voxels


def alignment_page(
    rows: Sequence[Row],
    aligners: Mapping[str, Aligner],
    store: VolumeStore,
    pairs: Sequence[Pair],
    out_dir: Path,
    *,
    truth: Truth | None = None,
    pictures: int = 6,
    seed: int = 0,
) -> Page:
    """The page of ``alice check-alignment``: the table, then matched points. Also writes the pictures as PNG."""
    page = Page(
        "Alignment", f"{len(pairs)} pairs of scans from {store.path}, the same points for every aligner."
    )
    headers, cells = table_cells(rows)
    page.section("Figures").table(
        headers,
        cells,
        "Value and 95 % interval (pairs drawn with replacement; none with fewer than three). A point without an answer counts as an "
        "infinite error. Each aligner accepts points by its own score.",
    )
    page.section("Matched points").text(
        "Above the query, below the key: axial, coronal and sagittal planes through the point, patient's right on the "
        "left, anterior or superior on top. Crops of 160 mm."
    )
    step = max(1, len(pairs) // max(pictures, 1))
    for number, pair in enumerate(pairs[::step][:pictures]):
        _, points = next(iter(body_points(store, [pair], 1, seed + 1000 + number)))
        images = []
        for name, aligner in aligners.items():
            answers = query_aligner(aligner, pair, points, seed)
            back = (
                query_aligner(aligner, (pair[1], pair[0]), answers.points_mm, seed + 1)
                if np.isfinite(answers.points_mm).all()
                else None
            )
            cycle = errors_mm(back, points)[0] if back is not None else math.inf
            caption = f"{name}: score {answers.scores[0]:.2f}{'' if answers.accepted[0] else ' (refused)'}, cycle error {cycle:.0f} mm"
            if truth is not None:
                caption += f", error {errors_mm(answers, truth(pair[0], points, pair[1]))[0]:.0f} mm"
            picture = pair_picture(store, pair, points[0], answers.points_mm[0])
            matplotlib.image.imsave(out_dir / f"{number:02d}_{name}.png", picture)
            images.append((picture, caption))
        place = ", ".join(f"{value:.0f}" for value in points[0])
        page.gallery(images, f"{pair[0]} at ({place}) mm, found in {pair[1]}")
    return page


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of the table, with one column for each aligner: value and interval."""
    names = list(dict.fromkeys(row["aligner"] for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        text = "–" if math.isnan(row["value"]) else f"{round(row['value'], 9):.3g}"
        if not math.isnan(row["low"]):
            text += f" [{row['low']:.3g}, {row['high']:.3g}]"
        lines.setdefault((row["measure"], row["statistic"]), {})[row["aligner"]] = text
    return ["measure", *names], [
        [f"{measure}: {statistic}", *(cells.get(name, "–") for name in names)]
        for (measure, statistic), cells in lines.items()
    ]


def pair_picture(
    store: VolumeStore, pair: Pair, point_q: NDArray[np.float64], point_k: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Three planes of the query above three of the key, in [0, 1] (H, W, 3), with a cross at the point."""
    return np.concatenate([planes(store, pair[0], point_q), planes(store, pair[1], point_k)], axis=0)


def planes(
    store: VolumeStore, name: str, point_mm: NDArray[np.float64], *, side_mm: float = 160.0, pixels: int = 160
) -> NDArray[np.float64]:
    """Axial, coronal and sagittal planes through a point side by side, (pixels, 3 pixels, 3); grey if it is nan."""
    if not np.isfinite(point_mm).all():
        return np.full((pixels, 3 * pixels, 3), 0.3)
    spacing = np.linalg.norm(store.affine(name)[:3, :3], axis=0)
    size = np.maximum(np.rint(side_mm / spacing).astype(int), 2)
    centre = np.rint(to_voxels(store.affine(name), point_mm)).astype(int)
    crop = window(store.read_crop(name, centre - size // 2, size), -160.0, 240.0)
    middle = size // 2
    shown = []
    for axis in (2, 1, 0):
        plane = np.take(crop, middle[axis], axis=axis)  # x or y first, then y or z
        columns, lines = ((np.arange(pixels) * n // pixels) for n in plane.shape)
        if axis != 0:
            columns = columns[::-1]  # x grows to the patient's right, which is shown on the left
        grey = plane[np.ix_(columns, lines[::-1])].T
        colours = np.repeat(grey[..., None], 3, axis=2).astype(float)
        half, arm, gap = pixels // 2, pixels // 12, 3
        for reach in (slice(half - arm, half - gap), slice(half + gap, half + arm)):
            colours[reach, half] = colours[half, reach] = (1.0, 0.45, 0.75)
        colours[:, -1] = 1.0
        shown.append(colours)
    return np.concatenate(shown, axis=1)
