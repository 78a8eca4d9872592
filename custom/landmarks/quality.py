"""How good is an aligner? The same figures for each, with intervals, and pictures to look at."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.image
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from custom.data.body import body_mask
from custom.data.pairs import window
from custom.data.phantom import read_canonical
from custom.data.phantom_correspondence import find_places
from custom.data.store import VolumeStore, sha256_of_array, volume_path, write_array, write_index
from custom.evaluation.rows import write_rows
from custom.landmarks.aligners import Aligner
from custom.landmarks.geometry import to_voxels, to_world
from custom.report import Page

Pair: TypeAlias = tuple[str, str]
Truth: TypeAlias = Callable[[str, NDArray[np.float64], str], NDArray[np.float64]]
Row: TypeAlias = dict[str, Any]

NEAR_MM = 10.0  # what counts as found (issue 3, and the DLT benchmark's CPM@10mm)
FAR_MM = 1.0  # a phantom's place whose canonical residual exceeds this lies outside of the scan
_DRAWS = 1000


class Figures(NamedTuple):
    """One kind of number from many pairs of scans: an array of values for each pair."""

    by_pair: list[NDArray[np.float64]]

    def row(self, aligner: str, measure: str, statistic: str, seed: int = 0) -> Row:
        """A statistic of all values, and its 95 % interval from pairs drawn with replacement."""
        compute = STATISTICS[statistic]
        known = [values[~np.isnan(values)] for values in self.by_pair]
        known = [values for values in known if len(values)]
        row = {"aligner": aligner, "measure": measure, "statistic": statistic, "pairs": len(known)}
        row |= {
            "points": sum(len(values) for values in known),
            "value": math.nan,
            "low": math.nan,
            "high": math.nan,
        }
        if known:
            row["value"] = float(compute(np.concatenate(known)))
        if len(known) > 1:
            rng = np.random.default_rng(seed)
            picks = rng.integers(len(known), size=(_DRAWS, len(known)))
            drawn = np.sort([compute(np.concatenate([known[i] for i in pick])) for pick in picks])
            row["low"], row["high"] = float(drawn[_DRAWS // 40]), float(drawn[-1 - _DRAWS // 40])
        return row


STATISTICS: dict[str, Callable[[NDArray[np.float64]], Any]] = {
    "mean": np.mean,
    "P90": lambda values: np.sort(values)[math.ceil(0.9 * (len(values) - 1))],  # copes with infinite errors
    "within 10 mm": lambda values: (values <= NEAR_MM).mean(),
}


class Asked(NamedTuple):
    """What an aligner answered to points of one pair.

    Attributes:
        points_mm: (N, 3), nan where there is no answer.
        scores: (N,).
        accepted: bool (N,), scored enough and answered.
    """

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]
    accepted: NDArray[np.bool_]


def ask(aligner: Aligner, pair: Pair, points_mm: NDArray[np.float64], seed: int = 0) -> Asked:
    """Match points (N, 3) of ``pair[0]`` in ``pair[1]``, one by one as pre-training does."""
    rng = np.random.default_rng(seed)
    matches = [aligner.align(pair[0], point, pair[1], rng) for point in points_mm]
    found = np.array([m.point_mm for m in matches], dtype=float).reshape(-1, 3)
    scores = np.array([m.score for m in matches], dtype=float)
    return Asked(found, scores, (scores >= aligner.threshold) & np.isfinite(found).all(axis=1))


def errors_mm(asked: Asked, truth_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances (N,); infinite where there was no answer at all, nan where there is no truth."""
    distance = np.linalg.norm(asked.points_mm - truth_mm, axis=1)
    unanswered = ~np.isfinite(asked.points_mm).all(axis=1)
    distance[unanswered] = np.inf
    distance[~np.isfinite(truth_mm).all(axis=1)] = np.nan
    return distance


