import contextlib

import blosc2
import numpy as np
import pytest

from custom.data.errors import StoreError
from custom.data.store.chunked_array import ArrayWriter, ChunkedArray, write_array


@pytest.fixture
def array():
    rng = np.random.default_rng(0)
    grid = np.arange(150)[:, None, None] * 7 - np.arange(71)[None, :, None] * 3
    return (grid + rng.integers(0, 40, (150, 71, 67))).astype(np.int16)


def whole(path):
    found = ChunkedArray(path)
    return found.read((0, 0, 0), found.shape)


def test_slabs_make_the_same_array_as_one_write(tmp_path, array):
    digest = write_array(tmp_path / "one.b2nd", array)
    with ArrayWriter(tmp_path / "slabs.b2nd", array.shape, array.dtype) as writer:
        for start in (0, 64, 128):
            writer.write(array[start : start + 64])
    assert writer.sha256 == digest
    assert np.array_equal(whole(tmp_path / "slabs.b2nd"), array)
    box = ChunkedArray(tmp_path / "one.b2nd").read((60, 3, 63), (70, 71, 67))
    assert np.array_equal(box, array[60:70, 3:, 63:])


def test_an_error_on_the_way_leaves_nothing(tmp_path, array):
    writer = ArrayWriter(tmp_path / "a.b2nd", array.shape, array.dtype)
    with contextlib.suppress(KeyError), writer:
        writer.write(array[:64])
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.b2nd").mkdir()
    with pytest.raises(StoreError, match=r"a\.b2nd: cannot be written"):
        write_array(tmp_path / "a.b2nd", array)
    assert [p.name for p in tmp_path.iterdir()] == ["a.b2nd"]


def test_damage_anywhere_is_found_or_changes_nothing(tmp_path, array):
    path = tmp_path / "a.b2nd"
    write_array(path, array)
    content = path.read_bytes()
    rng, found = np.random.default_rng(1), 0
    for place in [*range(0, 200, 9), *rng.integers(0, len(content), 120)]:
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            assert np.array_equal(whole(path), array), f"byte {place} changed voxels unnoticed"
        except (RuntimeError, ValueError, OSError):
            found += 1
    assert found > 100


def test_only_chunks_that_are_touched_are_looked_at(tmp_path, array):
    path = tmp_path / "a.b2nd"
    write_array(path, array)
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 0xFF  # in a later chunk
    path.write_bytes(content)
    opened = ChunkedArray(path)
    assert np.array_equal(opened.read((0, 0, 0), (20, 20, 20)), array[:20, :20, :20])
    with pytest.raises(RuntimeError, match=r"checksum of chunk \d+ differs"):
        opened.read((0, 0, 0), opened.shape)


def test_an_array_without_checksums_is_refused(tmp_path, array):
    blosc2.asarray(array, urlpath=str(tmp_path / "a.b2nd"))
    with pytest.raises(RuntimeError, match="checksums are missing"):
        ChunkedArray(tmp_path / "a.b2nd")


@pytest.mark.parametrize("extra", ["LazyArray", "proxy-source", "b2o", "anything"])
def test_a_file_with_other_metadata_never_reaches_blosc2(tmp_path, array, extra, monkeypatch):
    """blosc2 may run the code of a LazyArray that it opens, or follow a proxy to another file."""
    blosc2.asarray(array, urlpath=str(tmp_path / "a.b2nd"), meta={extra: {"kind": "file"}})
    monkeypatch.setattr(blosc2, "open", lambda *args, **kwargs: pytest.fail("was opened"))
    with pytest.raises(RuntimeError, match="holds other things than one array"):
        ChunkedArray(tmp_path / "a.b2nd")


@pytest.mark.parametrize(
    ("place", "value"),
    [(23, 0), (51, 3), (117, 255), (147, 200)],
    ids=["size of the file", "bytes of a voxel", "a side of the array", "a side of its chunks"],
)
def test_sizes_that_contradict_each_other_are_refused(tmp_path, array, place, value):
    path = tmp_path / "a.b2nd"
    write_array(path, array)
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="header is damaged"):
        ChunkedArray(path)
