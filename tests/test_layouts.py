"""Layouts of data sets: which label belongs to which image, and what the data call their label values."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPO
from damage import good_affine, good_volume, write_nifti
from seg_bundles import BUNDLES

from custom.data.errors import ScanError
from custom.data.grid.orientation import is_same_grid
from custom.data.intake.scan_folder import scan_folder
from custom.data.layouts import entries_of, misnamed, names_of_values, organ_of, pair, path_beside
from custom.data.scans import list_scans
from custom.data.store.build import build_store
from custom.data.store.volume_store import VolumeStore
from custom.evaluation.scores.rules import plain_rule
from custom.evaluation.scores.score_folder import score_folder
from custom.evaluation.splits.datalists import make_datalist


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_carry_the_same_rule(name):
    copy = REPO / "bundles" / name / f"scripts_{name}" / "layouts.py"
    assert copy.read_bytes() == (REPO / "custom" / "data" / "layouts.py").read_bytes()


@pytest.mark.parametrize("images, labels", [
    ("images/FLARE22_Tr_{}_0000.nii.gz", "labels/FLARE22_Tr_{}.nii.gz"),
    ("Training/img/img{}.nii.gz", "Training/label/label{}.nii.gz"),  # BTCV
    ("averaged-training-images/DET{}_avg.nii.gz", "averaged-training-labels/DET{}_avg_seg.nii.gz"),  # BTCV, registered
    ("imagesTr/spleen_{}.nii.gz", "labelsTr/spleen_{}.nii.gz"),  # MSD
    ("imagesTr/ab_{}_0000.nii.gz", "labelsTr/ab_{}.nii.gz"),  # nnU-Net
    ("volume-{}.nii", "segmentation-{}.nii"),  # LiTS
    ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz"),  # KiTS
    ("sub-{}/ct.nii.gz", "sub-{}/label.nii.gz"),
    ("P{}.mha", "P{}_seg.mha"),
    ("a/images/{}.nii.gz", "b/labels/{}.nii.gz"),  # apart, but nothing else is called so
])  # fmt: skip
def test_published_layouts_are_paired(images, labels):
    numbers = ["0001", "0002", "0011"]
    files = [Path("d") / pattern.format(n) for n in numbers for pattern in (images, labels)]
    found = pair(sorted(files))
    assert found.pairs == sorted(
        (Path("d") / images.format(n), Path("d") / labels.format(n)) for n in numbers
    )
    assert not (found.unlabelled or found.left_out or found.alone or found.doubles)


def test_what_has_no_partner_is_told_apart():
    files = ["imagesTr/a.nii", "imagesTr/b.nii", "labelsTr/a.nii", "labelsTr/c.nii", "imagesTs/d.nii", "imagesTs/a.nii",
             "imagesTr/a_seg.nii", "labelsTr/a.nii.gz"]  # fmt: skip
    found = pair(sorted(map(Path, files)))
    assert found.pairs == [(Path("imagesTr/a.nii"), Path("labelsTr/a.nii"))]
    assert found.unlabelled == [Path("imagesTr/b.nii")]  # among others that have a label
    assert found.left_out == [Path("imagesTs/a.nii"), Path("imagesTs/d.nii")]
    assert found.alone == [Path("labelsTr/c.nii"), Path("imagesTr/a_seg.nii")]
    assert found.doubles == [(Path("labelsTr/a.nii"), Path("labelsTr/a.nii.gz"))]


@pytest.mark.parametrize("content, images", [
    (["a.nii", {"image": "b.nii"}, 3], ["a.nii", "b.nii"]),
    ({"labels": ["x.nii"], "training": [{"image": ["a.nii"]}], "test": ["b"], "notes": ["no image"]}, ["a.nii", "b"]),
    ({"dataset": {"c1": {"images": ["a_0000.nii"], "label": "a.nii"}}}, ["a_0000.nii"]),
    ({"numTraining": 3, "file_ending": ".nii.gz", "labels": {"background": 0}}, []),
    ("text", []),
])  # fmt: skip
def test_datalists_of_every_form_are_read(content, images):
    assert [record["image"] for record in entries_of(content)] == images


def test_paths_in_a_json_are_those_of_any_system_and_of_nnunet_v1(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b_0000.nii.gz").touch()
    assert path_beside(tmp_path, "./a/b.nii.gz") == tmp_path / "a" / "b_0000.nii.gz"
    assert path_beside(tmp_path, "a\\b_0000.nii.gz") == tmp_path / "a" / "b_0000.nii.gz"
    (tmp_path / "a\\b").touch()
    assert path_beside(tmp_path, "a\\b") == tmp_path / "a\\b"  # a file that is called so
    assert path_beside(tmp_path, "gone.nii") == tmp_path / "gone.nii"


@pytest.mark.parametrize("labels, names", [
    ({"0": "background", "1": "spleen"}, [(0, "background"), (1, "spleen")]),
    ({"background": 0, "spleen": 1, "both": [1, 2]}, [(0, "background"), (1, "both"), (1, "spleen"), (2, "both")]),
    (["background", "spleen"], [(0, "background"), (1, "spleen")]),
    (["spleen"], [(1, "spleen")]),
    ("spleen", []),
])  # fmt: skip
def test_names_of_values_are_read_in_every_form(labels, names):
    assert names_of_values({"labels": labels}) == names


@pytest.mark.parametrize("names, label_map, wrong", [
    ([(0, "background"), (1, "Liver"), (2, "rkid")], {}, []),
    ([(1, "spleen")], {}, [(1, "spleen")]),  # MSD's Task09
    ([(1, "left atrium")], {}, [(1, "left atrium")]),
    ([(0, "liver"), (3, "bladder")], {}, [(0, "liver"), (3, "bladder")]),
    ([(1, "spleen"), (2, "liver")], {1: 0, 2: 1}, []),
    ([(1, "spleen"), (2, "liver")], {2: 1}, [(1, "spleen")]),  # a map names every value
    ([(1, "spleen")], {1: 2}, [(1, "spleen")]),
])  # fmt: skip
def test_names_that_are_not_ours_are_found(names, label_map, wrong):
    assert misnamed(names, ["liver", "right kidney"], label_map) == wrong


def test_published_spellings_of_an_organ_are_one_name():
    # BTCV's list in MONAI's tutorials; AMOS; TotalSegmentator
    for name in ("rkid", "Right_Kidney", "kidney_right", "right  kidney"):
        assert organ_of(name) == "right kidney"
    assert organ_of("postcava") == organ_of("IVC") == "inferior vena cava" and organ_of("arota") == "aorta"


# -- by alice scan, build, datalist and score ----------------------------------------------------------


def msd(folder: Path, labels: dict) -> Path:
    """A task of the MSD, with the flipped labels that some tools write: the same voxels at the same place."""
    for number in range(4):
        write_nifti(folder / "imagesTr" / f"a_{number}.nii.gz", good_volume(number))
        label = nib.Nifti1Image((good_volume(number) > 60).astype(np.uint8), good_affine())
        nib.save(nib.as_closest_canonical(label), write_nifti(folder / "labelsTr" / f"a_{number}.nii.gz"))
    write_nifti(folder / "imagesTs" / "a_9.nii.gz", good_volume(9))
    entries = [{"image": f"./imagesTr/a_{n}.nii.gz", "label": f"./labelsTr/a_{n}.nii.gz"} for n in range(4)]
    text = json.dumps({"labels": labels, "training": entries, "test": ["./imagesTs/a_9.nii.gz"]})
    (folder / "dataset.json").write_bytes(b"\xef\xbb\xbf" + text.replace("/", "\\\\").encode())
    return folder


def test_lps_images_and_ras_labels_of_one_place_are_read_alike_everywhere(tmp_path):
    folder = msd(tmp_path / "Task09", {"0": "background", "1": "spleen"})
    assert nib.aff2axcodes(nib.load(folder / "imagesTr" / "a_0.nii.gz").affine)[:2] == ("L", "P")
    assert nib.aff2axcodes(nib.load(folder / "labelsTr" / "a_0.nii.gz").affine)[:2] == ("R", "A")
    for source in (folder, folder / "dataset.json"):
        made = make_datalist(source, tmp_path, classes=["spleen"], folds=2)
        assert not made.problems and made.content["numTraining"] == 4
        assert [path.name for path in made.left_out] == ["a_9.nii.gz"]
        assert sum(scan.label is not None for scan in list_scans(source)) == 4
    records = scan_folder(folder, progress=False).records
    assert not [r for r in records if "orphan_label" in r.reasons or "label_mismatch" in r.reasons]
    build_store(folder, tmp_path / "s", (3.0, 3.1, 4.0), progress=False)
    store = VolumeStore(tmp_path / "s")
    shape = store.shape("a_0")
    label = store.read_label_crop("a_0", (0, 0, 0), shape)
    assert label.any() and ((store.read_crop("a_0", (0, 0, 0), shape) > 60) == (label == 1)).all()
    mirrored = tmp_path / "predictions"
    mirrored.mkdir()
    for number in range(4):  # a prediction on the image's own axes
        image = nib.load(folder / "imagesTr" / f"a_{number}.nii.gz")
        seg = nib.Nifti1Image((np.asarray(image.dataobj) > 60).astype(np.uint8), image.affine)
        nib.save(seg, mirrored / f"a_{number}_seg.nii.gz")
    rows = score_folder(mirrored, folder / "labelsTr", plain_rule(["spleen"], 2.0)).rows
    assert [row["dsc"] for row in rows] == [1.0] * 4


def test_grids_are_compared_by_place():
    shape, affine = (5, 6, 7), np.diag([-2.0, -3.0, 4.0, 1.0])
    flipped = affine.copy()
    flipped[0, 0], flipped[0, 3] = 2.0, -8.0
    swapped = affine[:, [1, 0, 2, 3]]
    assert is_same_grid(shape, affine, shape, flipped)
    assert is_same_grid(shape, affine, (6, 5, 7), swapped)
    moved = flipped.copy()
    moved[2, 3] += 0.2
    assert not is_same_grid(shape, affine, shape, moved)
    assert not is_same_grid(shape, affine, (5, 6, 8), affine)


def test_names_of_another_data_set_are_refused_by_datalist_and_score(tmp_path):
    folder = msd(tmp_path / "Task09", {"0": "background", "1": "spleen"})
    for source in (folder, folder / "dataset.json", folder / "imagesTr"):
        with pytest.raises(
            ScanError, match="1 is spleen; here 1 is liver.*--classes spleen|no image has a label"
        ):
            make_datalist(source, tmp_path, classes=["liver"])
    for source in (folder, folder / "labelsTr"):
        with pytest.raises(ScanError, match="1 is spleen; here 1 is liver.*--rules plain --names spleen"):
            score_folder(folder / "labelsTr", source, plain_rule(["liver"], 2.0))