# -- where the truth is known --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warp:
    """A smooth map of world mm without folds: an affine one and a few waves.

    Attributes:
        matrix: (4, 4).
        waves: per wave its direction (3,) in radians per mm, amplitude (3,) in mm and phase.
    """

    matrix: NDArray[np.float64]
    waves: tuple[tuple[NDArray[np.float64], NDArray[np.float64], float], ...]

    def __call__(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 3) to (..., 3)."""
        out = to_world(self.matrix, points_mm)
        for direction, amplitude, phase in self.waves:
            out = out + np.sin(points_mm @ direction + phase)[..., None] * amplitude
        return out


def draw_warp(
    rng: np.random.Generator,
    centre_mm: NDArray[np.float64],
    *,
    rotation_deg: float = 8.0,
    scale: float = 0.1,
    shift_mm: float = 20.0,
    bend_mm: float = 8.0,
    wavelength_mm: float = 120.0,
) -> Warp:
    """A random warp about a centre; its bend is lowered until it cannot fold.

    Args:
        rng: of the draw.
        centre_mm: (3,), stays about where it is.
        rotation_deg: largest about each axis.
        scale: largest change along each axis, as a share.
        shift_mm: largest along each axis.
        bend_mm: amplitude of each of four waves.
        wavelength_mm: shortest.
    """
    linear = np.diag(1 + rng.uniform(-scale, scale, 3))
    for axis in range(3):
        angle = np.deg2rad(rng.uniform(-rotation_deg, rotation_deg))
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        turn[[i, i, j, j], [i, j, i, j]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
        linear = turn @ linear
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centre_mm - linear @ centre_mm + rng.uniform(-shift_mm, shift_mm, 3)
    waves = []
    for _ in range(4):
        direction = _unit(rng.normal(size=3)) * 2 * np.pi / (wavelength_mm * rng.uniform(1, 2))
        waves.append((direction, _unit(rng.normal(size=3)) * bend_mm, float(rng.uniform(0, 2 * np.pi))))
    # |derivative of the bend| <= sum |direction| |amplitude|; below the least stretch of the affine map nothing folds
    steep = sum(float(np.linalg.norm(d) * np.linalg.norm(a)) for d, a, _ in waves)
    lower = min(1.0, 0.8 * float(np.linalg.svd(linear, compute_uv=False).min()) / steep)
    return Warp(matrix, tuple((d, a * lower, p) for d, a, p in waves))


WARPED = "~warped"  # ends the name of a deformed scan


def write_warped(
    store: VolumeStore, names: Sequence[str], out: str | Path, *, seed: int = 0
) -> tuple[VolumeStore, dict[str, Warp]]:
    """A store of scans and, beside each, the same scan deformed: ``name`` and ``name~warped``.

    Args:
        store: to take scans from.
        names: which.
        out: folder of the new store.
        seed: of the warps.

    Returns:
        The store, and per deformed scan the warp that takes its points to the original's.
    """
    out, records, warps = Path(out), {}, {}
    for index, name in enumerate(names):
        affine, shape = store.affine(name), store.shape(name)
        hu = store.read_crop(name, (0, 0, 0), shape)
        centre = to_world(affine, (np.array(shape) - 1) / 2)
        warp = draw_warp(np.random.default_rng([seed, index]), centre)
        deformed = deform(hu, affine, warp)
        for key, volume in ((name, hu), (name + WARPED, deformed)):
            body, step = body_mask(volume, tuple(store.spacing))
            write_array(volume_path(out, key, "hu"), volume)
            write_array(volume_path(out, key, "body"), body.astype(np.uint8))
            record = type(store.records[name])(**vars(store.records[name]))
            cells = np.argwhere(body)
            record.body_step = list(step)
            record.body_box = [[0, 0, 0], list(shape)]
            if len(cells):
                high = np.minimum((cells.max(axis=0) + 1) * step, shape)
                record.body_box = [(cells.min(axis=0) * step).tolist(), high.tolist()]
            record.name, record.patient, record.labels, record.label_sha256 = key, key, [], None
            record.voxels_sha256 = sha256_of_array(volume)
            records[key] = record
        warps[name + WARPED] = warp
    write_index(out, store.settings, records)
    return VolumeStore(out), warps


def deform(
    hu: NDArray[np.int16], affine: NDArray[np.float64], warp: Warp, fill: int = -1024
) -> NDArray[np.int16]:
    """The scan whose voxel at y shows what the given one has at ``warp(y)``."""
    out = np.empty_like(hu)
    for z in range(hu.shape[2]):  # a slice at a time bounds the memory of coordinates
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in hu.shape[:2]), [z], indexing="ij"), axis=-1)
        source = to_voxels(affine, warp(to_world(affine, grid)).reshape(-1, 3)).T
        values = ndimage.map_coordinates(hu, source, order=1, mode="constant", cval=fill, output=np.float32)
        out[:, :, z] = np.rint(values).reshape(hu.shape[:2])
    return out


def warp_truth(warps: Mapping[str, Warp], store: VolumeStore) -> Truth:
    """For pairs (``name~warped``, ``name``): where each point truly lies; nan outside the original's voxels."""

    def truth(scan_q: str, points_mm: NDArray[np.float64], scan_k: str) -> NDArray[np.float64]:
        found = warps[scan_q](points_mm)
        voxels = to_voxels(store.affine(scan_k), found)
        inside = np.all((voxels >= 0) & (voxels <= np.array(store.shape(scan_k)) - 1), axis=1)
        return np.where(inside[:, None], found, np.nan)

    return truth


