"""From a folder of real scans to a run: what a user does first, command by command."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_bundle import command, losses

from custom.data.intake.scan_folder import Manifest
from custom.data.store.volume_store import VolumeStore


def alice(*words, expected=0):
    done = subprocess.run(
        [sys.executable, "-m", "custom.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expected, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_folder_of_real_scans_is_scanned_built_and_pre_trained_on(real_data, tmp_path):
    listed, store = tmp_path / "manifest.json", tmp_path / "store"
    alice("scan", real_data, "-o", listed, "--workers", 2, expected=3)  # 3: some were refused
    manifest = Manifest.load(listed)
    usable = {record.path for record in manifest.usable}
    assert len(usable) > 80 and {record.modality for record in manifest.usable} == {"CT"}
    told = alice("estimate", f"{command('', '')[5]}", "--dataset_dir", listed, "--nomeasure")
    assert f"{len(manifest.usable)}" in told.splitlines()[1] and "modelled" in told
    alice("build", listed, store, "--spacing", "[3.0,3.0,4.0]", "--workers", 2, "--check")
    assert sorted(VolumeStore(store).names) == sorted(record.id for record in manifest.usable)
    words = command(listed, tmp_path / "run", store_dir=store, iterations=12, probe_every=100, workers=1)
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.array(losses(tmp_path / "run"))
    assert len(found) == 12 and np.isfinite(found).all()
    assert found[-4:, 1].mean() < found[:4, 1].mean(), "the loss falls"
