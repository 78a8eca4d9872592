"""Small files that promise much: what is inflated is bound by the header and by ``most_bytes``, and is inflated once."""

import bz2
import gzip
import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from damage import good_affine, mha_bytes, nrrd_bytes, write_nifti, write_series

from custom.data.errors import ScanError
from custom.data.formats.dicom_volume import read_series
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import Fault, Reason
from custom.data.store.build import build_store

SHAPE = (400, 401, 402)  # 129 MB of zeros, in some 130 kB
PROMISED = 2 * 400 * 401 * 402


def zeros(pack):
    content = pack.compress(bytes(PROMISED))
    return content + pack.flush()


def small_mha(folder):
    head = mha_bytes(DimSize="400 401 402", ElementSpacing="1 1 1", CompressedDataSize=None)
    content = head[: head.index(b"LOCAL\n") + 6] + zeros(zlib.compressobj(9))
    (folder / "a.mha").write_bytes(content)


def small_nrrd(folder, encoding, pack):
    head = nrrd_bytes(encoding=encoding, sizes="400 401 402", space_directions="(1,0,0) (0,1,0) (0,0,1)")
    content = head[: head.index(b"\n\n") + 2] + zeros(pack)
    (folder / f"{encoding}.nrrd").write_bytes(content)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    small_mha(folder)
    small_nrrd(folder, "gzip", zlib.compressobj(9, wbits=31))
    small_nrrd(folder, "bzip2", bz2.BZ2Compressor())
    write_nifti(folder / "a.nii.gz", np.zeros(SHAPE, np.int16), np.eye(4))
    return folder


CODE = """
import json, os, resource, sys
from pathlib import Path
from custom.data.intake.examine import run_job
from custom.data.intake.scan_record import Job, Rules

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

for path in sorted(Path(sys.argv[1]).iterdir()):
    if os.fork() == 0:  # a process of its own for each file
        before = peak()
        (record,), _ = run_job(Job(path.parent, path.name, "file", ""), Rules(most_bytes=int(sys.argv[2])))
        print(json.dumps([path.name, path.stat().st_size, record.reasons, peak() - before]), flush=True)
        os._exit(0)
    os.wait()
"""


def peaks(folder, most_bytes):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(most_bytes)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="measures memory by resource")
def test_a_small_file_costs_no_more_memory_than_it_promises_once(bombs):
    measured = peaks(bombs, PROMISED)
    assert len(measured) == 4
    for name, size, reasons, peak in measured:
        assert size < 600_000 and reasons == ["constant"], name
        assert 0.9 * PROMISED < peak < 1.3 * PROMISED, f"{name}: {peak / 1e6:.0f} MB"


@pytest.mark.skipif(sys.platform == "win32", reason="measures memory by resource")
def test_what_is_over_the_limit_costs_nothing(bombs):
    for name, _, reasons, peak in peaks(bombs, PROMISED - 1):
        assert reasons == ["too_large"] and peak < 20e6, f"{name}: {peak / 1e6:.0f} MB"


@pytest.mark.parametrize("spacing", ["60 60 60", "9 9 9", "0 1 1"])
def test_an_impossible_grid_is_refused_before_its_voxels_are_read(tmp_path, spacing):
    head = mha_bytes(DimSize="400 401 402", ElementSpacing=spacing)
    (tmp_path / "a.mha").write_bytes(head[: head.index(b"LOCAL\n") + 6] + zeros(zlib.compressobj(9)))
    tracemalloc.start()
    with pytest.raises(Fault) as fault:
        open_scan(tmp_path / "a.mha")
    assert tracemalloc.get_traced_memory()[1] < 5e6 and fault.value.reason is Reason.BAD_SPACING
    tracemalloc.stop()


def test_a_scan_of_huge_voxels_does_not_become_a_huge_volume(tmp_path):
    """41 x 37 x 23 voxels of 30 mm would be 24 million of 1.5 x 1.5 x 2 mm."""
    write_nifti(tmp_path / "scans" / "a.nii.gz", affine=np.diag([30.0, 30, 30, 1]))
    with pytest.raises(
        ScanError, match=r"a\.nii\.gz: has \d+ bytes of voxels at .* most_bytes is 10000000. Leave it"
    ):
        build_store(tmp_path / "scans", tmp_path / "store", most_bytes=10_000_000, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_limit_holds_for_every_format_of_a_build(bombs, tmp_path):
    with pytest.raises(ScanError) as refusal:
        build_store(bombs, tmp_path, most_bytes=PROMISED - 1, bad_scans_allowed=0, progress=False)
    assert str(refusal.value).count("promises more data than the file can hold or most_bytes allows") == 4


def test_a_series_of_huge_slices_is_refused_before_one_is_decoded(tmp_path, monkeypatch):
    write_series(tmp_path)
    monkeypatch.setattr("custom.data.formats.dicom_volume._decode", lambda one: pytest.fail("decoded"))
    with pytest.raises(ScanError, match="most_bytes allows"):
        read_series(sorted(tmp_path.iterdir()), most_bytes=10_000)


def test_what_is_inflated_is_what_was_packed(tmp_path):
    """In blocks, of all formats; a byte more or less, or another checksum, is noticed."""
    volume = np.random.default_rng(0).integers(-1000, 1000, (37, 41, 23)).astype(np.int16)
    raw = volume.tobytes(order="F")
    head = nrrd_bytes(volume, encoding="bzip2")
    (tmp_path / "b.nrrd").write_bytes(head[: head.index(b"\n\n") + 2] + bz2.compress(raw))
    (tmp_path / "g.nrrd").write_bytes(nrrd_bytes(volume))
    (tmp_path / "m.mha").write_bytes(mha_bytes(volume))
    write_nifti(tmp_path / "n.nii.gz", volume, good_affine())
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(open_scan(path).raw, volume, err_msg=path.name)
    head = mha_bytes(volume, CompressedDataSize=None)
    head, packed = head[: head.index(b"LOCAL\n") + 6], zlib.compress(raw)
    wrong = {
        Reason.TRUNCATED: [packed[:-1], zlib.compress(raw[:-1]), packed[:1000]],
        Reason.BAD_HEADER: [zlib.compress(raw + b"x")],
        Reason.BAD_CHECKSUM: [packed[:-4] + b"0000", b"x" + packed, gzip.compress(raw)],
    }
    for reason, contents in wrong.items():
        for content in contents:
            (tmp_path / "m.mha").write_bytes(head + content)
            with pytest.raises(Fault) as fault:
                open_scan(Path(tmp_path / "m.mha"))
            assert fault.value.reason is reason