def phantom_truth(store: VolumeStore, folder: str | Path) -> Truth:
    """The true correspondence of phantoms.

    Args:
        store: built from them.
        folder: that ``alice phantom`` wrote, with ``images`` (or ``imagesTr``) and ``canonical``.

    Raises:
        ValueError: when it is asked about a scan that has no files there.
    """
    folder = Path(folder)

    @functools.lru_cache(maxsize=6)
    def load(name: str) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        file = Path(store.records[name].source).name
        image = next(
            (p for part in ("images", "imagesTr") if (p := folder / part / file).is_file()),
            folder / "images" / file,
        )
        path = folder / "canonical" / f"{image.name.split('.')[0].removesuffix('_0000')}.npz"
        for needed in (image, path):
            if not needed.is_file():
                raise ValueError(
                    f"{needed}: missing, and without it {name} has no known correspondence. Give the folder that alice "
                    "phantom wrote (with --canonical)."
                )
        return read_canonical(path), np.asarray(nib.load(image).affine, dtype=float)

    def truth(scan_q: str, points_mm: NDArray[np.float64], scan_k: str) -> NDArray[np.float64]:
        (canonical_q, affine_q), (canonical_k, affine_k) = load(scan_q), load(scan_k)
        voxels = to_voxels(affine_q, points_mm).T
        wanted = [
            ndimage.map_coordinates(canonical_q[..., c], voxels, order=1, mode="nearest") for c in range(3)
        ]
        found = find_places(canonical_k, affine_k, np.stack(wanted, axis=-1))
        return np.where((found.residual_mm < FAR_MM)[:, None], found.points_mm, np.nan)

    return truth


def truth_error(
    aligner: Aligner, store: VolumeStore, truth: Truth, pairs: Sequence[Pair], num_points: int, seed: int = 0
) -> Figures:
    """Distance of answers from the truth in mm, for points of the body, accepted or not."""
    by_pair = []
    for pair, points in _points_of(store, pairs, num_points, seed):
        by_pair.append(errors_mm(ask(aligner, pair, points, seed), truth(pair[0], points, pair[1])))
    return Figures(by_pair)


def known_warp(
    aligner: Aligner, store: VolumeStore, warps: Mapping[str, Warp], num_points: int, seed: int = 0
) -> Figures:
    """Target registration error in mm between deformed scans and their originals (see :func:`write_warped`)."""
    pairs = [(name, name.removesuffix(WARPED)) for name in sorted(warps)]
    return truth_error(aligner, store, warp_truth(warps, store), pairs, num_points, seed)


def phantom_error(
    aligner: Aligner,
    store: VolumeStore,
    folder: str | Path,
    pairs: Sequence[Pair],
    num_points: int,
    seed: int = 0,
) -> Figures:
    """Distance in mm from the true correspondence of phantoms; places outside the key's scan do not count."""
    return truth_error(aligner, store, phantom_truth(store, folder), pairs, num_points, seed)


