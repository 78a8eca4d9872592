import logging

import nibabel as nib
import numpy as np
import pytest
from conftest import write_scan

import custom.data.store.convert as module
from custom.data.errors import ScanError
from custom.data.store.build import build_store
from custom.data.store.volume_store import StoreError, VolumeStore
from custom.space import to_voxels, to_world

SPACING = (2.1, 2.7, 3.3)


def whole(store, name):
    return store.read_crop(name, (0, 0, 0), store.shape(name))


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A labelled scan with its axes permuted, flipped and oblique, and a plain one."""
    folder = tmp_path_factory.mktemp("turned")
    write_scan(folder / "plain.nii.gz", 3)
    write_scan(folder / "odd.nii.gz", 4)
    angle = np.deg2rad(6)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for path in (folder / "odd.nii.gz", folder / "odd_label.nii.gz"):
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj), tilt @ image.affine)
        codes = nib.orientations.axcodes2ornt("PSL")
        start = nib.orientations.io_orientation(image.affine)
        nib.save(image.as_reoriented(nib.orientations.ornt_transform(start, codes)), path)
    return folder


def test_slabs_and_temporary_files_change_no_voxel(turned, tmp_path, monkeypatch):
    plain = build_store(turned, tmp_path / "whole", SPACING, progress=False)
    monkeypatch.setattr(module, "_SLAB", 7 * 61 * 53)  # a few planes at a time
    monkeypatch.setattr(module, "_IN_MEMORY", 1000)
    slabs = build_store(turned, tmp_path / "slabs", SPACING, progress=False)
    for name in plain.names:
        assert slabs.records[name].voxels_sha256 == plain.records[name].voxels_sha256
        assert slabs.records[name].label_sha256 == plain.records[name].label_sha256
        assert slabs.records[name].affine == plain.records[name].affine
    assert not list((tmp_path / "slabs").rglob("*.tmp"))


@pytest.mark.parametrize("margin", [0.0, 4.0, 10.0, 500.0])
def test_cropping_moves_no_voxel_in_the_world(turned, tmp_path, margin):
    full = build_store(turned, tmp_path / "full", SPACING, progress=False, crop_body=False)
    cut = build_store(turned, tmp_path / "cut", SPACING, progress=False, margin_mm=margin)
    for name in full.names:
        start, shape = np.array(cut.records[name].crop_start), cut.shape(name)
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert np.array_equal(whole(cut, name), whole(full, name)[box])
        label = full.read_label_crop(name, (0, 0, 0), full.shape(name))
        assert np.array_equal(cut.read_label_crop(name, (0, 0, 0), shape), label[box])
        voxels = np.random.default_rng(0).integers(0, shape, (20, 3))
        np.testing.assert_allclose(
            to_world(cut.affine(name), voxels), to_world(full.affine(name), voxels + start), atol=1e-9
        )
        # the body is the same body
        there = to_voxels(full.affine(name), to_world(cut.affine(name), cut.body_voxels(name)))
        assert np.array_equal(np.rint(there).astype(int), full.body_voxels(name))
        np.testing.assert_allclose(cut.body_box_mm(name) + start, full.body_box_mm(name))
        room = np.minimum(cut.body_box_mm(name)[0] + 0.5, np.array(shape) - cut.body_box_mm(name)[1] - 0.5)
        reached = np.ceil(margin / np.array(SPACING))
        edge = full.body_box_mm(name)
        there_is = np.minimum(edge[0] + 0.5, np.array(full.shape(name)) - edge[1] - 0.5)
        assert (room >= np.minimum(reached, there_is)).all()
        assert (np.array(shape) <= full.shape(name)).all()
    assert margin == 500.0 or any(cut.shape(n) != full.shape(n) for n in full.names)


def test_a_table_is_removed_only_when_asked(tmp_path):
    volume = np.full((90, 80, 40), -1000, np.int16)
    x, y = np.meshgrid(np.arange(90), np.arange(80), indexing="ij")
    volume[((x - 45) / 30) ** 2 + ((y - 45) / 20) ** 2 < 1] = 40
    volume[20:70, 12:15] = 120
    (tmp_path / "s").mkdir()
    nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3.0, 4.0, 1.0])), tmp_path / "s" / "a.nii.gz")
    kept = build_store(tmp_path / "s", tmp_path / "kept", (3.0, 3.0, 4.0), progress=False, crop_body=False)
    gone = build_store(
        tmp_path / "s", tmp_path / "gone", (3.0, 3.0, 4.0), progress=False, crop_body=False, remove_table=True
    )
    assert (whole(kept, "a") == 120).any() and not (whole(gone, "a") == 120).any()
    assert np.array_equal(whole(gone, "a") == 40, volume == 40), "nothing of the body goes"


def test_other_settings_are_refused_by_name_and_unset_ones_are_the_stores(turned, tmp_path, caplog):
    build_store(turned, tmp_path / "s", SPACING, progress=False, margin_mm=6.0, remove_table=True)
    again = build_store(turned, tmp_path / "s", SPACING, progress=False)
    assert again.settings["crop_margin_mm"] == 6.0 and again.settings["remove_table"] is True
    for other, message in (
        ({"crop_body": False}, "built with {'crop_margin_mm': 6.0}, now {'crop_margin_mm': None}"),
        ({"margin_mm": 7.0}, "now {'crop_margin_mm': 7.0}"),
        ({"remove_table": False}, "built with {'remove_table': True}"),
        ({"profile": "mr"}, "now {.*'profile': 'mr'}"),
    ):
        with pytest.raises(StoreError, match=message):
            build_store(turned, tmp_path / "s", SPACING, progress=False, **other)
    with pytest.raises(ValueError, match="margin_mm must be between"):
        build_store(turned, tmp_path / "t", SPACING, progress=False, margin_mm=-1)
    with pytest.raises(ValueError, match="margin_mm = 3 has no effect without crop_body"):
        build_store(turned, tmp_path / "t", SPACING, progress=False, margin_mm=3, crop_body=False)


def test_what_a_build_needs_is_told_and_a_small_disk_is_refused_before_anything_is_written(
    turned, tmp_path, monkeypatch, caplog
):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("custom.data.store.build_cost.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"needs up to .* has 0 MB free.*check_disk=False"):
        build_store(turned, tmp_path / "s", SPACING, progress=False)
    assert not (tmp_path / "s").exists()
    with caplog.at_level(logging.INFO):
        store = build_store(turned, tmp_path / "s", SPACING, progress=False, check_disk=False)
    assert "2 volumes to build: up to" in caplog.text and "about 1 min" in caplog.text
    caplog.clear()
    build_store(turned, tmp_path / "s", SPACING, progress=False)  # nothing left, nothing to refuse
    assert "to build" not in caplog.text and len(store) == 2


def test_a_store_of_another_format_must_be_built_again(turned, tmp_path):
    store = build_store(turned, tmp_path / "s", SPACING, progress=False)
    index = store.path / "index.json"
    index.write_text(index.read_text().replace("alice-store-3", "alice-store-2"))
    for use in (VolumeStore, lambda path: build_store(turned, path, SPACING, progress=False)):
        with pytest.raises(StoreError, match="'alice-store-2'.*Delete the store and build it again"):
            use(store.path)


def test_a_scan_without_a_body_is_named(tmp_path):
    volume = np.full((40, 40, 40), -1000, np.int16)
    volume[0, 0, 0] = -400
    nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3.0, 3.0, 1.0])), tmp_path / "empty.nii.gz")
    with pytest.raises(ScanError, match=r"empty.nii.gz: no body found"):
        build_store(tmp_path, tmp_path / "store", (9.0, 9.0, 9.0), progress=False)
