import json
import shutil

import blosc2
import numpy as np
import pytest
import torch
from conftest import write_scan
from ignite.engine import Engine

from custom.data.errors import DamagedScan, StoreError
from custom.data.store.build import build_store
from custom.data.store.chunked_array import ChunkedArray
from custom.data.store.quarantine import QuarantineLog
from custom.data.store.volume_store import VolumeStore, volume_path
from custom.engine.loader import sample_loader
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.pairs import AlignedPair

CROP = (16, 12, 8)
PAIRS = 24


@pytest.fixture
def damaged(store, tmp_path):
    """A copy of the store in which case1 has a flipped byte in its voxels."""
    shutil.copytree(store.path, tmp_path / "store")
    path = volume_path(tmp_path / "store", "case1", "hu")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return VolumeStore(tmp_path / "store")


class Watched(VolumeStore):
    """Remembers which volumes were verified."""

    def __init__(self, path, verified):
        super().__init__(path)
        self.verified = verified

    def verify(self, name):
        self.verified.append(name)
        super().verify(name)


def read_all(pairs):
    return [pairs[index] for index in range(PAIRS)]


def dataset(store, allowed=1, **kwargs):
    return AlignedPair(store, CoordinateAligner(store), CROP, bad_scans_allowed=allowed, seed=2, **kwargs)


def test_a_read_of_a_damaged_chunk_names_the_file(damaged):
    assert not ChunkedArray(volume_path(damaged.path, "case1", "body"))._seen.any()
    with pytest.raises(
        DamagedScan, match=r"case1.hu.b2nd: damaged \(checksum of chunk 0 differs\)"
    ) as caught:
        damaged.read_crop("case1", (0, 0, 0), (4, 4, 4))
    assert caught.value.scan == "case1"
    assert list(damaged.check()) == ["case1"]


def test_a_damaged_scan_stops_the_run_unless_some_are_allowed(damaged):
    with pytest.raises(StoreError, match=r"1 damaged scan\(s\) \(case1\), 0 allowed.*case1.hu.b2nd.*--check"):
        read_all(dataset(damaged, allowed=0))
    volume_path(damaged.path, "case4", "hu").unlink()
    with pytest.raises(StoreError, match=r"2 damaged scan\(s\) \(case1, case4\), 1 allowed"):
        read_all(dataset(damaged, allowed=1))


def test_pairs_with_a_damaged_scan_are_drawn_anew_and_the_others_stay(store, damaged, caplog):
    whole, pairs = dataset(store), dataset(damaged)
    redrawn = 0
    for index in range(PAIRS):
        before, now = whole[index], pairs[index]
        assert "case1" not in (now["scan_q"], now["scan_k"]) and now["patient_q"] != now["patient_k"]
        if "case1" in (before["scan_q"], before["scan_k"]):
            redrawn += 1
            assert now["set_aside"] == 1
        else:
            assert torch.equal(now["crop_q"], before["crop_q"]) and now["set_aside"] == 0
    assert redrawn and pairs.quarantine.names == ["case1"]
    assert caplog.text.count("Quarantined case1") == 1


def test_a_scan_damaged_where_no_crop_looks_is_in_no_pair_either(tmp_path):
    for i in range(3):
        write_scan(tmp_path / f"scans/case{i}.nii.gz", seed=i, shape=(31, 29, 150))
    build_store(tmp_path / "scans", tmp_path / "store", spacing=(3.0, 3.0, 4.0), progress=False)
    path = volume_path(tmp_path / "store", "case1", "hu")
    content = bytearray(path.read_bytes())
    array = blosc2.open(str(path))  # a chunk of an array that is gone cannot be read
    last = bytes(array.schunk.get_chunk(2))
    del array
    content[content.index(last) + len(last) // 2] ^= 0xFF
    path.write_bytes(content)
    pairs = dataset(VolumeStore(tmp_path / "store"))
    pairs.store.read_crop("case1", (0, 0, 0), CROP)  # its first chunk is whole
    assert all("case1" not in (pairs[i]["scan_q"], pairs[i]["scan_k"]) for i in range(PAIRS))
    assert pairs.quarantine.names == ["case1"]


def test_a_scan_is_verified_once_in_a_run(store):
    pairs, verified = dataset(store), []
    pairs.store = Watched(store.path, verified)
    read_all(pairs)
    assert sorted(verified) == sorted(set(verified)) and len(verified) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_restarts_draw_the_same_in_place_of_damage(damaged, workers):
    pairs = dataset(damaged)
    batches = list(sample_loader(pairs, 4, PAIRS // 4, workers))
    assert pairs.quarantine.names == ["case1"], "what workers meet is known to all"
    late = sample_loader(dataset(damaged), 4, PAIRS // 4)
    late.batch_sampler.start = 3
    for batch, again in zip(batches[3:], late, strict=True):
        assert torch.equal(batch["crop_q"], again["crop_q"]) and torch.equal(batch["crop_k"], again["crop_k"])
        assert batch["scan_k"] == again["scan_k"]


def test_too_much_damage_is_said_in_a_worker_too(damaged):
    loader = sample_loader(dataset(damaged, allowed=0), 4, PAIRS // 4, workers=1)
    with pytest.raises(StoreError, match=r"1 damaged scan\(s\) \(case1\), 0 allowed"):
        list(loader)


def test_a_lost_body_mask_quarantines_too(damaged):
    volume_path(damaged.path, "case1", "body").unlink()
    pairs = dataset(damaged)
    assert all("case1" not in (pairs[i]["scan_q"], pairs[i]["scan_k"]) for i in range(PAIRS))
    assert pairs.quarantine.names == ["case1"]


def test_two_patients_must_be_left(damaged):
    names = ["case0", "case1"]
    with pytest.raises(StoreError, match="fewer than 2 patient"):
        read_all(dataset(damaged, names=names))


def test_a_run_tells_of_its_damaged_scans_and_stops_at_too_many(damaged, tmp_path):
    pairs = dataset(damaged)
    engine = Engine(lambda engine, index: pairs[index]["set_aside"])
    QuarantineLog(pairs.quarantine, tmp_path / "run", every=2).attach(engine)
    engine.run(range(PAIRS))
    told = json.loads((tmp_path / "run" / "quarantine.json").read_text())
    assert told["scans"] == ["case1"] and 0 < told["step"] <= PAIRS
    resumed = Engine(lambda engine, index: None)
    QuarantineLog(dataset(damaged).quarantine, tmp_path / "run").attach(resumed)
    resumed.run(range(3))
    assert json.loads((tmp_path / "run" / "quarantine.json").read_text())["scans"] == ["case1"]
    pairs.quarantine.allowed = 0
    with pytest.raises(StoreError, match="1 damaged"):
        engine.run(range(PAIRS))


def test_a_negative_allowance_is_refused(store):
    with pytest.raises(ValueError, match="bad_scans_allowed must be at least 0, got -1"):
        dataset(store, allowed=-1)


def test_a_queue_of_queries_passes_over_damage(damaged):
    pairs = dataset(damaged, queue_length=2)
    assert all("case1" not in (pairs[i]["scan_q"], pairs[i]["scan_k"]) for i in range(PAIRS))
    assert np.unique([pairs[i]["scan_k"] for i in range(PAIRS)]).size > 2