def landmark_error(
    aligner: Aligner, landmarks: Mapping[str, Mapping[str, NDArray]], pairs: Sequence[Pair]
) -> Figures:
    """Distance in mm between matched landmarks and the key's own, for the landmarks a pair shares."""
    by_pair = []
    for name_q, name_k in pairs:
        shared = sorted(set(landmarks.get(name_q, {})) & set(landmarks.get(name_k, {})))
        if shared:
            points, truth = (
                np.array([landmarks[name][mark] for mark in shared]) for name in (name_q, name_k)
            )
            by_pair.append(errors_mm(ask(aligner, (name_q, name_k), points), truth))
    return Figures(by_pair)


def read_landmarks(path: str | Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Landmarks by scan and name from a CSV with columns scan, landmark, x, y, z (RAS mm).

    Raises:
        ValueError: naming the line that cannot be read.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"scan", "landmark", "x", "y", "z"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"{path}: column(s) {', '.join(sorted(missing))} missing; needed are scan, landmark, x, y, z (RAS mm)."
            )
        for line in reader:
            try:
                point = np.array([float(line[axis]) for axis in "xyz"])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: no coordinates in mm ({error})."
                ) from error
            found.setdefault(line["scan"], {})[line["landmark"]] = point
    return found


# -- labels --------------------------------------------------------------------------------------------------


class LabelFigures(NamedTuple):
    """Per structure (label value): did its points land in it, how far off, how far apart are the centroids."""

    inside: dict[int, Figures]
    distance_mm: dict[int, Figures]
    centroid_mm: dict[int, Figures]


def label_transfer(
    aligner: Aligner,
    store: VolumeStore,
    pairs: Sequence[Pair],
    num_points: int = 20,
    seed: int = 0,
    labels: Sequence[int] | None = None,
) -> LabelFigures:
    """Match points of each structure; where do they land?

    Args:
        aligner: to judge.
        store: with labels.
        pairs: of labelled scans.
        num_points: per structure and pair.
        seed: of the points.
        labels: values to use; None for all that both scans of a pair have.

    Returns:
        Per structure: 1 where a point landed in the same structure, else 0; its distance to that structure in mm, 0
        inside; the distance between the centroid of what the points became and the key's centroid of the
        structure. Unanswered points count as missed and infinitely far, and take no part in centroids.
    """
    found: tuple[dict[int, list], dict[int, list], dict[int, list]] = ({}, {}, {})
    read = functools.lru_cache(maxsize=2)(
        lambda name: store.read_label_crop(name, (0, 0, 0), store.shape(name))
    )
    for index, (name_q, name_k) in enumerate(pairs):
        label_q, label_k = read(name_q), read(name_k)
        shared = sorted((set(np.unique(label_q)) & set(np.unique(label_k))) - {0})
        for value in shared if labels is None else [v for v in shared if v in labels]:
            rng = np.random.default_rng([seed, index, int(value)])
            inside_q = np.argwhere(label_q == value)
            points = to_world(store.affine(name_q), inside_q[rng.integers(len(inside_q), size=num_points)])
            asked = ask(aligner, (name_q, name_k), points, seed)
            off = distance_to_structure(label_k == value, store.affine(name_k), asked.points_mm)
            answered = np.isfinite(asked.points_mm).all(axis=1)
            centre_k = to_world(store.affine(name_k), np.argwhere(label_k == value).mean(axis=0))
            # the points' own centroid differs from the structure's by chance: take that off
            chance = points.mean(axis=0) - to_world(store.affine(name_q), inside_q.mean(axis=0))
            centroid = np.array([math.inf])
            if answered.any():
                centroid = np.array(
                    [np.linalg.norm(asked.points_mm[answered].mean(axis=0) - chance - centre_k)]
                )
            for table, values in zip(found, ((off == 0).astype(float), off, centroid), strict=True):
                table.setdefault(int(value), []).append(values)
    return LabelFigures(*({value: Figures(rows) for value, rows in table.items()} for table in found))


def structure_centroid_error(
    aligner: Aligner, store: VolumeStore, pairs: Sequence[Pair], num_points: int = 20, seed: int = 0
) -> dict[int, Figures]:
    """Per structure, how far the centroid of its matched points lies from the key's own, in mm."""
    return label_transfer(aligner, store, pairs, num_points, seed).centroid_mm


