"""A point of one scan found in another by its embedding: exactly, fast, or as the authors do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from custom.landmarks.sam import ScanEmbedding, Triple, cell_to_world, world_to_cell

Method: TypeAlias = Literal["exact", "fast", "exhaustive"]
METHODS = ("exact", "fast", "exhaustive")
Array: TypeAlias = NDArray[Any]

REFUSED = -1.0  # the score of a point that cannot be matched; a cosine so low does not occur otherwise
_WINDOW = 8  # fine cells a side around the pooled winner (spec, performance.md section 3)
_BATCH = 4096  # cells whose fine similarity is computed at a time (ours)
_SLACK = 1e-5  # for rounding: a unit vector's product with itself may exceed 1 by a little


class Matches(NamedTuple):
    """Points found, one row for each point asked.

    Attributes:
        points_mm: (N, 3) RAS; nan where the point asked for lies outside its scan's grid or body.
        scores: (N,) similarity in [-1, 1]; -1 where ``points_mm`` is nan.
    """

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]


class StructuralMatches(NamedTuple):
    """:class:`Matches`, and on how many fixed points each rests (0: the nearest neighbour stands in)."""

    points_mm: NDArray[np.float64]
    scores: NDArray[np.float64]
    support: NDArray[np.int64]


@dataclass(frozen=True)
class Lattice:
    """The cells of an embedding at one resolution, as a search sees them.

    Attributes:
        grid: cells along z, y, x.
        weights: per axis (cells, coarse cells), what each coarse cell contributes to a cell: trilinear
            interpolation with ``align_corners=False``.
        inverse_norm: (cells,) one over the length of the interpolated coarse vector.
        outside: bool (cells,), True off the body; None if all cells count.
        dot: fine similarities of some cells (flat indices, or None for all) to a vector (C,).
    """

    grid: Triple
    weights: tuple[Array, Array, Array]
    inverse_norm: Array
    outside: Array | None
    dot: Callable[[Array | None, Array], Array]

    def coarse_similarity(self, similarity: Array) -> Array:
        """Similarities on the coarse grid (z, y, x), interpolated and re-normalised: (cells,), -3 off the body.

        Interpolation commutes with the dot product, so one number per cell is interpolated, not C.
        """
        along_z, along_y, along_x = self.weights
        wide = along_y @ (similarity @ along_x.T)  # (cz, y, x)
        total = (along_z @ wide.reshape(len(wide), -1)).reshape(-1)
        total *= self.inverse_norm
        if self.outside is not None:
            total[self.outside] = -3.0
        return total


class EmbeddingMap(Protocol):
    """What is needed to search a scan; ``StoredEmbedding`` answers it, a ``ScanEmbedding`` is wrapped."""

    affine: NDArray[np.float64]
    shape: Triple

    @property
    def grid(self) -> Triple: ...
    @property
    def coarse(self) -> Array: ...  # (z, y, x, C) float32
    @property
    def body(self) -> Array | None: ...  # bool (z, y, x) of fine cells
    @property
    def fine_lattice(self) -> Lattice: ...
    @property
    def pooled_lattice(self) -> Lattice: ...
    @property
    def pooled_rows(self) -> Array: ...  # (cells of the pooled lattice in the body, C) float32, of length 1
    def fine_vectors(self, cells_zyx: Array) -> Array: ...
    def decode(self) -> ScanEmbedding: ...


Searchable: TypeAlias = "ScanEmbedding | EmbeddingMap"


class DenseMap:
    """A ``ScanEmbedding`` prepared for searching: channels last, with norms and a pooled copy. Float32, CPU."""

    body: Array | None = None

    def __init__(self, embedding: ScanEmbedding) -> None:
        self.affine, self.shape = np.asarray(embedding.affine), embedding.shape
        fine, coarse = embedding.fine.detach().float().cpu(), embedding.coarse.detach().float().cpu()
        self._fine, self._coarse = fine, coarse
        self.grid: Triple = (int(fine.shape[1]), int(fine.shape[2]), int(fine.shape[3]))
        self.coarse: Array = np.ascontiguousarray(coarse.permute(1, 2, 3, 0).numpy())
        rows = np.ascontiguousarray(fine.permute(1, 2, 3, 0).numpy()).reshape(-1, fine.shape[0])
        self._rows = rows
        pooled, _ = pool(rows.reshape(*self.grid, -1), None)
        self.pooled_rows: Array = pooled.reshape(-1, pooled.shape[-1])
        self.fine_lattice = make_lattice(self.coarse, self.grid, 1, None, dot_of(rows))
        self.pooled_lattice = make_lattice(self.coarse, self.grid, 2, None, dot_of(self.pooled_rows))

    def fine_vectors(self, cells_zyx: Array) -> Array:
        """(N, C) of cells (N, 3)."""
        return self._rows[flat_index(cells_zyx, self.grid)]

    def decode(self) -> ScanEmbedding:
        """As it was given."""
        return ScanEmbedding(self._fine, self._coarse, self.affine, self.shape)


def match_points(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    method: Method = "exact",
    refine: bool = False,
) -> Matches:
    """Find points of scan Q in scan K (spec 2.4).

    A cell's similarity is the mean of the fine and the coarse cosine, the coarse map interpolated to the fine
    grid and re-normalised. The query is the fine cell that holds the point, the answer the centre of the most
    similar cell of K, so that without ``refine`` even a perfect match is off by 1.9 mm on average.

    Args:
        points_mm: (N, 3) or (3,) world mm (RAS).
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search. Searching a ``ScanEmbedding`` again and again is quick: what
            the first search prepares lives as long as the embedding does.
        method: ``exact`` visits only cells whose coarse similarity leaves them a chance; ``fast`` searches the
            map pooled to 8 mm and then 8 x 8 x 8 fine cells around the winner; ``exhaustive`` is the authors'
            arithmetic over the whole volume, the reference for the other two.
        refine: move the answer by the vertex of a parabola through the neighbouring cells' similarities, and
            by what the query point lies off its own cell's centre.

    Returns:
        Points and scores. A point that lies outside Q's grid or body, or that is not finite, gets nan and
        score -1: there is nothing to compare, so there is no answer.

    Raises:
        ValueError: for an unknown method, points of another shape, or embeddings of different length.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"Points must have shape (N, 3), got {np.shape(points_mm)}.")
    map_q, map_k = prepare(embedding_q), prepare(embedding_k)
    if map_q.coarse.shape[-1] != map_k.coarse.shape[-1]:
        raise ValueError(
            f"Embeddings of {map_q.coarse.shape[-1]} and {map_k.coarse.shape[-1]} numbers do not compare: "
            "embed both scans with the same network."
        )

    cells, inside = query_cells(points, map_q)
    found_mm, scores = np.full(points.shape, np.nan), np.full(len(points), REFUSED)
    if not inside.any():
        return Matches(found_mm, scores)
    asked, back = np.unique(cells[inside], axis=0, return_inverse=True)  # points of one cell share an answer
    fine, coarse = map_q.fine_vectors(asked), coarse_vectors(map_q, asked)
    positions, best = np.empty((len(asked), 3)), np.empty(len(asked))
    search = _Search(map_k, method)
    coarse_similarities = coarse @ map_k.coarse.reshape(-1, map_k.coarse.shape[-1]).T
    for i in range(len(asked)):
        index, best[i] = search(fine[i], coarse[i], coarse_similarities[i].reshape(map_k.coarse.shape[:3]))
        positions[i] = search.position(index, refine)
    answers = cell_to_world(positions, map_k.affine, "fine")[back.reshape(-1)]
    if refine:
        answers = answers + points[inside] - cell_to_world(cells[inside], map_q.affine, "fine")
    found_mm[inside], scores[inside] = answers, best[back.reshape(-1)]
    return Matches(found_mm, scores)


