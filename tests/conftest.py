"""What tests share: a tiny store of two-blob patients, tiny networks, and the real scans where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from custom.data.store.build import build_store
from custom.data.store.volume_store import VolumeStore

torch.set_num_threads(min(torch.get_num_threads(), 2))
REPO = Path(__file__).resolve().parents[1]

TINY_VIT = {
    "in_channels": 1,
    "img_size": (32, 48, 16),
    "patch_size": 16,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_layers": 3,
    "num_heads": 4,
}


def write_scan(
    path: Path,
    seed: int,
    shape: tuple[int, int, int] = (61, 53, 47),
    spacing: tuple[float, ...] = (3.0, 3.0, 4.0),
) -> None:
    """A body of tissue in air with two organs, moved and sized by the seed, and its label."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).astype(float)
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    radii = np.array(shape) * np.array([0.42, 0.40, 0.70]) * rng.uniform(0.92, 1.08, 3)
    body = (((grid - centre) / radii) ** 2)[..., :2].sum(-1) < 1
    volume = np.where(body, 40.0 + 20 * np.sin(grid[..., 2] / 3), -1000.0)
    label = np.zeros(shape, np.uint8)
    for value, offset in ((1, (0.2, 0.05, 0.1)), (2, (-0.2, 0.0, -0.1))):
        place = centre + np.array(offset) * shape
        organ = (((grid - place) / (np.array(shape) * 0.11)) ** 2).sum(-1) < 1
        volume[organ & body] = 60.0 + 80 * value
        label[organ & body] = value
    volume[body] += rng.normal(0, 15, int(body.sum()))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(shape) * spacing / 2 + rng.uniform(-10, 10, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.astype(np.int16), affine), path)
    nib.save(nib.Nifti1Image(label, affine), path.with_name(path.name.replace(".nii.gz", "_label.nii.gz")))


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six labelled scans of six patients."""
    folder = tmp_path_factory.mktemp("scans")
    for i in range(6):
        write_scan(folder / f"case{i}.nii.gz", seed=i)
    return folder


@pytest.fixture(scope="session")
def store(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """The same six, built at their own spacing."""
    return build_store(scans, tmp_path_factory.mktemp("store"), spacing=(3.0, 3.0, 4.0), progress=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT that ALICE_TEST_DATA names; skips where it names none."""
    folder = os.environ.get("ALICE_TEST_DATA")
    if not folder:
        pytest.skip("ALICE_TEST_DATA names no folder of real scans")
    return Path(folder)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Six labelled cases for the segmentation bundles."""
    from seg_bundles import write_cohort

    return write_cohort(tmp_path_factory.mktemp("cohort"))
