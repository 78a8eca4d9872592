"""Searching near an expected place: right, as its formula says, and refused where there is nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from test_matching import structured
from test_pair_map import AFFINE, MIDDLE_MM, across, embedding, some_points

from custom.landmarks.embeddings.embedding_map import prepare, query_cells
from custom.landmarks.embeddings.file import save_embedding
from custom.landmarks.embeddings.lattice import pool
from custom.landmarks.embeddings.stored import StoredEmbedding
from custom.landmarks.matching.local_search import (
    FINE_SHARE,
    NEAR_MM,
    ROUGH_NEAR_MM,
    SHARPNESS,
    match_near,
    match_roughly_near,
)
from custom.landmarks.sam.scan_grid import ScanEmbedding, cell_to_world, world_to_cell


@pytest.fixture(scope="module")
def scans() -> tuple[ScanEmbedding, ScanEmbedding]:
    return embedding(False, 0.3), embedding(True, 0.3)


@pytest.mark.parametrize("way", ["fine", "rough"])
def test_the_answer_is_nearer_than_what_was_expected(scans, way):
    points = some_points()
    truth = across(points)
    expected = truth + np.array([5.0, -4.0, 3.0])
    if way == "fine":
        found, scores = match_near(points, expected, *scans)
        assert (scores > 0.5).all()
    else:
        found = match_roughly_near(points, expected, *scans)
    assert (
        np.linalg.norm(found - truth, axis=1).mean() < 0.6 * np.linalg.norm(expected - truth, axis=1).mean()
    )


def coarse_at(scan: ScanEmbedding, fine_cells: np.ndarray) -> np.ndarray:
    """Coarse vectors (N, C) at places given in fine cells (N, 3), by SciPy's interpolation."""
    fine, coarse = (np.array(level.shape[1:]) for level in (scan.fine, scan.coarse))
    at = (np.asarray(fine_cells) + 0.5) * coarse / fine - 0.5
    vectors = np.stack(
        [ndimage.map_coordinates(c, at.T, order=1, mode="nearest") for c in scan.coarse.numpy()], -1
    )
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def odd_scans() -> tuple[ScanEmbedding, ScanEmbedding, np.ndarray, np.ndarray]:
    """21 cells along z, of which the last is half an 8 mm cell, tilted, and a body that ends within 8 mm cells."""
    query, key = structured(tilt=0.1), structured((4.0, -3.0, 2.0), tilt=0.1)
    body = np.zeros(tuple(key.fine.shape[1:]), bool)
    body[1:, 3:21, 2:27] = True
    points = cell_to_world(np.argwhere(body)[::700] + np.array([0.2, -0.1, 0.3]), query.affine, "fine")
    return query, replace(key, body=body), points, points + np.array([5.0, -2.0, 4.0])


def even_scans() -> tuple[ScanEmbedding, ScanEmbedding, np.ndarray, np.ndarray]:
    points = some_points(12)
    return embedding(False, 0.3), embedding(True, 0.3), points, across(points) + 4.0


@pytest.mark.parametrize("made", [even_scans, odd_scans])
def test_rough_answers_are_what_the_formula_says(made):
    query, key, points, expected = made()
    fine, used = pool(key.fine.permute(1, 2, 3, 0).numpy(), key.body)
    cells = np.stack(np.meshgrid(*map(np.arange, fine.shape[:3]), indexing="ij"), axis=-1).reshape(-1, 3)
    fine, used = fine.reshape(len(cells), -1), used.reshape(-1)
    middles = np.minimum(2 * cells + 0.5, np.array(key.fine.shape[1:]) - 1)
    places, coarse = cell_to_world(middles, key.affine, "fine"), coarse_at(key, middles)
    at, inside = query_cells(points, prepare(query))
    assert inside.all()
    wanted = []
    for point, cell, near in zip(points, at, expected, strict=True):
        similar = FINE_SHARE * fine @ query.fine[:, cell[0], cell[1], cell[2]].numpy()
        similar += (1 - FINE_SHARE) * coarse @ coarse_at(query, cell[None])[0]
        likely = similar / SHARPNESS - ((places - near) ** 2).sum(-1) / (2 * ROUGH_NEAR_MM**2)
        middle = np.rint((world_to_cell(near, key.affine, "fine") - 0.5) / 2)
        share = np.exp(likely - likely.max()) * (((cells - middle) ** 2).sum(-1) <= 9) * used
        wanted.append(
            share @ places / share.sum() + point - cell_to_world(cell[None], query.affine, "fine")[0]
        )
    np.testing.assert_allclose(match_roughly_near(points, expected, query, key), wanted, atol=0.02)


