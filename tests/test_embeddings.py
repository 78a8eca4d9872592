"""Embeddings on disk: small, nearly what they were, whole or refused, and safe in workers."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_aligners import CentredWaves
from test_matching import points_inside, structured

from custom.cli.landmarks import embed
from custom.data.store.volume_store import VolumeStore
from custom.landmarks.embeddings.embed import embed_folder, embed_store
from custom.landmarks.embeddings.embedding_map import prepare
from custom.landmarks.embeddings.file import EmbeddingError, save_embedding
from custom.landmarks.embeddings.folder import EmbeddingFolder, embedding_path
from custom.landmarks.embeddings.packing import BITS, levels_of, pack, quantise, unpack
from custom.landmarks.embeddings.stored import StoredEmbedding
from custom.landmarks.matching.local_search import match_near
from custom.landmarks.matching.points import match_points
from custom.landmarks.sam.body_cells import body_cells
from custom.landmarks.sam.network import SAM, embed_scan
from custom.landmarks.sam.scan_grid import ScanEmbedding
from custom.landmarks.sam.weights import save_sam

WEIGHTS = "a" * 64


@pytest.fixture(scope="module")
def model() -> CentredWaves:
    return CentredWaves()


@pytest.fixture(scope="module")
def embedded(model: CentredWaves, store: VolumeStore, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("embedded")
    return folder, embed_store(
        model, WEIGHTS, store, folder, names=store.names[:2], threshold=0.55, progress=False
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [128, 13])
def test_packing_loses_nothing(bits, dim):
    levels = levels_of(bits)
    steps = np.random.default_rng(0).integers(-levels, levels + 1, (17, dim)).astype(np.int8)
    packed = pack(steps, bits)
    np.testing.assert_array_equal(unpack(packed, bits, dim), steps)
    if dim == 128:
        assert packed.shape[1] == 128 * bits // 8


def test_rounding_errs_by_half_a_step_at_most():
    vectors = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    assert np.abs(quantise(vectors, 15) * largest / 15 - vectors).max() <= (largest / 30).max() + 1e-6


def test_what_is_stored_is_nearly_what_was_given(tmp_path):
    embedding = structured(noise=0.3)
    saved = save_embedding(tmp_path / "a.sam", embedding, WEIGHTS, "s", fine_bits=7)
    stored = StoredEmbedding(saved.path).decode()
    cosine = (stored.fine * embedding.fine).sum(0)
    assert saved.mean_cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert saved.lowest_cosine == pytest.approx(float(cosine.min()), abs=1e-5)
    assert cosine.min() > 0.9995
    torch.testing.assert_close(stored.coarse, embedding.coarse, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(stored.affine, embedding.affine)
    assert stored.shape == embedding.shape
    blocks, whole = StoredEmbedding(saved.path).blocks, prepare(embedding).blocks
    np.testing.assert_allclose((blocks.vectors * whole.vectors).sum(axis=1), 1.0, atol=5e-3)
    np.testing.assert_allclose(blocks.points_mm, whole.points_mm, atol=1e-3)
    eight = save_embedding(tmp_path / "b.sam", embedding, WEIGHTS, "s", fine_bits=8)
    assert eight.lowest_cosine > 0.9999
    assert eight.num_bytes > saved.num_bytes


@pytest.mark.parametrize("dim, bits", [(128, 4), (32, 7)])
def test_matches_in_files_stay_within_half_a_cell_of_matches_in_float32(tmp_path, dim, bits):
    scans = [structured(s, noise=0.25, dim=dim) for s in ((0, 0, 0), (7.0, -5.0, 3.0))]
    files = [
        StoredEmbedding(save_embedding(tmp_path / f"{i}.sam", e, WEIGHTS, "s").path)
        for i, e in enumerate(scans)
    ]
    assert {file.header.fine_bits for file in files} == {bits}
    points = points_inside(300, margin=8)
    whole, stored = (match_points(points, *pair, refine=True).points_mm for pair in (scans, files))
    assert (np.linalg.norm(whole - stored, axis=1) <= 2.0).mean() >= 0.99


@pytest.mark.slow
def test_a_box_of_30_cm_three_quarters_body_takes_30_megabytes(tmp_path):
    grid, coarse = (75, 75, 75), (38, 10, 10)
    rng = np.random.default_rng(0)
    vector = torch.nn.functional.normalize(
        torch.from_numpy(rng.standard_normal(128, dtype=np.float32)), dim=0
    )
    maps = [
        vector[:, None, None, None].expand(128, *size) for size in (grid, coarse)
    ]  # any values take as much
    y, x = (np.indices(grid[1:]) - 37) / 37.2  # an ellipse in its box, as a trunk is
    body = np.broadcast_to(x**2 + y**2 <= 1, grid)
    assert 0.77 < body.mean() < 0.78
    scan = ScanEmbedding(*maps, np.diag([-2.0, -2.0, 2.0, 1.0]), (150, 150, 150))
    saved = save_embedding(tmp_path / "a.sam", scan, WEIGHTS, "s", body=body)
    assert 25e6 < saved.num_bytes <= 30e6, saved.num_bytes


@pytest.mark.parametrize("noise", [0.2, 2.0])
def test_exact_search_in_a_file_finds_what_the_authors_arithmetic_finds_in_it(tmp_path, noise):
    body = np.zeros((21, 24, 30), bool)
    body[2:19, 3:23, 4:29] = True
    scans = [structured(noise=noise), structured((7.0, -5.0, 3.0), noise=noise)]
    query, key = (
        StoredEmbedding(save_embedding(tmp_path / f"{i}.sam", e, WEIGHTS, "s", body=body).path)
        for i, e in enumerate(scans)
    )
    points = points_inside(15, margin=11)
    exact, official = (match_points(points, query, key, method=m) for m in ("exact", "exhaustive"))
    # norms are kept in fp16, so totals differ by up to 3e-4 and near ties may fall either way
    np.testing.assert_allclose(exact.scores, official.scores, atol=5e-4)
    assert (np.linalg.norm(exact.points_mm - official.points_mm, axis=1) < 1e-6).mean() >= 0.9


def test_off_the_body_nothing_is_asked_and_nothing_is_found(tmp_path):
    embedding = structured()
    body = np.zeros((21, 24, 30), bool)
    body[:, :, 15:] = True
    stored = StoredEmbedding(save_embedding(tmp_path / "a.sam", embedding, WEIGHTS, "s", body=body).path)
    off, on = embedding.cell_to_world((10, 12, 5)), embedding.cell_to_world((10, 12, 25))
    for method in ("exact", "fast"):
        asked = match_points([off, on], stored, stored, method=method)
        assert asked.scores[0] == -1
        assert np.isnan(asked.points_mm[0]).all()
        np.testing.assert_allclose(asked.points_mm[1], on)
        found = match_points(off, embedding, stored, method=method)  # its true place is not in the body
        assert embedding.world_to_cell(found.points_mm[0])[2] >= 15


def test_a_file_cut_short_changed_or_foreign_is_refused(tmp_path):
    path = save_embedding(tmp_path / "a.sam", structured(), WEIGHTS, "s").path
    good = path.read_bytes()
    with pytest.raises(EmbeddingError, match=r"none\.sam: missing"):
        StoredEmbedding(tmp_path / "none.sam")
    path.write_bytes(good[:-100])
    with pytest.raises(EmbeddingError, match="cut short"):
        StoredEmbedding(path)
    path.write_bytes(good[:5])
    with pytest.raises(EmbeddingError, match=r"a\.sam: no embedding"):
        StoredEmbedding(path)
    path.write_bytes(b"\x10" + b"\0" * 7 + b"x" * 40)
    with pytest.raises(EmbeddingError, match="no embedding, or damaged"):
        StoredEmbedding(path)
    path.write_bytes(good.replace(b"alice-embedding-4", b"alice-embedding-9"))
    with pytest.raises(EmbeddingError, match="alice-embedding-9"):
        StoredEmbedding(path)
    path.write_bytes(good.replace(b'fine_bits\\": 7', b'fine_bits\\": 5'))
    with pytest.raises(
        EmbeddingError, match=r"holds 5 bits a number, this version reads 4, 7 or 8.*--overwrite"
    ):
        StoredEmbedding(path)
    changed = bytearray(good)
    changed[-7] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(EmbeddingError, match="differs from what was written"):
        StoredEmbedding(path).check()
    path.write_bytes(good)
    StoredEmbedding(path).check()


def test_a_file_that_is_cut_short_while_it_is_mapped_is_named(tmp_path):
    path = save_embedding(tmp_path / "a.sam", structured(), WEIGHTS, "s").path
    stored = StoredEmbedding(path)
    stored.check()
    os.truncate(path, 4096)
    with pytest.raises(
        EmbeddingError, match=r"a\.sam: it was cut short from \d+ to 4096 bytes while in use\. Delete"
    ):
        stored.check()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(EmbeddingError, match=r"a\.sam: cannot be written \(disk full\)"):
        save_embedding(tmp_path / "a.sam", structured(), WEIGHTS, "s")
    assert not list(tmp_path.iterdir())


def test_a_store_is_embedded_once_and_resumed(model, store, embedded, tmp_path):
    folder, written = embedded
    both = store.names[:2]
    assert [s.path.stem for s in written] == both == EmbeddingFolder(folder).names
    assert embed_store(model, WEIGHTS, store, folder, names=both, progress=False) == []
    assert EmbeddingFolder(folder).threshold == 0.55  # kept by the second call
    embedding_path(folder, both[0]).rename(tmp_path / "away")
    again = embed_store(model, WEIGHTS, store, folder, names=both, progress=False)
    assert [s.path.read_bytes() for s in again] == [(tmp_path / "away").read_bytes()]
    EmbeddingFolder(folder).require(store, both)
    assert again[0].path.stat().st_mode & 0o777 == 0o644  # colleagues may read it


def test_the_command_packs_as_many_bits_as_asked(store, tmp_path):
    weights = tmp_path / "model.safetensors"
    save_sam(weights, SAM(width=4, embedding_dim=32), {})
    for asked, bits in ((None, 7), (4, 4), (None, 4)):  # what is there stays unless others are asked for
        embed(str(store.path), str(tmp_path / "e"), weights=str(weights), bits=asked)
        assert {
            scan.header.fine_bits for scan in map(EmbeddingFolder(tmp_path / "e").__getitem__, store.names)
        } == {bits}
    for asked in (3, 5, 6):
        with pytest.raises(ValueError, match=f"must be 4, 7 or 8, got {asked}"):
            embed(str(store.path), str(tmp_path / "f"), weights=str(weights), bits=asked)
    assert not (tmp_path / "f").exists()


def test_a_threshold_calibrated_for_a_folder_outlives_embedding_more_scans(model, store, tmp_path):
    embed_store(model, WEIGHTS, store, tmp_path, names=store.names[:1], threshold=0.9, progress=False)
    EmbeddingFolder(tmp_path).keep_threshold(0.8)
    embed_store(model, WEIGHTS, store, tmp_path, names=store.names[:2], threshold=0.9, progress=False)
    assert EmbeddingFolder(tmp_path).threshold == 0.8
    embed_store(
        model, WEIGHTS, store, tmp_path, names=store.names[:1], threshold=0.9, overwrite=True, progress=False
    )
    assert EmbeddingFolder(tmp_path).threshold == 0.8  # the same weights: what was calibrated for them holds
    embed_store(
        model, "b" * 64, store, tmp_path, names=store.names[:1], threshold=0.7, overwrite=True, progress=False
    )
    assert EmbeddingFolder(tmp_path).threshold == 0.7  # of the other weights


def test_a_changed_byte_is_noticed_when_a_folder_is_used(model, store, tmp_path):
    name = store.names[0]
    (saved,) = embed_store(model, WEIGHTS, store, tmp_path, names=[name], progress=False)
    changed = bytearray(saved.path.read_bytes())
    changed[-7] ^= 1
    saved.path.write_bytes(bytes(changed))
    with pytest.raises(EmbeddingError, match="differs from what was written"):
        EmbeddingFolder(tmp_path)[name]


def test_embeddings_of_an_older_format_are_replaced_by_the_command_that_the_message_names(
    model, store, tmp_path
):
    name = store.names[0]
    (saved,) = embed_store(model, WEIGHTS, store, tmp_path, names=[name], progress=False)
    for path in (saved.path, tmp_path / "embeddings.json"):
        path.write_bytes(path.read_bytes().replace(b"alice-embedding-4", b"alice-embedding-2"))
    for use in (
        lambda: EmbeddingFolder(tmp_path),
        lambda: StoredEmbedding(saved.path),
        lambda: embed_store(model, WEIGHTS, store, tmp_path, names=[name], progress=False),
    ):
        with pytest.raises(EmbeddingError, match=r"alice embed STORE .* --overwrite"):
            use()
    embed_store(model, WEIGHTS, store, tmp_path, names=[name], overwrite=True, progress=False)
    assert EmbeddingFolder(tmp_path)[name].header.name == name


def test_embeddings_of_different_weights_are_not_compared(tmp_path):
    files = [
        StoredEmbedding(save_embedding(tmp_path / f"{w}.sam", structured(), w * 64, "s").path) for w in "ab"
    ]
    point = points_inside(1)
    for match in (
        lambda q, k: match_points(point, q, k),
        lambda q, k: match_near(point, point, q, k),
    ):
        match(files[0], structured())  # unknown weights may fit
        with pytest.raises(ValueError, match="different weights .aaaaaaaaaaaa, bbbbbbbbbbbb. do not compare"):
            match(*files)


def test_other_weights_and_changed_scans_are_refused(model, store, tmp_path):
    name = store.names[0]
    embed_store(model, WEIGHTS, store, tmp_path, names=[name], progress=False)
    with pytest.raises(EmbeddingError, match="aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        embed_store(model, "b" * 64, store, tmp_path, names=[name], progress=False)
    altered = VolumeStore(store.path)
    altered.records = {n: replace(r, voxels_sha256="0" * 64) for n, r in store.records.items()}
    with pytest.raises(EmbeddingError, match="changed since"):
        embed_store(model, WEIGHTS, altered, tmp_path, names=[name], progress=False)
    with pytest.raises(EmbeddingError, match="made from other voxels"):
        EmbeddingFolder(tmp_path).require(altered, [name])
    with pytest.raises(EmbeddingError, match=r"case1 \(missing\).*alice embed"):
        EmbeddingFolder(tmp_path).require(store)
    assert (
        len(embed_store(model, "b" * 64, store, tmp_path, names=[name], overwrite=True, progress=False)) == 1
    )
    index = json.loads((tmp_path / "embeddings.json").read_text())
    (tmp_path / "embeddings.json").write_text(json.dumps(index | {"weights_sha256": "c" * 64}))
    with pytest.raises(EmbeddingError, match="do not compare"):
        EmbeddingFolder(tmp_path)[name]
    del index["profile"]
    (tmp_path / "embeddings.json").write_text(json.dumps(index))
    with pytest.raises(EmbeddingError, match="profile None.*Embed again"):
        EmbeddingFolder(tmp_path)
    (tmp_path / "embeddings.json").unlink()
    with pytest.raises(EmbeddingError, match="no embeddings here"):
        EmbeddingFolder(tmp_path)


def test_stored_cells_cover_the_body_with_a_margin(model, store):
    name = store.names[0]
    hu, affine = store.read_crop(name, (0, 0, 0), store.shape(name)), store.affine(name)
    embedding = embed_scan(model, (hu, affine))
    body = body_cells(hu, affine, embedding)
    assert 0.3 < body.mean() < 0.95
    voxels = store.body_voxels(name)
    points = voxels @ affine[:3, :3].T + affine[:3, 3]
    cells = np.rint(embedding.world_to_cell(points)).astype(int).clip(0, np.array(body.shape) - 1)
    assert body[tuple(cells.T)].all()


def test_a_folder_of_files_with_names_of_any_script(model, scans, tmp_path):
    source, out = tmp_path / "Aufnahmen", tmp_path / "eingebettet é"
    source.mkdir()
    (source / "Größe 患者.nii.gz").write_bytes((scans / "case0.nii.gz").read_bytes())
    embed_folder(model, WEIGHTS, source, out, progress=False)
    folder = EmbeddingFolder(out)
    (name,) = folder.names
    assert "患者" in name
    assert folder[name].header.name == name
    assert embedding_path(out, name).is_file()


def test_an_open_folder_travels_to_another_process(embedded, store):
    folder = EmbeddingFolder(embedded[0])
    name = store.names[0]
    point = store.affine(name) @ [*store.body_voxels(name)[500], 1]
    before = match_points(point[:3], folder[name], folder[store.names[1]], method="fast")
    copy = pickle.loads(pickle.dumps(folder))
    after = match_points(
        point[:3], copy[name], pickle.loads(pickle.dumps(copy[store.names[1]])), method="fast"
    )
    np.testing.assert_array_equal(before.points_mm, after.points_mm)
    assert len(pickle.dumps(folder)) < 1000
