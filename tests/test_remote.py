import json

import fsspec
import numpy as np
import pytest

from custom.data.remote import RemoteFolder, is_url
from custom.data.store.build import build_store, shared_store
from custom.data.store.volume_store import StoreError, VolumeStore
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.pairs import AlignedPair


@pytest.fixture
def url(store):
    """The store in fsspec's memory."""
    system = fsspec.filesystem("memory")
    for path in store.path.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/bucket/store/{path.relative_to(store.path).as_posix()}", path.read_bytes())
    yield "memory://bucket/store"
    system.rm("/bucket", recursive=True)


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/store") and is_url("memory://x")
    assert not is_url("/data/store") and not is_url("C:\\store") and not is_url("a:b")


def test_a_store_at_a_url_reads_as_the_folder_does_and_fetches_only_what_it_needs(store, url, tmp_path):
    far = VolumeStore(url, cache=tmp_path)
    name = store.names[2]
    assert far.names == store.names and not list(tmp_path.rglob("*.b2nd"))
    assert np.array_equal(
        far.read_crop(name, (3, 4, 5), (9, 8, 7)), store.read_crop(name, (3, 4, 5), (9, 8, 7))
    )
    assert np.array_equal(far.body_voxels(name), store.body_voxels(name))
    assert sorted(p.name for p in tmp_path.rglob("*.b2nd")) == [f"{name}.body.b2nd", f"{name}.hu.b2nd"]
    fsspec.filesystem("memory").rm("/bucket/store/volumes", recursive=True)
    again = VolumeStore(url, cache=tmp_path)  # from its copies
    assert np.array_equal(
        again.read_crop(name, (3, 4, 5), (9, 8, 7)), store.read_crop(name, (3, 4, 5), (9, 8, 7))
    )
    with pytest.raises(StoreError, match=r"memory://bucket/store/volumes/case0.hu.b2nd: missing"):
        again.read_crop("case0", (0, 0, 0), (4, 4, 4))


def test_pairs_come_from_a_url(store, url, tmp_path):
    far = VolumeStore(url, cache=tmp_path)
    here, there = (AlignedPair(s, CoordinateAligner(s), (16, 12, 8))[3] for s in (store, far))
    assert np.array_equal(here["crop_k"], there["crop_k"]) and far.check() == {}


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "..\\out", "a/b", ".."])
def test_a_volume_whose_name_leads_out_of_the_cache_is_refused(store, url, tmp_path, name):
    system = fsspec.filesystem("memory")
    index = json.loads(system.cat_file("/bucket/store/index.json"))
    index["volumes"][name] = index["volumes"].pop(store.names[0]) | {"name": name}
    system.pipe_file("/bucket/store/index.json", json.dumps(index).encode())
    with pytest.raises(StoreError, match="a volume is called .*cannot name a file"):
        VolumeStore(url, cache=tmp_path)


@pytest.mark.parametrize(
    "name, version",
    [("../x.b2nd", ""), ("volumes/../../x", ""), ("/x", ""), ("x", "../../.."), ("x", "/tmp/a")],
)
def test_nothing_is_fetched_to_a_place_outside_of_the_cache(url, tmp_path, name, version):
    with pytest.raises(StoreError, match="leads out of the folder for copies"):
        RemoteFolder(url, tmp_path / "cache").fetch(name, version)
    assert list(tmp_path.rglob("*")) == []


def test_a_volume_that_changed_is_fetched_anew(store, url, tmp_path):
    name = store.names[0]
    VolumeStore(url, cache=tmp_path).read_crop(name, (0, 0, 0), (4, 4, 4))
    system = fsspec.filesystem("memory")
    index = system.cat_file("/bucket/store/index.json").decode()
    digest = store.records[name].voxels_sha256
    system.pipe_file("/bucket/store/index.json", index.replace(digest, "0" * 64).encode())
    system.rm(f"/bucket/store/volumes/{name}.hu.b2nd")
    with pytest.raises(StoreError, match=f"{name}.hu.b2nd: missing"):
        VolumeStore(url, cache=tmp_path).read_crop(name, (0, 0, 0), (4, 4, 4))


def test_a_damaged_copy_is_named_with_the_way_to_a_new_one(store, url, tmp_path):
    name = store.names[1]
    VolumeStore(url, cache=tmp_path).verify(name)
    copy = next(tmp_path.rglob(f"{name}.hu.b2nd"))
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 0xFF
    copy.unlink()
    copy.write_bytes(content)
    with pytest.raises(
        StoreError, match=rf"bucket/store/volumes/{name}.hu.b2nd: damaged.*{tmp_path}.*fetch it again"
    ):
        VolumeStore(url, cache=tmp_path).verify(name)
    copy.unlink()
    VolumeStore(url, cache=tmp_path).verify(name)


def test_what_cannot_be_fetched_is_named(url, tmp_path, scans):
    with pytest.raises(StoreError, match=r"memory://bucket/nothing/index.json: missing"):
        VolumeStore("memory://bucket/nothing", cache=tmp_path)
    with pytest.raises(
        StoreError, match=r"nosuch://b/index.json: cannot be fetched.*Install fsspec's package"
    ):
        VolumeStore("nosuch://b", cache=tmp_path)
    with pytest.raises(StoreError, match="built in a folder"):
        build_store(scans, url, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_url_works_too_and_copies_are_complete(store, tmp_path):
    far = VolumeStore(store.path.as_uri(), cache=tmp_path)
    assert far.check() == {} and len(list(tmp_path.rglob("*.hu.b2nd"))) == len(store)
    folder = RemoteFolder(store.path.as_uri(), tmp_path)
    assert folder.fetch("index.json").read_bytes() == (store.path / "index.json").read_bytes()


def test_a_run_takes_a_url_for_its_store(url, tmp_path, monkeypatch):
    monkeypatch.setattr("custom.data.remote.Path.home", lambda: tmp_path)
    assert len(shared_store("not there", url)) == 6
    assert (tmp_path / ".cache" / "alice").is_dir()