@pytest.mark.parametrize("made", [even_scans, odd_scans])
def test_a_score_is_the_mean_of_fine_and_coarse_similarity_at_the_likeliest_cell(made):
    query, key, points, expected = made()
    cells = np.indices(tuple(key.fine.shape[1:])).reshape(3, -1).T
    cells = cells if key.body is None else cells[key.body[tuple(cells.T)]]
    vectors, places = key.fine.numpy()[(slice(None), *cells.T)].T, cell_to_world(cells, key.affine, "fine")
    context = coarse_at(key, cells)
    at, _ = query_cells(points, prepare(query))
    scores = match_near(points, expected, query, key).scores
    for score, cell, near in zip(scores, at, expected, strict=True):
        fine = vectors @ query.fine[:, cell[0], cell[1], cell[2]].numpy()
        coarse = context @ coarse_at(query, cell[None])[0]
        away = ((places - near) ** 2).sum(-1)
        likely = (FINE_SHARE * fine + (1 - FINE_SHARE) * coarse) / SHARPNESS - away / (2 * NEAR_MM**2)
        top = likely.argmax()
        assert away[top] < 12**2, "well within reach"
        assert abs(score - (fine[top] + coarse[top]) / 2) < 1e-3


def test_many_points_at_once_are_as_each_alone_and_as_from_files(scans, tmp_path: Path):
    points = some_points(300)  # more than are in memory at a time
    expected = across(points) + 4.0
    together = match_roughly_near(points, expected, *scans)
    alone = np.concatenate(
        [match_roughly_near(p, e, *scans) for p, e in zip(points[:20], expected, strict=False)]
    )
    np.testing.assert_allclose(together[:20], alone, atol=1e-3)
    stored = [
        StoredEmbedding(save_embedding(tmp_path / f"{i}.sam", scan, "w", "s", fine_bits=8).path)
        for i, scan in enumerate(scans)
    ]
    assert np.abs(match_roughly_near(points, expected, *stored) - together).max() < 0.5


def test_points_off_either_scan_are_refused(scans):
    inside, outside = MIDDLE_MM[None], np.full((1, 3), 1e4)
    off_q = match_near(outside, inside, *scans)
    assert off_q.scores[0] == -1 and np.isnan(off_q.points_mm).all()
    assert np.isnan(match_roughly_near(outside, inside, *scans)).all()
    off_k = match_near(inside, outside, *scans)
    assert off_k.scores[0] == -1
    np.testing.assert_array_equal(off_k.points_mm, outside)  # where it is expected, not to be used
    assert np.isnan(match_roughly_near(inside, outside, *scans)).all()
    assert np.isnan(match_roughly_near(inside, np.full((1, 3), np.nan), *scans)).all()
    just_off = (AFFINE @ np.array([-2.5, 40.0, 30.0, 1.0]))[None, :3]
    assert match_near(inside, just_off, *scans).scores[0] > -1
    assert np.isfinite(match_roughly_near(inside, just_off, *scans)).all()


def test_cells_off_the_body_are_no_answer(scans):
    query, key = scans
    points = some_points(40)
    expected = across(points)
    cells, _ = query_cells(expected, prepare(key))
    border = 2 * (int(np.median(cells[:, 2])) // 2)
    body = np.zeros(tuple(key.fine.shape[1:]), bool)
    body[:, :, border:] = True
    half = ScanEmbedding(key.fine, key.coarse, key.affine, key.shape, body)
    for found in (
        match_near(points, expected, query, half).points_mm,
        match_roughly_near(points, expected, query, half),
    ):
        off_middle = points - cell_to_world(query_cells(points, prepare(query))[0], AFFINE, "fine")
        kept = np.isfinite(found).all(axis=1) & (found != expected).any(axis=1)
        assert kept.sum() > 10
        assert world_to_cell((found - off_middle)[kept], AFFINE, "fine")[:, 2].min() > border - 1e-6


def test_a_point_is_found_exactly_in_its_own_scan():
    points, scan = some_points(40), embedding(False, 1.2)
    matches = match_near(points, points, scan, scan)
    assert np.linalg.norm(matches.points_mm - points, axis=1).max() < 2.0
