"""Aligners: one interface, sam's refusals, a calibrated threshold, and affine registration."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from test_matching import waves

from custom.cli import landmarks as cli
from custom.data.store.volume_store import VolumeStore
from custom.engine.loader import sample_loader
from custom.landmarks.aligners.affine import register_affine
from custom.landmarks.aligners.make import make_aligner
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.aligners.sam import SamAligner, calibrate_threshold
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.landmarks.embeddings.embed import embed_store
from custom.landmarks.embeddings.file import EmbeddingError
from custom.landmarks.embeddings.folder import EmbeddingFolder
from custom.landmarks.matching.pair_map import fit_pair_map
from custom.landmarks.matching.points import Matches
from custom.landmarks.sam.network import SAM, SAMMaps
from custom.landmarks.sam.scan_grid import CENTRES_ZYX, STRIDES_ZYX
from custom.landmarks.sam.weights import save_sam
from custom.methods.pairs import AlignedPair
from custom.space import to_world

WEIGHTS = "a" * 64


class CentredWaves:
    """Stands in for SAM: equal places, counted from the volume's middle, have equal embeddings. Quick."""

    settings: dict = {}  # noqa: RUF012

    def embed(self, x: torch.Tensor, *, slab: int) -> SAMMaps:
        size = np.array(x.shape[2:])
        maps = []
        for level, lengths in (("fine", [8.0, 12.0, 20.0, 40.0]), ("coarse", [30.0, 60.0])):
            stride, centre = np.array(STRIDES_ZYX[level]), np.array(CENTRES_ZYX[level])
            grid = size // (2, 1, 1) * (2, 1, 1) // stride if level == "fine" else -(-size // stride)
            grid[1:] = -(-size[1:] // stride[1:])
            voxels = np.indices(tuple(grid)).reshape(3, -1).T * stride + centre
            vectors = waves(2.0 * (voxels - (size - 1) / 2), 16, lengths, seed=int(stride[1]))
            maps.append(torch.from_numpy(vectors.reshape(*grid, 16)).permute(3, 0, 1, 2)[None])
        return SAMMaps(*maps)


@pytest.fixture(scope="module")
def embeddings(store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingFolder:
    folder = tmp_path_factory.mktemp("embeddings")
    embed_store(CentredWaves(), WEIGHTS, store, folder, progress=False)
    return EmbeddingFolder(folder)


def body_point(store: VolumeStore, name: str, index: int = 700) -> np.ndarray:
    return to_world(store.affine(name), store.body_voxels(name)[index])


class TwoBodies:
    """Stands in for a store: two scans that differ in voxel size, in origin and in their body's box."""

    def affine(self, name: str) -> np.ndarray:
        affine = np.diag([2.0, 3.0, 5.0, 1.0] if name == "q" else [1.0, 2.0, 4.0, 1.0])
        affine[:3, 3] = [0, 0, 0] if name == "q" else [-100, 50, 7]
        return affine

    def body_box_mm(self, name: str) -> np.ndarray:
        box = [[10, 20, 4], [30, 60, 24]] if name == "q" else [[0, 7, 3], [50, 27, 43]]
        return np.array(box, dtype=float)


def test_coordinate_finds_the_same_share_of_the_other_bodys_box():
    point_mm = np.array([15 * 2.0, 40 * 3.0, 19 * 5.0])  # 1/4, 1/2 and 3/4 of the way through the body of Q
    match = CoordinateAligner(TwoBodies()).align("q", point_mm, "k", np.random.default_rng(0))
    voxel = np.array([12.5, 17.0, 33.0])  # the same shares of the box of K
    np.testing.assert_allclose(match.point_mm, voxel * [1, 2, 4] + [-100, 50, 7])


def test_sam_finds_a_point_in_its_own_scan(store, embeddings):
    aligner: Aligner = SamAligner(store, embeddings)
    point = body_point(store, "case0")
    match = aligner.align("case0", point, "case0", np.random.default_rng(0))
    assert match.score > 0.99
    assert np.linalg.norm(match.point_mm - point) < 2.0


def test_sam_refuses_a_point_off_the_scan(store, embeddings):
    match = SamAligner(store, embeddings).align("case0", np.full(3, 1e4), "case1", np.random.default_rng(0))
    assert match.score == -1
    assert match.score < SamAligner(store, embeddings, threshold=-0.99).threshold
    assert np.isnan(match.point_mm).all()


def test_maps_are_corrected_unless_they_are_refused(store, embeddings, monkeypatch):
    aligner = SamAligner(store, embeddings, -0.5)
    first = fit_pair_map(aligner.blocks("case0"), aligner.blocks("case1"))
    assert len(aligner.pair_map("case0", "case1").anchors_mm) > len(first.anchors_mm)
    strict = SamAligner(store, embeddings, -0.5, min_support=1.01)
    assert len(strict.pair_map("case0", "case1").anchors_mm) == len(first.anchors_mm)
    rng, points = np.random.default_rng(0), [body_point(store, "case0", i) for i in range(100, 2000, 200)]
    corrected = [aligner.align("case0", p, "case1", rng).point_mm for p in points]
    monkeypatch.setattr("custom.landmarks.aligners.sam.refine_pair_map", lambda pair, *_, **__: pair)
    assert not np.allclose(corrected, [aligner.align("case0", p, "case1", rng).point_mm for p in points])


def test_no_map_is_fitted_for_a_point_off_the_body(store, embeddings, monkeypatch):
    monkeypatch.setattr("custom.landmarks.aligners.sam.fit_pair_map", None)
    for point in (np.full(3, np.nan), np.full(3, 1e4)):
        match = SamAligner(store, embeddings).align("case0", point, "case1", np.random.default_rng(0))
        assert match.score == -1
        assert np.isnan(match.point_mm).all()


def test_a_match_that_does_not_come_back_is_refused(store, embeddings):
    rng = np.random.default_rng(0)
    points = [body_point(store, "case0", i) for i in range(100, 4000, 250)]
    free = SamAligner(store, embeddings, -0.5, consensus=False)
    strict = SamAligner(store, embeddings, -0.5, max_cycle_mm=3.0, consensus=False)
    scores = [[a.align("case0", p, "case1", rng).score for p in points] for a in (free, strict)]
    changed = np.array(scores[0]) != np.array(scores[1])
    assert changed.any()
    assert (np.array(scores[1])[changed] == -1).all()
    own = np.array([strict.align("case0", p, "case0", rng).score for p in points])
    assert (own > 0.9).mean() > 0.8, own


def test_the_way_back_is_measured_from_the_point_asked_for(store, embeddings, monkeypatch):
    aligner = SamAligner(store, embeddings, consensus=False)
    # the other scan lies 100 mm away, and the way back misses the start by 2 mm
    moves = {"case0": [100.0, 0.0, 0.0], "case1": [-100.0, 2.0, 0.0]}
    monkeypatch.setattr(
        aligner, "match", lambda q, point, k: Matches(point[None] + moves[q], np.array([0.9]))
    )
    for allowed_mm, score in ((1.9, -1.0), (2.1, 0.9)):
        aligner.max_cycle_mm = allowed_mm
        match = aligner.align("case0", np.array([5.0, 6.0, 7.0]), "case1", np.random.default_rng(0))
        assert match.score == score
        np.testing.assert_allclose(match.point_mm, [105.0, 6.0, 7.0])


def test_the_threshold_comes_from_the_argument_the_embeddings_or_the_paper(store, embeddings):
    assert SamAligner(store, embeddings).threshold == 0.7
    assert SamAligner(store, embeddings, 0.4).threshold == 0.4
    embeddings.threshold = 0.6
    try:
        assert SamAligner(store, embeddings).threshold == 0.6
        assert (
            SamAligner(store, embeddings, consensus=False).threshold == 0.7
        )  # 0.6 was not calibrated for it
    finally:
        embeddings.threshold = None
    with pytest.raises(ValueError, match="above -1"):
        SamAligner(store, embeddings, -1.0)


def test_asking_for_sam_without_embeddings_names_the_way_out(store, tmp_path):
    with pytest.raises(ValueError, match="alice embed"):
        make_aligner("sam", store)
    with pytest.raises(EmbeddingError, match="alice embed"):
        make_aligner("sam", store, tmp_path)
    with pytest.raises(ValueError, match="coordinate, random, affine, sam"):
        make_aligner("label", store)


def test_aligners_by_name(store, embeddings):
    for name in ("coordinate", "random", "affine"):
        assert make_aligner(name, store).name == name
    for name in ("sam", "sam_nearest"):
        aligner = make_aligner(name, store, embeddings.path, threshold=0.2)
        assert (aligner.name, aligner.threshold) == (name, 0.2)


def test_workers_draw_the_same_pairs_as_the_main_process(store, embeddings):
    data = AlignedPair(store, SamAligner(store, embeddings, 0.0), (32, 32, 16), seed=3, max_redraws=20)
    alone, shared = (list(sample_loader(data, 2, 3, workers=w)) for w in (0, 2))
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a["point_k"], b["point_k"])
        torch.testing.assert_close(a["crop_k"], b["crop_k"])


def test_a_threshold_is_calibrated_where_matches_come_back(store, embeddings):
    found = calibrate_threshold(
        SamAligner(store, embeddings), store, store.names, num_pairs=6, num_points=15, share=0.2
    )
    rows = {row["score"]: row for row in found.rows}
    assert found.threshold is not None
    assert rows[found.threshold]["within"] >= 0.2
    assert rows[found.threshold]["points"] >= 20
    # no lower than matches were seen, however good all of them are
    above = max((row["points"] for row in found.rows if row["score"] > found.threshold), default=0)
    assert rows[found.threshold]["points"] >= above + 20
    accepted = [row["accepted"] for row in found.rows]
    assert accepted == sorted(accepted)
    impossible = calibrate_threshold(
        SamAligner(store, embeddings), store, store.names, num_pairs=2, num_points=5, share=1.01
    )
    assert impossible.threshold is None
    with pytest.raises(ValueError, match="two patients' scans"):
        calibrate_threshold(SamAligner(store, embeddings), store, ["case0"])


def test_calibrate_keeps_the_score_with_embeddings_and_weights(store, embeddings, tmp_path, capsys):
    folder = tmp_path / "embeddings"
    shutil.copytree(embeddings.path, folder)
    cli.calibrate(str(store.path), str(folder), "case", pairs=6, points=15, share=0.2)
    kept = EmbeddingFolder(folder).threshold
    assert kept is not None and f"threshold {kept}" in capsys.readouterr().out
    assert SamAligner(store, folder).threshold == kept
    with pytest.raises(ValueError, match="nothing was kept"):
        cli.calibrate(str(store.path), str(folder), "case", pairs=2, points=5, share=1.01)
    assert EmbeddingFolder(folder).threshold == kept
    with pytest.raises(ValueError, match="'nobody' is in the names of 0 scans.*case0, case1, case2"):
        cli.calibrate(str(store.path), str(folder), "nobody")
    torch.manual_seed(0)
    save_sam(tmp_path / "other.safetensors", SAM(4, 8), {})
    with pytest.raises(ValueError, match="other weights"):
        cli.calibrate(str(store.path), str(folder), "case", weights=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("pair", [("case0", "case1"), ("case2", "case4"), ("case5", "case3")])
def test_one_point_and_many_are_refused_by_the_same_support(store, embeddings, pair):
    query, key = pair
    aligner = SamAligner(store, embeddings, -0.5)
    share = aligner.pair_map(query, key).support
    assert aligner.few_map(query, key).support == share == aligner.support(query, key)
    few = fit_pair_map(aligner.blocks(query), aligner.blocks(key), anchors=128).support
    between = (
        (few + share) / 2 if few != share else share + 1e-6
    )  # where 128 matches alone would decide otherwise
    strict = SamAligner(store, embeddings, -0.5, min_support=between)
    point = body_point(store, query)
    one = strict.align(query, point, key, np.random.default_rng(0)).score
    assert (one == -1) == (strict.match(query, point[None], key).scores[0] == -1) == (share < between)


def test_scans_without_common_anatomy_are_refused_whatever_their_scores(store, embeddings):
    aligner = SamAligner(store, embeddings, -0.5, min_support=1.01)
    matches = aligner.match("case0", body_point(store, "case0")[None], "case1")
    assert matches.scores[0] == -1
    for strict, refused in ((1.01, True), (0.0, False)):
        nearest = SamAligner(store, embeddings, -0.5, consensus=False, min_support=strict)
        match = nearest.align("case0", body_point(store, "case0"), "case1", np.random.default_rng(0))
        assert (match.score == -1) == refused and np.isfinite(match.point_mm).all()


@pytest.mark.slow  # ITK takes most of a minute to load on a busy machine
def test_registration_finds_a_known_affine_map():
    pytest.importorskip("itk")
    affine = np.diag([6.0, 7.0, 8.0, 1.0])
    true = np.array([[1.05, 0.04, 0, -16], [-0.04, 0.97, 0, 13], [0, 0.03, 1.0, -9], [0, 0, 0, 1]])

    def blobs(points):  # three organs in a body, no symmetry
        places = (
            (90, 90, 90, 55, 0.5),
            (70, 110, 110, 18, 0.3),
            (120, 80, 70, 15, 0.4),
            (90, 60, 120, 14, -0.3),
        )
        return sum(
            h / (1 + np.exp((np.linalg.norm(points - [x, y, z], axis=-1) - r) / 4))
            for x, y, z, r, h in places
        )

    grid = to_world(affine, np.stack(np.meshgrid(*map(np.arange, (31, 27, 23)), indexing="ij"), -1))
    middle = np.array([90.0, 90.0, 90.0])
    found = register_affine(blobs(to_world(true, grid)), affine, blobs(grid), affine, middle, middle)
    points = grid[5:-5:3, 5:-5:3, 5:-5:3].reshape(-1, 3)
    before, after = (
        np.linalg.norm(to_world(m, points) - to_world(true, points), axis=1).mean()
        for m in (np.eye(4), found)
    )
    assert after < 3.0 < 6.0 < before


@pytest.mark.slow
def test_affine_maps_are_kept_and_undo_each_other(store):
    pytest.importorskip("itk")
    aligner = make_aligner("affine", store)
    there, back = aligner.transform("case0", "case1"), aligner.transform("case1", "case0")
    np.testing.assert_allclose(there @ back, np.eye(4), atol=1e-9)
    assert aligner.transform("case0", "case1") is there
    match = aligner.align("case0", body_point(store, "case0"), "case1", np.random.default_rng(0))
    np.testing.assert_allclose(match.point_mm, to_world(there, body_point(store, "case0")))
    assert pickle.loads(pickle.dumps(aligner)).name == "affine"
