"""Consensus of matches: a known map is recovered from matches of which many are wrong, and strangers are told apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_matching import structured, waves

from custom.landmarks.aligners.sam import MIN_SUPPORT
from custom.landmarks.embeddings.blocks import make_blocks
from custom.landmarks.embeddings.embedding_map import prepare
from custom.landmarks.matching.local_search import match_near
from custom.landmarks.matching.pair_map import (
    PairMap,
    draw_places,
    fit_pair_map,
    refine_pair_map,
    robust_affine,
)
from custom.landmarks.matching.points import match_points
from custom.landmarks.sam.scan_grid import STRIDES_ZYX, ScanEmbedding, cell_to_world, world_to_cell

SHAPE = (96, 80, 64)  # voxels of 2 mm along x, y, z
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])
MIDDLE_MM = (AFFINE @ np.array([*(np.array(SHAPE) / 2 - 0.5), 1.0]))[:3]
TURN = np.array([[0.98, -0.12, 0.0], [0.12, 0.98, 0.05], [0.0, -0.05, 1.06]])
SHIFT_MM = np.array([4.0, -3.0, 2.0])


def across(points_mm: np.ndarray) -> np.ndarray:
    """The known way from Q to K: turned, stretched, shifted and bent a little."""
    from_middle = points_mm - MIDDLE_MM
    bent = 3.0 * np.sin(from_middle[:, [2, 0, 1]] / 30.0)
    return from_middle @ TURN.T + SHIFT_MM + MIDDLE_MM + bent


def embedding(
    there: bool, noise: float = 0.0, seed: int = 3, shape: tuple[int, int, int] = SHAPE
) -> ScanEmbedding:
    """Vectors that are a function of the place in Q; of K, they lie where ``across`` takes them (by a few iterations)."""
    maps = []
    rng = np.random.default_rng(11 if there else 12)
    for level, stride in STRIDES_ZYX.items():
        grid = tuple(-(-n // s) for n, s in zip(shape[::-1], stride, strict=True))
        cells = np.indices(grid).reshape(3, -1).T
        points = cell_to_world(cells, AFFINE, level)
        places = points.copy()
        if there:
            for _ in range(20):
                places += points - across(places)
        vectors = waves(places, 16, [15.0, 30.0] if level == "fine" else [60.0, 90.0], seed=seed + len(level))
        vectors = vectors + noise * rng.standard_normal(vectors.shape) / 4
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        maps.append(torch.from_numpy(vectors.reshape(*grid, 16).astype(np.float32)).permute(3, 0, 1, 2))
    return ScanEmbedding(maps[0], maps[1], AFFINE, shape)


def some_points(count: int = 150) -> np.ndarray:
    rng = np.random.default_rng(5)
    return MIDDLE_MM + rng.uniform(-45, 45, (count, 3))


@pytest.fixture(scope="module")
def scans() -> tuple[ScanEmbedding, ScanEmbedding]:
    return embedding(False, 1.2), embedding(True, 1.2)


@pytest.fixture(scope="module")
def pair(scans) -> PairMap:
    return fit_pair_map(*(prepare(scan).blocks for scan in scans))


def test_an_affine_map_is_found_among_as_many_wrong_matches():
    rng = np.random.default_rng(0)
    points = rng.uniform(-100, 100, (300, 3))
    found = points @ TURN.T + SHIFT_MM + rng.normal(0, 2, points.shape)
    found[:150] = rng.uniform(-150, 150, (150, 3))
    matrix, middle_q, middle_k = robust_affine(points, found, np.ones(300))
    error = (points - middle_q) @ matrix.T + middle_k - points @ TURN.T - SHIFT_MM
    assert np.linalg.norm(error, axis=1).max() < 3.0
    plain = np.linalg.lstsq(np.c_[points, np.ones(300)], found, rcond=None)[0]
    assert np.linalg.norm(np.c_[points, np.ones(300)] @ plain - points @ TURN.T - SHIFT_MM, axis=1).max() > 20


def test_the_map_is_nearer_than_single_matches_where_many_are_wrong(scans, pair):
    points = some_points()
    truth = across(points)
    single = np.linalg.norm(
        match_points(points, *scans, method="exact", refine=True).points_mm - truth, axis=1
    )
    mapped = np.linalg.norm(pair(points) - truth, axis=1)
    assert pair.support > 0.5
    assert mapped.mean() < 0.7 * single.mean(), (mapped.mean(), single.mean())


def test_bending_is_followed_where_an_affine_map_cannot(scans, pair):
    points = some_points()
    straight = (points - pair.middle_q) @ pair.matrix.T + pair.middle_k
    truth = across(points)
    assert (
        np.linalg.norm(pair(points) - truth, axis=1).mean() < np.linalg.norm(straight - truth, axis=1).mean()
    )


def test_places_found_near_the_map_correct_it(pair):
    scans = embedding(False, 0.3), embedding(True, 0.3)
    pair = pair._replace(middle_k=pair.middle_k + np.array([5.0, -4.0, 3.0]))
    points = some_points()
    truth = across(points)
    refined = refine_pair_map(pair, *scans)
    before, after = (np.linalg.norm(map_(points) - truth, axis=1).mean() for map_ in (pair, refined))
    assert after < 0.5 * before, (after, before)
    assert refined.support == pair.support
    some = points[:40]
    few = fit_pair_map(*(prepare(scan).blocks for scan in scans), anchors=128)
    few = few._replace(middle_k=few.middle_k + np.array([5.0, -4.0, 3.0]))
    about = [refine_pair_map(few, *scans, about_mm=point) for point in some]
    assert max(len(map_.anchors_mm) for map_ in about) <= 128 + 64
    here = np.linalg.norm(
        [m(p[None])[0] - across(p[None])[0] for m, p in zip(about, some, strict=True)], axis=1
    )
    assert here.mean() < 1.2 * np.linalg.norm(refined(some) - truth[:40], axis=1).mean()
    again = refine_pair_map(few, *scans, about_mm=some[0])
    np.testing.assert_array_equal(again(points), about[0](points))


def test_what_lies_off_the_other_scan_stays_off_it():
    tall = (96, 80, 160)
    query, key = embedding(False, 0.5, shape=tall), embedding(True, 0.5, shape=tall)
    cut = ScanEmbedding(key.fine[:, :40], key.coarse[:, :20], AFFINE, (96, 80, 80))
    pair = fit_pair_map(prepare(query).blocks, prepare(cut).blocks)
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [MIDDLE_MM[:2] + rng.uniform(-45, 45, (600, 2)), rng.uniform(20, 300, (600, 1))], axis=1
    )
    truth = across(points)
    above = truth[:, 2] - 159.0  # mm over the cut scan's last slice
    for refined in (refine_pair_map(pair, query, cut), None):
        if refined is None:  # about one point
            far = np.flatnonzero((above > 20) & (above < 80))[:40]
            found = [refine_pair_map(pair, query, cut, about_mm=p)(p[None])[0] for p in points[far]]
            scores = match_near(points[far], np.array(found), query, cut).scores
        else:
            far = (above > 20) & (above < 80)
            scores = match_near(points[far], refined(points[far]), query, cut).scores
            inner = (above > -20) & (above < 0)
            errors = [np.linalg.norm(m(points[inner]) - truth[inner], axis=1).mean() for m in (pair, refined)]
            assert errors[1] < 1.1 * errors[0], errors
        assert (scores > -1).mean() < 0.15


def test_places_that_correct_a_map_lie_in_the_body():
    scan = structured(tilt=0.1)
    body = np.zeros((21, 24, 30), bool)
    body[3:, 5:20, 4:9] = True  # ends within 8 mm cells, and at the last of an odd number of slices
    map_q = prepare(replace(scan, body=body))
    for about in (None, cell_to_world(np.array([[12, 12, 6]]), scan.affine, "fine")[0]):
        places = draw_places(map_q, about)
        assert len(places) == 240 if about is None else 5 < len(places) <= 64
        cells = np.rint(world_to_cell(places, scan.affine, "fine")).astype(int)
        off = np.linalg.norm(
            np.argwhere(body)[:, None] - world_to_cell(places, scan.affine, "fine"), axis=-1
        ).min(0)
        assert off.max() < 1.0
        assert (cells < body.shape).all()


def test_a_map_that_leads_nowhere_stays_as_it_was(scans, pair):
    nowhere = pair._replace(middle_k=pair.middle_k + 1e4)
    assert refine_pair_map(nowhere, *scans) is nowhere
    assert refine_pair_map(pair, *scans, about_mm=np.full(3, 1e4)) is pair


def test_strangers_do_not_agree(scans):
    stranger = embedding(True, 1.2, seed=77)
    blocks = prepare(scans[0]).blocks, prepare(stranger).blocks
    assert fit_pair_map(*blocks).support < MIN_SUPPORT
    assert fit_pair_map(*blocks, anchors=128).support < MIN_SUPPORT


def test_blocks_compare_as_whole_similarities(scans):
    cells = prepare(scans[0]).blocks
    np.testing.assert_allclose(np.linalg.norm(cells.vectors, axis=1), 1.0, atol=1e-5)
    assert len(cells.points_mm) == 8 * 10 * 12
    corner = np.linalg.norm(cells.points_mm - (AFFINE @ np.array([3.5, 3.5, 3.5, 1.0]))[:3], axis=1).min()
    assert corner < 1e-6


@pytest.mark.parametrize("kept", ["all", "body", "one"])
def test_every_second_block_comes_first(kept):
    used = np.zeros((10, 12, 14), bool)
    used[{"all": np.s_[:], "body": np.s_[2:8, 4:, 2:12], "one": np.s_[2:4, :2, :2]}[kept]] = True
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(10, 6, 7, 4))
    cells = make_blocks(
        rng.normal(size=(used.sum(), 4)), used, coarse, (20, 24, 28), np.diag([2.0, 2.0, 2.0, 1.0])
    )
    assert len(cells.points_mm) / 2 - 0.5 <= cells.alternate <= len(cells.points_mm) / 2 + 0.5
    first, rest = np.split(cells.points_mm, [cells.alternate])
    apart = np.linalg.norm(first[:, None] - first, axis=-1) + 1e9 * np.eye(len(first))
    assert apart.min() > 16 + 1e-6, "no two of them share a face"
    if kept != "one":
        assert np.linalg.norm(rest[:, None] - first, axis=-1).min(axis=1).max() < 16 + 1e-6
