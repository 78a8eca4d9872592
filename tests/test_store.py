import json
import os
import pickle
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import write_scan

from custom.data.errors import DamagedScan, ScanError
from custom.data.grid.body import body_mask
from custom.data.grid.orientation import to_ras
from custom.data.grid.resample import resample
from custom.data.scans import Scan
from custom.data.store.build import build_store
from custom.data.store.convert import record_path
from custom.data.store.volume_store import StoreError, VolumeStore, volume_path
from custom.landmarks.embeddings.file import EmbeddingError
from custom.landmarks.embeddings.folder import embedding_path
from custom.space import to_voxels, to_world


def ramp(shape, affine, direction=(1.0, -0.5, 2.0)):
    """A volume whose value is a linear function of world mm."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return to_world(affine, grid) @ np.array(direction)


AFFINE = np.array([[0.8, 0, 0, -40.0], [0, 0.9, 0, 13.0], [0, 0, 3.0, 5.0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.5, 0.7, 1.1), (0.8, 0.9, 3.0), (2.1, 0.6, 5.0)])
def test_resampling_keeps_every_value_at_its_place_in_the_world(spacing):
    volume = ramp((41, 37, 23), AFFINE)
    out, affine = resample(volume.astype(np.float32), AFFINE, spacing)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    expected = ramp(out.shape, affine)
    inner = tuple(slice(4, -4) for _ in range(3))
    np.testing.assert_allclose(out[inner], expected[inner], atol=2e-3)


def test_a_grid_that_is_right_already_is_left_alone():
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    out, affine = resample(volume, AFFINE, (0.8, 0.9, 3.0))
    assert np.array_equal(out, volume) and np.array_equal(affine, AFFINE)


def test_shrinking_averages_instead_of_aliasing():
    stripes = np.zeros((64, 4, 4), np.float32)
    stripes[::2] = 100.0
    out, _ = resample(stripes, np.eye(4), (4.0, 1.0, 1.0))
    assert np.abs(out[2:-2] - 50).max() < 5  # picking every fourth voxel would give 100 or 0


def test_labels_are_never_mixed():
    label = np.random.default_rng(0).integers(0, 3, (20, 21, 22)).astype(np.uint8) * 7
    out, _ = resample(label, np.eye(4), (1.7, 0.6, 2.3), nearest=True)
    assert set(np.unique(out)) <= {0, 7, 14}


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL", "RAS"])
def test_any_orientation_becomes_ras_without_moving_anything(codes):
    image = nib.Nifti1Image(ramp((5, 6, 7), AFFINE), AFFINE)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes)
        )
    )
    volume, affine = to_ras(np.asarray(turned.dataobj), turned.affine)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(volume, ramp(volume.shape, affine), atol=1e-9)


def test_points_go_to_the_world_and_back():
    points = np.random.default_rng(0).normal(size=(5, 3)) * 100
    np.testing.assert_allclose(to_voxels(AFFINE, to_world(AFFINE, points)), points)


def test_the_body_is_found_and_the_table_is_not():
    volume = np.full((80, 80, 30), -1000, np.int16)
    x, y = np.meshgrid(np.arange(80), np.arange(80), indexing="ij")
    volume[((x - 40) / 30) ** 2 + ((y - 45) / 22) ** 2 < 1] = 40
    volume[((x - 40) / 8) ** 2 + ((y - 45) / 8) ** 2 < 1] = -850  # lung
    volume[10:70, 15:18] = 100  # table, apart from the body
    mask, step = body_mask(volume, (3.0, 3.0, 4.0))
    assert mask[40 // step[0], 45 // step[1], 5], "lungs belong to the body"
    assert not mask[:, : 18 // step[1], :].any()


def test_a_crop_is_what_whole_volume_indexing_gives_padded_with_air(store):
    name = store.names[0]
    whole = store.read_crop(name, (0, 0, 0), store.shape(name))
    assert np.array_equal(store.read_crop(name, (7, 11, 3), (16, 9, 20)), whole[7:23, 11:20, 3:23])
    outside = store.read_crop(name, (-5, -4, -3), (10, 10, 10), fill=-175)
    assert np.array_equal(outside[5:, 4:, 3:], whole[:5, :6, :7])
    assert (outside[:5] == -175).all()
    assert (store.read_crop(name, (500, 0, 0), (4, 4, 4)) == -1024).all()


def test_stored_voxels_are_the_scan_and_labels_lie_on_them(store, scans):
    name = store.names[2]
    image = nib.load(scans / f"{name}.nii.gz")
    start, shape = np.array(store.records[name].crop_start), store.shape(name)
    cut = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    assert np.prod(shape) < image.dataobj.shape[0] * image.dataobj.shape[1] * image.dataobj.shape[2]
    assert np.array_equal(store.read_crop(name, (0, 0, 0), shape), np.asarray(image.dataobj)[cut])
    np.testing.assert_allclose(
        to_world(store.affine(name), [5, 6, 7]), to_world(image.affine, start + np.array([5, 6, 7]))
    )
    label = store.read_label_crop(name, (0, 0, 0), shape)
    assert np.array_equal(label, np.asarray(nib.load(scans / f"{name}_label.nii.gz").dataobj)[cut])
    assert store.records[name].labels == [1, 2]


def test_a_store_travels_to_a_worker(store):
    twin = pickle.loads(pickle.dumps(store))
    assert np.array_equal(
        twin.read_crop(store.names[0], (1, 2, 3), (4, 5, 6)),
        store.read_crop(store.names[0], (1, 2, 3), (4, 5, 6)),
    )


def test_a_second_build_reads_nothing_again_and_a_lost_volume_is_made_again(scans, tmp_path):
    store = build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False)
    kept, lost = (volume_path(store.path, n, "hu") for n in store.names[:2])
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    again = build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False)
    assert kept.stat().st_mtime_ns == stamp and lost.is_file() and again.check() == {}


def test_damage_is_reported_by_name(scans, tmp_path):
    store = build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False)
    path = volume_path(store.path, "case3", "hu")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    assert list(VolumeStore(store.path).check()) == ["case3"]
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="case3.hu.b2nd: damaged"):
        VolumeStore(store.path).read_crop("case3", (0, 0, 0), (4, 4, 4))
    path.unlink()
    with pytest.raises(StoreError, match=r"case3.hu.b2nd: missing"):
        VolumeStore(store.path).read_crop("case3", (0, 0, 0), (4, 4, 4))


@pytest.mark.parametrize("kind", ["hu", "label", "body"])
def test_a_file_that_is_cut_short_while_it_is_open_is_named(scans, tmp_path, kind):
    """Else the process would end with a bus error, and PyTorch would blame the shared memory."""
    store = build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False, workers=1)
    read = {
        "hu": lambda: store.read_crop("case3", (0, 0, 0), store.shape("case3")),
        "label": lambda: store.read_label_crop("case3", (0, 0, 0), store.shape("case3")),
        "body": lambda: store._body_voxels("case3"),
    }[kind]
    read()
    os.truncate(volume_path(store.path, "case3", kind), 100)
    with pytest.raises(
        DamagedScan, match=rf"case3.{kind}.b2nd: damaged .*cut short .* to 100 bytes"
    ) as refusal:
        read()
    assert "\n" not in str(refusal.value)


def test_a_full_disk_leaves_nothing_half_written(scans, tmp_path, monkeypatch):
    import custom.data.store.chunked_array as module

    def full(*args, urlpath, **kwargs):
        with open(urlpath, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.blosc2, "empty", full)
    with pytest.raises(StoreError, match=r"b2nd: cannot be written .*No space left.*Make room"):
        build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False)
    assert not list((tmp_path / "s").rglob("*.b2nd*"))
    monkeypatch.undo()
    assert build_store(scans, tmp_path / "s", (3.0, 3.0, 4.0), progress=False).check() == {}


@pytest.mark.slow
def test_a_build_killed_midway_goes_on_where_it_stopped(tmp_path):
    for i in range(8):
        write_scan(tmp_path / "scans" / f"p{i}.nii.gz", i, shape=(120, 110, 90))
    code = f"from custom.data.store.build import build_store; build_store({str(tmp_path / 'scans')!r}, {str(tmp_path / 's')!r}, (2.0, 2.0, 2.0), progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list((tmp_path / "s" / "volumes").glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s" / "volumes").glob("*.json")}
    assert 3 <= len(finished) < 8
    store = build_store(tmp_path / "scans", tmp_path / "s", (2.0, 2.0, 2.0), progress=False)
    assert len(store) == 8 and store.check() == {}
    assert all(
        (tmp_path / "s" / "volumes" / name).stat().st_mtime_ns == stamp for name, stamp in finished.items()
    )


@pytest.mark.parametrize(
    "then, now, way_out",
    [
        ({"spacing": (3.0, 3.0, 4.0)}, {"spacing": (2.0, 2.0, 2.0)}, r'--spacing "\[3.0, 3.0, 4.0\]"'),
        ({"margin_mm": 20}, {"margin_mm": 10}, "--margin_mm 20"),
        ({"crop_body": False}, {"crop_body": True}, "--crop_body false"),
        ({"remove_table": True}, {"remove_table": False}, "--remove_table true"),
    ],
)
def test_other_settings_than_the_stores_are_refused_with_the_options_that_keep_them(
    scans, tmp_path, then, now, way_out
):
    one = [Scan("a", scans / "case0.nii.gz", "p")]
    common = {"spacing": (3.0, 3.0, 4.0), "progress": False}
    build_store(one, tmp_path, **common | then)
    with pytest.raises(
        StoreError, match=rf"was built with .* Ask for the same settings \({way_out}\), or choose"
    ):
        build_store(one, tmp_path, **common | now)


def test_the_index_names_its_format(store, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(StoreError, match="format 'other'"):
        VolumeStore(tmp_path)


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a\\b", ""])
def test_a_volume_whose_name_leads_out_of_the_store_is_refused_when_read_and_when_written(
    store, tmp_path, name
):
    index = json.loads((store.path / "index.json").read_text())
    index["volumes"][name] = index["volumes"].pop("case0")
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="a volume is called .*cannot name a file"):
        VolumeStore(tmp_path)
    for place in (lambda: volume_path(tmp_path, name, "hu"), lambda: record_path(tmp_path, name)):
        with pytest.raises(StoreError, match="cannot name a file"):
            place()
    with pytest.raises(ScanError, match="cannot name a file"):
        Scan(name, tmp_path / "a.nii.gz", "anna")
    with pytest.raises(EmbeddingError, match="cannot name a file"):
        embedding_path(tmp_path, name)


@pytest.mark.parametrize("change", [{"settings": 1}, {"volumes": []}, {"volumes": None}])
def test_an_index_without_its_parts_is_refused(store, tmp_path, change):
    index = json.loads((store.path / "index.json").read_text()) | change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="index.json: lacks its settings or volumes"):
        VolumeStore(tmp_path)
