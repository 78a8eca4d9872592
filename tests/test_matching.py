"""Matching: the same answer as the authors' arithmetic, there and back, and no answer where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from custom.landmarks.embeddings import embedding_map as searchable
from custom.landmarks.embeddings.embedding_map import coarse_vectors, inside_grid, prepare
from custom.landmarks.matching.points import cycle_error, match_points
from custom.landmarks.matching.search import upsample
from custom.landmarks.sam.scan_grid import ScanEmbedding, cell_to_world

SHAPE = (59, 47, 43)  # voxels x, y, z of the 2 mm grid; 43 slices leave the last without a cell


def waves(points: np.ndarray, dim: int, lengths_mm: list[float], seed: int) -> np.ndarray:
    """A smooth function of place (..., dim), of length 1."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(3, dim)) / rng.choice(lengths_mm, dim)
    values = np.cos(points @ directions + rng.uniform(0, 2 * np.pi, dim))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def structured(
    shift_mm=(0.0, 0.0, 0.0), noise: float = 0.0, seed: int = 0, tilt: float = 0.0, dim: int = 32
) -> ScanEmbedding:
    """Embeddings of an anatomy that lies ``shift_mm`` from where it lies without; the grid itself stays."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    affine[:3, 3] = [60.0, 40.0, -35.0]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    grids = {"fine": (21, 24, 30), "coarse": (11, 3, 4)}
    rng = np.random.default_rng(seed + 1)
    maps = []
    for level, lengths in (("fine", [8.0, 12.0, 20.0, 40.0]), ("coarse", [30.0, 50.0])):
        cells = np.indices(grids[level]).reshape(3, -1).T
        places = cell_to_world(cells, affine, level) - np.array(shift_mm)
        vectors = waves(places, dim, lengths, seed + (level == "coarse"))
        vectors = vectors + noise / np.sqrt(dim) * rng.normal(size=vectors.shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        maps.append(
            torch.from_numpy(vectors.astype(np.float32).reshape(*grids[level], dim))
            .permute(3, 0, 1, 2)
            .contiguous()
        )
    return ScanEmbedding(maps[0], maps[1], affine, SHAPE)


def points_inside(count: int, margin: float = 4.0, seed: int = 0) -> np.ndarray:
    embedding = structured()
    rng = np.random.default_rng(seed)
    voxels = rng.uniform(margin, np.array(SHAPE) - 1 - margin, (count, 3))
    return voxels @ embedding.affine[:3, :3].T + embedding.affine[:3, 3]


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_exact_search_finds_what_the_authors_arithmetic_finds(noise):
    scan_q, scan_k = structured(noise=noise), structured((7.0, -5.0, 3.0), noise=noise, seed=0)
    points = points_inside(25)
    official = match_points(points, scan_q, scan_k, method="exhaustive")
    exact = match_points(points, scan_q, scan_k, method="exact")
    np.testing.assert_array_equal(exact.points_mm, official.points_mm)
    np.testing.assert_allclose(exact.scores, official.scores, atol=2e-6)


def test_the_exhaustive_reference_is_two_upsampled_volumes_and_their_mean():
    scan_q, scan_k = structured(), structured((6.0, 0.0, -4.0), noise=0.3)
    cell = (9, 14, 11)
    point = scan_q.cell_to_world(cell)
    coarse_q, coarse_k = (upsample(e.coarse[None], e.fine.shape[1:])[0] for e in (scan_q, scan_k))
    total = torch.einsum("c,czyx->zyx", scan_q.fine[(slice(None), *cell)], scan_k.fine)
    total = (total + torch.einsum("c,czyx->zyx", coarse_q[(slice(None), *cell)], coarse_k)) / 2
    best = np.unravel_index(int(total.argmax()), total.shape)
    found = match_points(point, scan_q, scan_k, method="exhaustive")
    np.testing.assert_allclose(found.points_mm[0], scan_k.cell_to_world(best))
    assert found.scores[0] == pytest.approx(float(total.max()), abs=1e-6)


def test_interpolated_similarity_equals_similarity_of_interpolated_vectors():
    embedding = structured(noise=0.4)
    target = prepare(embedding)
    volume = upsample(embedding.coarse[None], embedding.fine.shape[1:])[0]
    vector = waves(np.ones(3), 32, [5.0], seed=9)
    direct = torch.einsum("c,czyx->zyx", torch.from_numpy(vector), volume).numpy().reshape(-1)
    interpolated = target.fine_lattice.coarse_similarity(target.coarse @ vector)
    np.testing.assert_allclose(interpolated, direct, atol=2e-6)
    cells = np.array([[0, 0, 0], [20, 23, 29], [7, 11, 13]])
    np.testing.assert_allclose(
        coarse_vectors(target, cells), volume.numpy()[(slice(None), *cells.T)].T, atol=2e-6
    )


@pytest.mark.parametrize("method", ["exact", "fast", "exhaustive"])
def test_a_shift_by_whole_cells_is_found(method):
    shift = np.array([8.0, -12.0, 4.0])
    cells = np.array([[10, 12, 14], [8, 10, 9], [12, 15, 20]])
    scan_q, scan_k = structured(), structured(shift)
    points = scan_q.cell_to_world(cells)
    found = match_points(points, scan_q, scan_k, method=method)
    np.testing.assert_allclose(found.points_mm, points + shift, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_a_point_matched_to_its_own_scan_stays_within_half_a_cell(method):
    points = points_inside(30)
    embedding = structured(noise=0.3, tilt=0.2)
    points = points[inside_grid(points, prepare(embedding))]
    plain = match_points(points, embedding, embedding, method=method)
    back = (plain.points_mm - points) @ np.linalg.inv(embedding.affine[:3, :3]).T
    assert np.abs(back).max() <= 1.0 + 1e-6  # voxels along each axis: half a cell
    np.testing.assert_allclose(plain.scores, 1.0, atol=1e-5)
    refined = match_points(points, embedding, embedding, method=method, refine=True)
    assert np.linalg.norm(refined.points_mm - points, axis=1).mean() < 0.7


def test_refinement_recovers_a_shift_of_a_fraction_of_a_cell():
    shift = np.array([5.0, -3.0, 6.5])
    scan_q, scan_k = structured(), structured(shift)
    points = points_inside(40, margin=14)
    plain, refined = (
        match_points(points, scan_q, scan_k, refine=r).points_mm - points - shift for r in (False, True)
    )
    assert np.linalg.norm(refined, axis=1).mean() < 1.0 < 1.5 < np.linalg.norm(plain, axis=1).mean()


def test_fast_search_rarely_differs_from_exact():
    scan_q, scan_k = structured(noise=0.25), structured((7.0, -5.0, 3.0), noise=0.25, seed=0)
    points = points_inside(60)
    exact, fast = (match_points(points, scan_q, scan_k, method=m).points_mm for m in ("exact", "fast"))
    assert (np.linalg.norm(exact - fast, axis=1) < 0.1).mean() > 0.9


def test_many_points_at_once_are_the_same_points_one_by_one():
    scan_q, scan_k = structured(noise=0.5), structured((3.0, 2.0, 1.0), noise=0.5)
    points = points_inside(9)
    points = np.concatenate([points, points[:2] + 0.01])
    together = match_points(points, scan_q, scan_k, refine=True)
    for i, point in enumerate(points):
        alone = match_points(point, scan_q, scan_k, refine=True)
        np.testing.assert_allclose(alone.points_mm[0], together.points_mm[i], atol=1e-4)


def test_a_point_outside_the_scan_has_no_match():
    embedding = structured()
    outside = [
        embedding.cell_to_world((-2, 5, 5)),
        embedding.cell_to_world((5, 5, 40)),
        np.full(3, np.nan),
        np.full(3, np.inf),
    ]
    for method in ("exact", "fast", "exhaustive"):
        points_mm, scores = match_points([*outside, points_inside(1)[0]], embedding, embedding, method=method)
        assert np.isnan(points_mm[:4]).all()
        assert (scores[:4] == -1).all()
        assert np.isfinite(points_mm[4]).all()


def test_the_last_odd_slice_belongs_to_the_last_cell():
    embedding = structured()
    point = embedding.affine[:3, :3] @ [20, 20, 42] + embedding.affine[:3, 3]
    found = match_points(point, embedding, embedding)
    assert found.scores[0] == pytest.approx(1.0, abs=1e-5)


def test_a_matched_pair_comes_back_and_noise_does_not():
    points = points_inside(12, margin=12)
    scan_q, scan_k = structured(), structured((8.0, -4.0, 4.0))
    assert cycle_error(points, scan_q, scan_k, refine=True).max() < 2.0
    other = structured(seed=5)  # another anatomy altogether
    assert np.median(cycle_error(points, scan_q, other)) > 10.0
    assert np.isinf(cycle_error(np.full((1, 3), 1e4), scan_q, scan_k)).all()


def test_arguments_that_cannot_be_meant_are_refused():
    embedding = structured()
    with pytest.raises(ValueError, match="exact, fast, exhaustive"):
        match_points(points_inside(1), embedding, embedding, method="quick")
    with pytest.raises(ValueError, match="\\(N, 3\\)"):
        match_points(np.zeros((3, 2)), embedding, embedding)
    narrow = ScanEmbedding(embedding.fine[:16], embedding.coarse[:16], embedding.affine, embedding.shape)
    with pytest.raises(ValueError, match="32 and 16"):
        match_points(points_inside(1), embedding, narrow)


def test_what_was_prepared_goes_with_its_embedding():
    embedding = structured()
    before = len(searchable._prepared)
    prepare(embedding)
    assert prepare(embedding) is prepare(embedding)
    assert len(searchable._prepared) == before + 1
    del embedding
    assert len(searchable._prepared) == before
