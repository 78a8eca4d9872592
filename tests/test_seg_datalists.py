"""alice datalist: pairs checked, patients dealt as train.yaml deals them, every fault by file name."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from seg_bundles import names_of, parser_of, write_case

from custom.data.errors import ScanError
from custom.data.layouts import case_name
from custom.evaluation.splits.datalists import make_datalist, write_datalist

ORGANS = [f"organ {i}" for i in range(1, 14)]


def cohort(folder, shape=(22, 26, 22)):
    for number in range(1, 7):
        write_case(folder, f"P{number}_scan", np.diag([8.0, 7.0, 6.0, 1.0]), shape=shape)
    return folder


def test_a_datalist_and_its_folder_give_the_same_folds_and_subsets(tmp_path):
    cohort(tmp_path / "data")
    made = make_datalist(tmp_path / "data", tmp_path / "lists", classes=ORGANS)
    assert not made.problems
    write_datalist(tmp_path / "lists" / "d.json", made.content)
    assert Path(load_decathlon_datalist(tmp_path / "lists" / "d.json")[0]["image"]).is_file()
    for fold in range(5):
        for key in ("held_back", "training"):
            one, two = (
                names_of(
                    getattr(
                        parser_of(
                            "train", dataset_dir=str(tmp_path / d), fold=fold, labelled=2
                        ).get_parsed_content("cases"),
                        key,
                    )
                )
                for d in ("data", "lists/d.json")
            )
            assert one == two and one


def test_scans_of_one_patient_stay_together(tmp_path):
    cohort(tmp_path)
    write_case(tmp_path, "P1_later", np.eye(4) * [8, 7, 6, 1])
    made = make_datalist(tmp_path, tmp_path, classes=ORGANS, folds=3, patient_pattern=r"(P\d)_")
    rows = [(r["patient"], r["fold"], r["order"]) for r in made.content["training"]]
    assert len(rows) == 7 and len(set(rows)) == 6
    assert sorted(order for _, _, order in set(rows)) == list(range(6))


@pytest.mark.parametrize("fault, message", [
    ("value", "P1_scan.nii.gz: holds the values [14.0]; labels are 0 to 13."),
    ("empty", "P1_scan.nii.gz: is empty. Leave the case out (--leave_out), or pass --allow_empty."),
    ("grid", "P1_scan.nii.gz has shape (22, 25, 22)"),
    ("alone", "P1_scan_0000.nii.gz: has no label. Leave such images out: --labelled_only."),
    ("image", "P1_scan_0000.nii.gz: has no value below 0: it is not a CT, or not in Hounsfield units."),
])  # fmt: skip
def test_faults_are_named(tmp_path, fault, message):
    cohort(tmp_path)
    path = tmp_path / "labels" / "P1_scan.nii.gz"
    label = nib.load(path)
    voxels = np.array(label.dataobj)
    if fault == "value":
        voxels[0, 0, 0] = 14
    elif fault == "empty":
        voxels[:] = 0
    elif fault == "grid":
        voxels = voxels[:, 1:]
    if fault == "image":
        image = nib.load(tmp_path / "images" / "P1_scan_0000.nii.gz")
        shifted = np.array(image.dataobj) + 1024
        nib.save(nib.Nifti1Image(shifted, image.affine), image.get_filename())
    path.unlink()
    if fault != "alone":
        nib.save(nib.Nifti1Image(voxels, label.affine), path)
    problems = make_datalist(tmp_path, tmp_path, classes=ORGANS).problems
    assert len(problems) == 1 and message in problems[0]
    allowed = make_datalist(tmp_path, tmp_path, classes=[*ORGANS, "organ 14"], allow_empty=True).problems
    assert bool(allowed) == (fault in ("grid", "alone", "image"))


def test_case_names_are_those_of_train_yaml():
    case_of = parser_of("train").get_parsed_content("scripts").layouts.case_name
    for name, case in {
        "FLARE22_Tr_0001_0000.nii.gz": "FLARE22_Tr_0001", "img0001.nii.gz": "0001", "label0001.nii": "0001",
        "DET0000101_avg_seg.nii.gz": "DET0000101", "liver_0.nii.gz": "liver_0",
    }.items():  # fmt: skip
        assert case_of(f"a/b/{name}") == case_name(f"a/b/{name}") == case


def test_the_command_writes_nothing_for_a_faulty_folder(tmp_path):
    from custom.cli.scores import datalist

    cohort(tmp_path / "data")
    datalist(str(tmp_path / "data"), o=str(tmp_path / "good.json"))
    labels = json.loads((tmp_path / "good.json").read_text())["labels"]
    assert labels["10"] == "esophagus"
    (tmp_path / "data" / "labels" / "P2_scan.nii.gz").unlink()
    with pytest.raises(
        ValueError,
        match=r"data: 1 problem\(s\), so .*bad.json is not written.*\n  .*P2_scan_0000.nii.gz: has no label",
    ):
        datalist(str(tmp_path / "data"), o=str(tmp_path / "bad.json"))
    assert not (tmp_path / "bad.json").exists()


def test_cases_are_left_out_by_name_and_for_want_of_a_label(tmp_path):
    from custom.cli.scores import datalist

    def images(**options):
        datalist(str(tmp_path / "data"), o=str(tmp_path / "d.json"), folds=2, **options)
        return [Path(r["image"]).name[:2] for r in json.loads((tmp_path / "d.json").read_text())["training"]]

    cohort(tmp_path / "data")
    (tmp_path / "data" / "labels" / "P2_scan.nii.gz").unlink()
    assert images(labelled_only=True) == ["P1", "P3", "P4", "P5", "P6"]
    assert images(leave_out="P2_scan") == ["P1", "P3", "P4", "P5", "P6"]
    assert images(leave_out="P2_scan,P5_scan_0000") == ["P1", "P3", "P4", "P6"]
    with pytest.raises(ScanError, match=r"data: holds no case P9 to leave out\."):
        images(leave_out="P2_scan,P9")