def cycle_error(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    matches: Matches | None = None,
    method: Method = "exact",
    refine: bool = False,
) -> NDArray[np.float64]:
    """How far from itself a point comes back when it is matched to K and from there to Q.

    Args:
        points_mm: (N, 3) world mm.
        embedding_q: of the scan that holds the points.
        embedding_k: of the other.
        matches: the way there, if it is known.
        method: see :func:`match_points`.
        refine: see :func:`match_points`.

    Returns:
        (N,) mm; infinite where there is no way there or back.
    """
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    there = matches or match_points(points, embedding_q, embedding_k, method=method, refine=refine)
    back = match_points(there.points_mm, embedding_k, embedding_q, method=method, refine=refine)
    return np.nan_to_num(np.linalg.norm(back.points_mm - points, axis=1), nan=np.inf)


def structural_match(
    points_mm: ArrayLike,
    embedding_q: Searchable,
    embedding_k: Searchable,
    *,
    reach: int = 2,
    min_score: float = 0.8,
    max_distance_mm: float = 200.0,
    half_steps: int = 4,
    method: Method = "fast",
) -> StructuralMatches:
    """Find points by the neighbours that find each other (SAM++, fixed-point inference; spec 2.5).

    The (2 reach + 1)^3 cells around the query wander from Q to K and back; the pairs they settle on, if near
    enough and similar enough, carry a robust linear map that takes the query across. All in world mm.

    Edge cases are ours: in directions that the pairs do not span (all in one slice, say) lengths are kept; fewer
    than 4 pairs give their (robust) mean displacement; none at all gives the plain match of :func:`match_points`. An
    answer outside K's grid is refused.

    Args:
        points_mm: (N, 3) world mm.
        embedding_q: of the scan that holds the points.
        embedding_k: of the scan to search.
        reach: cells to each side of the query; 2 is the demo's, 1 the evaluation's.
        min_score: pairs that score less are dropped (the authors' demo: 0.8).
        max_distance_mm: pairs that wandered farther from the query are dropped (the authors: 200).
        half_steps: matches from one scan to the other, even.
        method: of the single matches.

    Returns:
        Points (nan where refused), the mean score of the pairs, and how many pairs there were.

    Raises:
        ValueError: if ``half_steps`` is odd or below 2, or ``reach`` is negative.
    """
    if half_steps < 2 or half_steps % 2 or reach < 0:
        raise ValueError(
            f"half_steps must be even and positive, reach 0 or more; got {half_steps} and {reach}."
        )
    points = np.atleast_2d(np.asarray(points_mm, dtype=np.float64))
    map_q, map_k = prepare(embedding_q), prepare(embedding_k)
    plain = match_points(points, map_q, map_k, method=method)
    found, scores, support = plain.points_mm.copy(), plain.scores.copy(), np.zeros(len(points), np.int64)
    cells, inside = query_cells(points, map_q)
    for i in np.flatnonzero(inside):
        around = np.indices((2 * reach + 1,) * 3).reshape(3, -1).T - reach + cells[i]
        around = around[((around >= 0) & (around < map_q.grid)).all(axis=1)]
        queries = cell_to_world(around, map_q.affine, "fine")
        for _ in range(half_steps // 2):
            keys, score = match_points(queries, map_q, map_k, method=method)
            queries, _ = match_points(keys, map_k, map_q, method=method)
        keys, score = match_points(queries, map_q, map_k, method=method)
        near = np.linalg.norm(queries - points[i], axis=1) <= max_distance_mm  # False for nan
        keep = np.flatnonzero(near & (score > min_score))
        keep = keep[np.unique(keys[keep].round(3), axis=0, return_index=True)[1]]
        if not len(keep):
            continue
        answer = carry_across(points[i], queries[keep], keys[keep])
        good = bool(inside_grid(answer[None], map_k)[0])
        found[i] = answer if good else np.nan
        scores[i] = score[keep].mean() if good else REFUSED
        support[i] = len(keep)
    return StructuralMatches(found, scores, support)


def carry_across(point: Array, queries: Array, keys: Array, *, huber_mm: float = 4.0) -> Array:
    """Take a point across by a robust linear map fitted to pairs, all in mm.

    Iteratively re-weighted least squares (Huber). What the pairs do not determine stays as it is: with fewer than
    4 pairs only the displacement counts; where they lie in a plane or on a line, lengths off it are kept.

    Args:
        point: (3,).
        queries: (n, 3), n >= 1.
        keys: (n, 3), where they went.
        huber_mm: residuals beyond this count linearly (ours: a fine cell).

    Returns:
        (3,).
    """
    weight = np.ones(len(queries))
    residual = keys - queries  # of the identity: what a map has to add to it
    change = np.zeros((3, 3))
    middle = shift = np.zeros(3)
    for _ in range(10):
        share = (weight / weight.sum())[:, None]
        middle, shift = (share * queries).sum(axis=0), (share * residual).sum(axis=0)
        if len(queries) >= 4:
            root = np.sqrt(weight)[:, None]
            # spreads below a tenth of the largest determine no slope (ours): with cells of 4 mm they are noise
            slope = np.linalg.pinv(root * (queries - middle), rcond=0.1)
            change = (slope @ (root * (residual - shift))).T
        off = np.linalg.norm(residual - shift - (queries - middle) @ change.T, axis=1)
        weight = np.minimum(1.0, huber_mm / np.maximum(off, 1e-9))
    return point + shift + change @ (point - middle)


# -- the search ----------------------------------------------------------------------------------------------


class _Search:
    """Find one query vector after another in one scan, and remember what refining needs."""

    def __init__(self, target: EmbeddingMap, method: Method) -> None:
        self.target, self.method = target, method
        self.official: Callable[[Array, Array], Array] | None = None
        if method == "exhaustive":
            self.official = OfficialSimilarity(target)

    def __call__(self, fine: Array, coarse: Array, coarse_similarity: Array) -> tuple[int, float]:
        """Flat index of the best fine cell, and its similarity."""
        self.vector, self.coarse_similarity = fine, coarse_similarity
        if self.official is not None:
            total = self.official(fine, coarse)
            index = int(total.argmax())
            return index, float(total[index])
        index, best = self._fast()
        return (index, best) if self.method == "fast" else self._exact(index, best)

    def position(self, index: int, refine: bool) -> Array:
        """The cell (z, y, x), with fractions if ``refine``."""
        grid = self.target.grid
        cell = np.array(np.unravel_index(index, grid))
        if not refine:
            return cell.astype(float)
        steps = np.concatenate([np.zeros((1, 3), int), np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        cells = cell + steps
        valid = ((cells >= 0) & (cells < grid)).all(axis=1)
        if self.target.body is not None:
            valid[valid] = self.target.body[tuple(cells[valid].T)]
        totals = np.full(7, np.nan)
        totals[valid] = self._totals(flat_index(cells[valid], grid))
        here, above, below = totals[0], totals[1:4], totals[4:]
        bend = above - 2 * here + below
        with np.errstate(invalid="ignore", divide="ignore"):
            vertex = np.where(bend < -1e-9, 0.5 * (below - above) / bend, 0.0)
        return cell + np.nan_to_num(vertex).clip(-0.5, 0.5)

    def _fast(self) -> tuple[int, float]:
        lattice = self.target.pooled_lattice
        index, _ = branch_and_bound(
            lattice, self.vector, lattice.coarse_similarity(self.coarse_similarity), -1.0
        )
        centre = 2 * np.array(np.unravel_index(index, lattice.grid))
        start = np.clip(centre - _WINDOW // 2 + 1, 0, np.maximum(np.array(self.target.grid) - _WINDOW, 0))
        stop = np.minimum(start + _WINDOW, self.target.grid)
        axes = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        if self.target.body is not None:
            cells = cells[self.target.body[tuple(cells.T)]]
        flat = flat_index(cells, self.target.grid)
        totals = self._totals(flat)
        top = int(totals.argmax())
        return int(flat[top]), float(totals[top])

    def _exact(self, index: int, best: float) -> tuple[int, float]:
        lattice = self.target.fine_lattice
        return branch_and_bound(
            lattice, self.vector, lattice.coarse_similarity(self.coarse_similarity), best, index
        )

    def _totals(self, flat: Array) -> Array:
        return similarities(self.target, flat, self.vector, self.coarse_similarity)


def similarities(target: EmbeddingMap, flat: Array, vector: Array, coarse_similarity: Array) -> Array:
    """Similarities of some fine cells, the coarse part interpolated at these cells alone.

    Args:
        target: the scan searched.
        flat: (n,) flat indices of fine cells in the body.
        vector: (C,) fine vector asked for.
        coarse_similarity: (z, y, x) of its coarse vector to all coarse cells.
    """
    cells = np.unravel_index(flat, target.grid)
    lattice = target.fine_lattice
    coarse = interpolate_at(coarse_similarity, lattice.weights, cells) * lattice.inverse_norm[flat]
    return 0.5 * (lattice.dot(flat, vector) + coarse)


def branch_and_bound(
    lattice: Lattice, vector: Array, coarse: Array, best: float, index: int = -1
) -> tuple[int, float]:
    """The cell of largest total similarity, looking only at cells that may have it.

    A fine cosine is 1 at most, so a cell's total is at most (1 + coarse) / 2.

    Args:
        lattice: where to search.
        vector: (C,) of the query.
        coarse: (cells,) coarse similarity.
        best: a total that some cell, ``index``, is known to reach; -1 if none is known.
        index: that cell.

    Returns:
        Flat index and total. Of equal totals the first cell's counts, as in ``argmax``.
    """
    if index < 0:  # start where the coarse map is best: the bound is tight at once
        likely = np.flatnonzero(coarse >= coarse.max() - 0.02)
        likely = likely[: _BATCH // 8]
        totals = 0.5 * (lattice.dot(likely, vector) + coarse[likely])
        top = int(totals.argmax())
        index, best = int(likely[top]), float(totals[top])
    open_cells = np.flatnonzero(coarse >= 2 * best - 1 - _SLACK)
    if 3 * len(open_cells) > len(coarse):  # the bound is loose: one pass in order of memory is quicker
        totals = 0.5 * (lattice.dot(None, vector) + coarse)
        top = int(totals.argmax())
        return top, float(totals[top])
    if len(open_cells) > _BATCH:
        open_cells = open_cells[np.argsort(-coarse[open_cells], kind="stable")]
    for start in range(0, len(open_cells), _BATCH):
        some = open_cells[start : start + _BATCH]
        if 0.5 * (1 + coarse[some[0]]) < best - _SLACK and start:
            break  # in falling order: nobody after this one can win
        totals = 0.5 * (lattice.dot(some, vector) + coarse[some])
        highest = float(totals.max())
        first = int(some[totals == highest].min())
        if highest > best or (highest == best and first < index):
            index, best = first, highest
    return index, best


class OfficialSimilarity:
    """The authors' arithmetic: both coarse volumes at the fine size, two 1 x 1 x 1 convolutions, their mean."""

    def __init__(self, target: EmbeddingMap) -> None:
        embedding = target.decode()
        self.fine, self.coarse = embedding.fine.float().cpu()[None], embedding.coarse.float().cpu()[None]
        self.body = target.body

    def __call__(self, fine: Array, coarse: Array) -> Array:
        """(cells,) similarities to a query's vectors (C,), -1 off the body."""
        upsampled = upsample(self.coarse, self.fine.shape[2:])
        similarity = F.conv3d(self.fine, torch.from_numpy(np.array(fine)).view(1, -1, 1, 1, 1))
        similarity += F.conv3d(upsampled, torch.from_numpy(np.array(coarse)).view(1, -1, 1, 1, 1))
        total = (similarity / 2).view(-1).numpy()
        if self.body is not None:
            total[~self.body.reshape(-1)] = REFUSED
        return total


def upsample(coarse: Tensor, size: Any) -> Tensor:
    """The coarse map (B, C, z, y, x) on the fine grid, of length 1 again."""
    return F.normalize(F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=False), dim=1)


# -- pieces --------------------------------------------------------------------------------------------------

_prepared: dict[int, tuple[weakref.ref[ScanEmbedding], DenseMap]] = {}


def prepare(embedding: Searchable) -> EmbeddingMap:
    """A scan ready to be searched; what is made for a ``ScanEmbedding`` is kept while that lives."""
    if not isinstance(embedding, ScanEmbedding):
        return embedding
    key = id(embedding)
    if key not in _prepared:
        reference = weakref.ref(embedding, lambda _: _prepared.pop(key, None) and None)
        _prepared[key] = (reference, DenseMap(embedding))
    return _prepared[key][1]


def inside_grid(points_mm: Array, target: EmbeddingMap) -> Array:
    """Bool (N,): does a point lie in a voxel of the scan's grid? False for what is not finite."""
    finite: Array = np.all(np.isfinite(points_mm), axis=1)
    inverse = np.linalg.inv(target.affine)
    voxels = np.where(finite[:, None], points_mm, 0.0) @ inverse[:3, :3].T + inverse[:3, 3]
    inside = (voxels >= -0.5) & (voxels <= np.array(target.shape) - 0.5)
    return finite & np.all(inside, axis=1)


def query_cells(points_mm: Array, source: EmbeddingMap) -> tuple[Array, Array]:
    """Fine cells (N, 3) that hold the points, and which points lie inside of grid and body."""
    inside = inside_grid(points_mm, source)
    cells = np.floor(world_to_cell(np.where(inside[:, None], points_mm, 0.0), source.affine, "fine") + 0.5)
    # an odd number of slices leaves the last one without a cell
    cells = np.clip(cells, 0, np.array(source.grid) - 1).astype(int)
    if source.body is not None:
        inside = np.logical_and(inside, source.body[tuple(cells.T)])
    return cells, inside


def coarse_vectors(source: EmbeddingMap, cells_zyx: Array) -> Array:
    """Coarse vectors at fine cells (N, C), from their eight corners and of length 1 again."""
    axes = [axis_weights(np.arange(n), n, m) for n, m in zip(source.grid, source.coarse.shape, strict=False)]
    vectors = interpolate_at(source.coarse, (axes[0], axes[1], axes[2]), tuple(cells_zyx.T))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def interpolate_at(values: Array, weights: tuple[Array, Array, Array], cells: tuple[Array, ...]) -> Array:
    """Interpolate (z, y, x, ...) at cells given as three index arrays (N,): (N, ...), from eight corners."""
    corners = []
    for weight, index in zip(weights, cells, strict=True):
        low = np.minimum((weight > 0).argmax(axis=1), max(weight.shape[1] - 2, 0))[index]
        high = np.minimum(low + 1, weight.shape[1] - 1)
        part = weight[index, low]
        corners.append(((low, part), (high, 1 - part)))
    shape = (-1,) + (1,) * (values.ndim - 3)
    total: Any = 0.0
    for z, weight_z in corners[0]:
        for y, weight_y in corners[1]:
            for x, weight_x in corners[2]:
                total = total + values[z, y, x] * (weight_z * weight_y * weight_x).reshape(shape)
    return total


def make_lattice(
    coarse: Array,
    fine_grid: Triple,
    pooling: int,
    outside: Array | None,
    dot: Callable,
    norm: Array | None = None,
) -> Lattice:
    """The cells of the fine grid (``pooling`` 1), or of cubes of ``pooling`` fine cells a side.

    Args:
        coarse: (z, y, x, C).
        fine_grid: fine cells along z, y, x.
        pooling: fine cells a side.
        outside: see :class:`Lattice`.
        dot: see :class:`Lattice`.
        norm: (cells,) lengths of the interpolated coarse vectors, if they are known.
    """
    weights = lattice_weights(fine_grid, coarse.shape[:3], pooling)
    grid: Triple = (len(weights[0]), len(weights[1]), len(weights[2]))
    norm = coarse_norm(coarse, weights) if norm is None else norm
    return Lattice(grid, weights, 1 / np.maximum(norm, 1e-6).astype(np.float32), outside, dot)


def lattice_weights(
    fine_grid: Triple, coarse_grid: tuple[int, ...], pooling: int
) -> tuple[Array, Array, Array]:
    """Interpolation weights per axis, at the middle of each cube of fine cells."""
    axes = []
    for n, m in zip(fine_grid, coarse_grid, strict=True):
        first = np.arange(0, n, pooling)
        middle = 0.5 * (first + np.minimum(first + pooling, n) - 1)
        axes.append(axis_weights(middle, n, m))
    return axes[0], axes[1], axes[2]


def axis_weights(positions: Array, size: int, coarse_size: int) -> Array:
    """(positions, coarse cells) float32: linear interpolation as torch does it with ``align_corners=False``."""
    source = np.clip((np.asarray(positions) + 0.5) * (coarse_size / size) - 0.5, 0, coarse_size - 1)
    low = np.minimum(source.astype(int), max(coarse_size - 2, 0))
    weights = np.zeros((len(source), coarse_size), np.float32)
    rows = np.arange(len(source))
    weights[rows, low] = 1 - (source - low)
    weights[rows, np.minimum(low + 1, coarse_size - 1)] += source - low
    return weights


def coarse_norm(coarse: Array, weights: tuple[Array, Array, Array]) -> Array:
    """Lengths (cells,) of the coarse vectors interpolated to a lattice; a few slices at a time."""
    along_z, along_y, along_x = weights
    wide = np.einsum("zyxc,Yy,Xx->zYXc", coarse, along_y, along_x, optimize=True).astype(np.float32)
    flat = wide.reshape(len(wide), -1)
    slices = [(row @ flat).reshape(-1, coarse.shape[-1]) for row in along_z]
    return np.concatenate([np.sqrt(np.einsum("nc,nc->n", s, s)) for s in slices])


def pool(fine: Array, body: Array | None) -> tuple[Array, Array]:
    """Means of 2 x 2 x 2 fine vectors, of length 1 again, and which of these cells hold any body.

    Args:
        fine: (z, y, x, C).
        body: bool (z, y, x), cells to use; None for all.

    Returns:
        (ceil z/2, ceil y/2, ceil x/2, C) float32, and bool of the same grid.
    """
    grid = fine.shape[:3]
    size = tuple((n + 1) // 2 for n in grid)
    inside = np.ones(grid, bool) if body is None else body
    total, used = np.zeros((*size, fine.shape[-1]), np.float32), np.zeros(size, bool)
    for corner in np.ndindex(2, 2, 2):
        part = tuple(slice(first, None, 2) for first in corner)
        place = tuple(slice(0, n) for n in inside[part].shape)
        total[place] += np.where(inside[part][..., None], fine[part], 0)
        used[place] |= inside[part]
    total /= np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
    return total, used


def dot_of(rows: Array) -> Callable[[Array | None, Array], Array]:
    """``Lattice.dot`` of vectors in memory (cells, C)."""
    return lambda index, vector: rows @ vector if index is None else rows[index] @ vector


def flat_index(cells_zyx: Array, grid: Triple) -> Array:
    """Flat indices of cells (N, 3)."""
    return (cells_zyx[:, 0] * grid[1] + cells_zyx[:, 1]) * grid[2] + cells_zyx[:, 2]
