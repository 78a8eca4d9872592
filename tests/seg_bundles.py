"""A small cohort, and the segmentation bundles' configs, for their tests."""

from pathlib import Path

import nibabel as nib
import numpy as np
from conftest import REPO
from monai.bundle import ConfigParser
from monai.bundle.scripts import run

from custom.evaluation.scores.rules import BTCV_ORGANS, FLARE22_ORGANS

BUNDLES = {"alice_seg_flare": FLARE22_ORGANS, "alice_seg_btcv": BTCV_ORGANS}
FLARE = REPO / "bundles" / "alice_seg_flare"
SHAPE = (28, 26, 22)
TINY = {
    "network_def::feature_size": 4,
    "network_def::hidden_size": 48,
    "network_def::mlp_dim": 96,
    "network_def::num_heads": 4,
    "roi_size": [32, 32, 16],
    "spacing": [8.0, 8.0, 8.0],
    "device": "$torch.device('cpu')",
}
SMALL_NNFORMER = {"network_def::embed_dim": 12, "network_def::num_heads": [1, 2, 4, 8]}
TRIAL = TINY | {"epochs": 1, "crops_per_case": 1, "learning_rate": 1.0e-3, "overlap": 0.25}


def write_case(folder, case, affine, image_name="{}_0000.nii.gz", organs=13, shape=SHAPE):
    """A box of tissue in air, with one small box of each organ, all values told apart by the case."""
    rng = np.random.default_rng(len(case) + sum(map(ord, case)))
    volume = np.full(shape, -1000, np.int16)
    volume[3:-3, 3:-3, 2:-2] = rng.integers(-50, 60, (shape[0] - 6, shape[1] - 6, shape[2] - 4))
    labels = np.zeros(shape, np.uint8)
    for organ in range(1, organs + 1):
        x, y, z = 4 + 5 * (organ % 4), 4 + 5 * (organ // 4), 4 + organ % 3 * 4
        labels[x : x + 4, y : y + 4, z : z + 4] = organ
        volume[labels == organ] = 60 + 10 * organ
    for kind, array, name in (
        ("images", volume, image_name.format(case)),
        ("labels", labels, f"{case}.nii.gz"),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / kind / name)


def oblique():
    turn = 0.15
    affine = np.diag([-7.0, -8.0, 9.0, 1.0])
    affine[:3, :3] = (
        np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        @ affine[:3, :3]
    )
    affine[:3, 3] = [60, 70, -100]
    return affine


def write_cohort(folder):
    """Six cases, on straight and on oblique grids."""
    for number in range(1, 7):
        write_case(folder, f"case_{number:02d}", oblique() if number % 2 else np.diag([8.0, 7.0, 6.0, 1.0]))
    return folder


def configs(*names, bundle=FLARE):
    return [str(bundle / "configs" / f"{name}.yaml") for name in names]


def bundle_run(*names, bundle=FLARE, **settings):
    run(config_file=configs(*names, bundle=bundle), bundle_root=str(bundle), logging_file=False, **settings)


def parser_of(*names, bundle=FLARE, **settings):
    parser = ConfigParser()
    parser.read_config(configs(*names, bundle=bundle))
    parser.update({"bundle_root": str(bundle), **settings})
    return parser


def names_of(records):
    return {Path(record["image"]).name for record in records}
