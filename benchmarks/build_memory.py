"""Peak memory and time of `alice build` on one large CT, and whether its files read back as they were written.

    python benchmarks/build_memory.py [--shape 512,512,1000] [--spacing 1.5,1.5,2.0] [--suffix .nii.gz]

Writes a synthetic CT (a body with noise of 12 HU, on a table) to a temporary folder, builds it in a process of its
own, and prints that process's largest resident set, which counts every page that it touched.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

BUILD = """
import json, resource, sys, time
from custom.data.store.build import build_store
began = time.process_time()
store = build_store(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), progress=False, **json.loads(sys.argv[4]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(p.stat().st_size for p in store.path.rglob("*.b2nd"))
print(json.dumps({"peak": peak, "seconds": time.process_time() - began, "shape": store.shape(store.names[0]),
                  "bytes": size}))
"""


def write_ct(path: Path, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """One slice at a time, so that this process stays small."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    affine = np.diag([*spacing, 1.0])
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 12, (8, *shape[:2]))
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:2]], indexing="ij")
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        for z in range(shape[2]):
            wide = 0.8 + 0.1 * np.sin(6.3 * z / shape[2])
            body = (x / wide) ** 2 + (y / 0.6) ** 2 < 1
            lung = ((np.abs(x) - 0.35) / 0.2) ** 2 + (y / 0.35) ** 2 < 1
            plane = np.where(body, np.where(lung, -850.0, 40.0), -1000.0)
            plane[(np.abs(y - 0.72) < 0.02) & (np.abs(x) < 0.7)] = 150.0  # the table
            plane += np.roll(noise[rng.integers(8)], rng.integers(shape[0]), axis=0)
            file.write(np.asfortranarray(plane.astype("<i2")).tobytes(order="F"))


def main() -> None:
    """Print one line a file format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="512,512,1000")
    parser.add_argument("--voxel", default="0.8,0.8,0.8", help="mm of the scan")
    parser.add_argument("--spacing", default="1.5,1.5,2.0", help="mm of the store")
    parser.add_argument("--suffix", action="append", choices=[".nii", ".nii.gz"])
    parser.add_argument("--options", default="{}", help="of build_store, as JSON")
    given = parser.parse_args()
    shape = [int(v) for v in given.shape.split(",")]
    voxel, spacing = ([float(v) for v in text.split(",")] for text in (given.voxel, given.spacing))
    print(f"{'file':<9}{'on disk':>10}{'build, s':>10}{'peak RSS':>11}{'store':>9}  store's shape")
    for suffix in given.suffix or [".nii", ".nii.gz"]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scans" / f"large{suffix}"
            path.parent.mkdir()
            write_ct(path, shape, voxel)
            command = [sys.executable, "-c", BUILD, str(path.parent), f"{folder}/store", json.dumps(spacing)]
            done = subprocess.run([*command, given.options], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{suffix:<9}{path.stat().st_size / 1e6:>7.0f} MB{found['seconds']:>10.1f}"
                f"{found['peak'] / 1e6:>8.0f} MB{found['bytes'] / 1e6:>6.0f} MB  {found['shape']}"
            )


if __name__ == "__main__":
    main()