def distance_to_structure(
    mask: NDArray[np.bool_], affine: NDArray[np.float64], points_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How far points (N, 3) lie from a structure's nearest voxel centre in mm; 0 where their own voxel is in it.

    Infinite for points that are nan.
    """
    from scipy.spatial import cKDTree

    out = np.full(len(points_mm), np.inf)
    known = np.isfinite(points_mm).all(axis=1)
    voxels = np.argwhere(mask)
    if not known.any() or not len(voxels):
        return out
    out[known] = cKDTree(to_world(affine, voxels)).query(points_mm[known])[0]
    own = np.rint(to_voxels(affine, points_mm[known])).astype(int)
    valid = ((own >= 0) & (own < mask.shape)).all(axis=1)
    hit = np.zeros(len(own), bool)
    hit[valid] = mask[tuple(own[valid].T)]
    out[np.flatnonzero(known)[hit]] = 0.0
    return out


# -- the table -----------------------------------------------------------------------------------------------


def cycle_figures(
    aligner: Aligner, store: VolumeStore, pairs: Sequence[Pair], num_points: int, seed: int = 0
) -> tuple[Figures, Figures, Figures]:
    """For points of the body: forward-backward error in mm, score, and whether it was accepted (1 or 0)."""
    cycles, scores, accepted = [], [], []
    for pair, points in _points_of(store, pairs, num_points, seed):
        there = ask(aligner, pair, points, seed)
        cycle = np.full(len(points), np.inf)
        known = np.flatnonzero(np.isfinite(there.points_mm).all(axis=1))
        if len(known):
            back = ask(aligner, (pair[1], pair[0]), there.points_mm[known], seed + 1)
            cycle[known] = errors_mm(back, points[known])
        cycles.append(cycle)
        scores.append(there.scores)
        accepted.append(there.accepted.astype(float))
    return Figures(cycles), Figures(scores), Figures(accepted)


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
) -> list[Row]:
    """The same figures for every aligner.

    Args:
        aligners: by the name to show.
        store: the scans.
        pairs: (query, key) names.
        num_points: per pair, and per structure and pair.
        seed: of all draws; the points are the same for every aligner.
        truth: true correspondence, if there is one.
        landmarks: see :func:`read_landmarks`.
        label_names: of label values.

    Returns:
        Rows of aligner, measure, statistic, value, its 95 % interval (low, high: pairs drawn with replacement),
        pairs and points. What was not answered counts as an infinite error.
    """
    rows: list[Row] = []
    labelled = [pair for pair in pairs if all(store.has_label(name) for name in pair)]
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
                "landmark error, mm", landmark_error(aligner, landmarks, pairs), "mean", "P90", "within 10 mm"
            )
        if labelled:
            transfer = label_transfer(aligner, store, labelled, num_points, seed)
            for kind, by_value in zip(("in {}", "mm to {}", "centroid error, {}, mm"), transfer, strict=True):
                whole = [values for figures in by_value.values() for values in figures.by_pair]
                add(kind.format("same structure"), Figures(whole), "mean")
                for value, figures in by_value.items():
                    add(kind.format((label_names or {}).get(value, f"label {value}")), figures, "mean")
    return rows


def draw_pairs(
    store: VolumeStore, count: int, seed: int = 0, names: Sequence[str] | None = None
) -> list[Pair]:
    """Ordered pairs of different patients' scans, all of them or ``count`` at random.

    Raises:
        ValueError: if there are none.
    """
    chosen = list(names) if names is not None else store.names
    every = [(q, k) for q in chosen for k in chosen if store.patient(q) != store.patient(k)]
    if not every:
        raise ValueError(f"{store.path}: a pair is two patients' scans; there are none among {chosen[:5]}.")
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
) -> list[Row]:
    """Measure aligners and write ``table.csv``, ``index.html`` and a PNG per matched point.

    Args:
        store: the scans.
        aligners: by the name to show.
        out_dir: folder to write.
        pairs: how many to draw, or which.
        points: per pair, and per structure and pair.
        seed: of all draws.
        names: scans to draw from; None for all.
        truth: see :func:`alignment_table`; for phantoms, ``phantom_truth(store, folder)``.
        landmark_csv: see :func:`read_landmarks`.
        label_names: of label values.
        pictures: pairs in the gallery, each with one point and all aligners.

    Returns:
        The table's rows.

    Raises:
        ValueError: if there are no pairs, or the landmarks cannot be read or name no scan of the store.
    """
    out_dir = Path(out_dir)
    landmarks = read_landmarks(landmark_csv) if landmark_csv is not None else None
    if landmarks is not None and not set(landmarks) & set(store.names):
        raise ValueError(
            f"{landmark_csv}: none of its scans ({', '.join(list(landmarks)[:3])}) is in {store.path}."
        )
    chosen = draw_pairs(store, pairs, seed, names) if isinstance(pairs, int) else list(pairs)
    rows = alignment_table(
        aligners,
        store,
        chosen,
        num_points=points,
        seed=seed,
        truth=truth,
        landmarks=landmarks,
        label_names=label_names,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_rows(out_dir / "table.csv", rows)
    alignment_page(rows, aligners, store, chosen, out_dir, truth=truth, pictures=pictures, seed=seed).write(
        out_dir / "index.html"
    )
    return rows


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines with one column per aligner: value and interval."""
    names = list(dict.fromkeys(row["aligner"] for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        text = "–" if math.isnan(row["value"]) else f"{row['value']:.3g}"
        if not math.isnan(row["low"]):
            text += f" [{row['low']:.3g}, {row['high']:.3g}]"
        lines.setdefault((row["measure"], row["statistic"]), {})[row["aligner"]] = text
    return ["measure", *names], [
        [f"{measure}: {statistic}", *(cells.get(name, "–") for name in names)]
        for (measure, statistic), cells in lines.items()
    ]


# -- pictures ------------------------------------------------------------------------------------------------


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
    """The page of ``alice check-alignment``: the table, then matched points; writes the pictures as PNG, too."""
    page = Page(
        "Alignment", f"{len(pairs)} pairs of scans from {store.path}, the same points for every aligner."
    )
    headers, cells = table_cells(rows)
    page.section("Figures").table(
        headers,
        cells,
        "Value and 95 % interval (pairs drawn with replacement). A point without an answer counts as an "
        "infinite error. Acceptance is by each aligner's own score.",
    )
    page.section("Matched points").text(
        "Above the query, below the key: axial, coronal and sagittal planes through the point, patient's right on the "
        "left, anterior or superior on top. Crops of 160 mm."
    )
    step = max(1, len(pairs) // max(pictures, 1))
    for number, pair in enumerate(pairs[::step][:pictures]):
        _, points = next(iter(_points_of(store, [pair], 1, seed + 1000 + number)))
        images = []
        for name, aligner in aligners.items():
            asked = ask(aligner, pair, points, seed)
            back = (
                ask(aligner, (pair[1], pair[0]), asked.points_mm, seed + 1)
                if np.isfinite(asked.points_mm).all()
                else None
            )
            cycle = errors_mm(back, points)[0] if back is not None else math.inf
            caption = f"{name}: score {asked.scores[0]:.2f}{'' if asked.accepted[0] else ' (refused)'}, cycle error {cycle:.0f} mm"
            if truth is not None:
                caption += f", error {errors_mm(asked, truth(pair[0], points, pair[1]))[0]:.0f} mm"
            picture = pair_picture(store, pair, points[0], asked.points_mm[0])
            matplotlib.image.imsave(out_dir / f"{number:02d}_{name}.png", picture)
            images.append((picture, caption))
        place = ", ".join(f"{value:.0f}" for value in points[0])
        page.gallery(images, f"{pair[0]} at ({place}) mm, found in {pair[1]}")
    return page


def pair_picture(
    store: VolumeStore, pair: Pair, point_q: NDArray[np.float64], point_k: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Three planes of the query above three of the key, the point crossed, in [0, 1] (H, W, 3)."""
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


def _points_of(store: VolumeStore, pairs: Sequence[Pair], count: int, seed: int):
    """(pair, points of the query's body), the same for every aligner."""
    for index, pair in enumerate(pairs):
        voxels = store.body_voxels(pair[0])
        rng = np.random.default_rng([seed, index])
        yield pair, to_world(store.affine(pair[0]), voxels[rng.integers(len(voxels), size=count)])


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.linalg.norm(vector)
