"""The segmentation bundles against bad data and settings that do not agree: every fault is found before the run, by name."""

import json
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from damage import nrrd_bytes, write_nifti, write_series
from seg_bundles import FLARE, TINY, TRIAL, bundle_run, configs, names_of, parser_of, write_case

AFFINE = np.diag([8.0, 7.0, 6.0, 1.0])
SAFE = {"device": "$torch.device('cpu')"}


def volume(shape=(28, 26, 22)):
    """A box of soft tissue and fat in air."""
    found = np.full(shape, -1000, np.int16)
    found[3:-3, 3:-3, 2:-2] = 40
    found[5:8, 4:-4, 3:-3] = -100
    return found


def write(path: Path, voxels=None, affine=AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume() if voxels is None else voxels, affine), path)
    return path


# -- one bad scan among good ones ---------------------------------------------------------------------


def mr(low=-47, high=833):
    rng = np.random.default_rng(0)
    found = np.zeros((28, 26, 22), np.int16)
    found[3:-3, 3:-3, 2:-2] = rng.integers(max(low, -47), high, (22, 20, 18))
    found[4, 4, 4] = low
    return found


def no_axes(header):
    header["srow_y"], header["qform_code"] = 0, 0


SHEARED = AFFINE + np.array([[0, 2, 0, 0], *[[0] * 4] * 3])
BAD = {
    "mr": (lambda p: write(p, mr()), "shows neither air nor fat (values -47 to 832, 0.00% of them below -50)"),
    "mr that rings": (lambda p: write(p, mr(low=-300)), "shows neither air nor fat (values -300 to 832, 0.01%"),
    "without intercept": (lambda p: write(p, volume() + 1024), "has no value below 0"),
    "air": (lambda p: write(p, np.full((28, 26, 22), -1000, np.int16)), "shows nothing but air"),
    "nan": (lambda p: write(p, np.full((28, 26, 22), np.nan, np.float32)), "holds values that are no numbers"),
    "slab": (lambda p: write(p, volume()[..., 9:14]), "is too thin: [28, 26, 5] voxels; at least 8 are needed"),
    "two channels": (lambda p: write(p, np.stack([volume()] * 2, -1)), "has 2 channels"),
    "sheared": (lambda p: write(p, affine=SHEARED), "has axes that are not at right angles"),
    "no axes": (lambda p: write_nifti(p, volume(), AFFINE, no_axes), "has axes that cannot be told"),
    "huge": (lambda p: write(p, affine=np.diag([80.0, 7.0, 6.0, 1.0])), "has a size that no patient has"),
    "cut short": (lambda p: p.write_bytes(write(p).read_bytes()[:-9]), "is cut short or damaged; copy it again"),
    "empty": (lambda p: p.write_bytes(b""), "is cut short or damaged"),
    "gone": (lambda p: p.symlink_to(p.parent / "nowhere.nii.gz"), "does not exist"),
}  # fmt: skip


def examined(folder, *names, **settings):
    parser = parser_of(*(names or ("inference",)), dataset_dir=str(folder), **(TINY | settings))
    return parser.get_parsed_content("examined")


@pytest.mark.parametrize("fault", BAD)
def test_a_scan_that_cannot_be_used_is_found_before_the_others_are_segmented(tmp_path, fault):
    make, why = BAD[fault]
    good = [write(tmp_path / f"{name}.nii.gz") for name in ("a", "c")]
    make(tmp_path / "b.nii.gz")
    looked = examined(tmp_path)
    assert [record["image"] for record in looked.usable] == [str(path) for path in good]
    (line,) = looked.table.splitlines()
    assert why in line and line.endswith(f": {tmp_path / 'b.nii.gz'}")


@pytest.mark.parametrize("scan", [
    volume(), volume()[3:-3, 3:-3, 2:-2], volume().clip(-175, 250), volume().astype(np.float32) + 0.5,
], ids=["whole", "cut to the body", "clipped to the window", "float"])  # fmt: skip
def test_ct_is_let_pass_whatever_was_done_to_it(tmp_path, scan):
    write(tmp_path / "a.nii.gz", scan)
    assert not examined(tmp_path).refused


def test_a_folder_of_dicom_says_what_reads_it(tmp_path):
    write(tmp_path / "a.nii.gz")
    write_series(tmp_path / "series")
    looked = examined(tmp_path)
    assert len(looked.usable) == 1
    assert f"holds DICOM; dcm2niix -z y -o IMAGES {tmp_path / 'series'} makes NIfTI of it" in looked.table
    shutil.copy(tmp_path / "series" / "slice000.dcm", tmp_path / "IM0001")
    assert len(examined(tmp_path).refused) == 2
    with pytest.raises(SystemExit, match="none of 1 scans can be used:\n.*dcm2niix"):
        bundle_run(
            "inference", dataset_dir=str(tmp_path / "series"), output_dir=str(tmp_path / "out"), **SAFE
        )
    problems = parser_of("train", dataset_dir=str(tmp_path / "series")).get_parsed_content("problems")
    assert "It holds DICOM; dcm2niix" in problems[0]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(parser_of("inference", **TINY).get_parsed_content("network_def").state_dict(), path)
    return path


def test_the_others_are_segmented_and_the_bad_ones_come_last(tmp_path, weights, capsys):
    for name in ("a", "c"):
        write(tmp_path / "d" / f"{name}.nii.gz")
    for name, fault in (("b", "mr"), ("e", "slab")):
        BAD[fault][0](tmp_path / "d" / f"{name}.nii.gz")
    settings = TINY | {
        "dataset_dir": str(tmp_path / "d"),
        "output_dir": str(tmp_path / "out"),
        "overlap": 0.25,
    }
    with pytest.raises(SystemExit) as ended:
        bundle_run("inference", checkpoint=str(weights), **settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_seg.nii.gz", "c_seg.nii.gz"]
    lines = str(ended.value.code).splitlines()
    assert lines[0].startswith("alice_seg: 2 of 4 scans are done; left out")
    assert [line.rsplit("/", 1)[1] for line in lines[1:]] == ["b.nii.gz", "e.nii.gz"]
    assert "2 of 4 scans follow; left out:" in capsys.readouterr().out  # and said before it begins


def test_training_names_every_bad_case_at_once_and_goes_on_without_them(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    write(data / "images" / "case_02_0000.nii.gz", mr())
    label = nib.load(data / "labels" / "case_05.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) + np.uint8(20), label.affine), label.get_filename())
    (data / "labels" / "case_03.nii.gz").write_bytes(b"")
    settings = TRIAL | {"dataset_dir": str(data), "output_dir": str(tmp_path / "run")}
    with pytest.raises(SystemExit) as stopped:
        bundle_run("train", **settings)
    told = str(stopped.value.code)
    assert (
        "3 of 6 cases cannot be used. Mend them, or go on without: --leave_out \"['case_02', 'case_03'"
        in told
    )
    last = {line.rsplit("/", 1)[1] for line in told.splitlines()[1:]}
    assert last == {"case_02_0000.nii.gz", "case_03.nii.gz", "case_05.nii.gz"}
    assert not (tmp_path / "run").exists()
    parser = parser_of("train", **settings, leave_out=["case_02", "case_03", "case_05"])
    assert not parser.get_parsed_content("problems") and not parser.get_parsed_content("examined").refused
    assert len(names_of(parser.get_parsed_content("cases").records)) == 3
    unknown = parser_of("train", **settings, leave_out=["case_99"]).get_parsed_content("problems")
    assert "leave_out: no case is called case_99" in unknown[0]


def test_an_evaluation_leaves_bad_cases_out_and_says_so(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    held_back = parser_of("train", dataset_dir=str(data), folds=2).get_parsed_content("cases").held_back
    write(Path(held_back[0]["image"]), mr())
    looked = examined(data, "train", "inference", "evaluate", folds=2)
    assert len(looked.usable) == len(held_back) - 1 and looked.refused[0].path == held_back[0]["image"]
    with pytest.raises(
        SystemExit, match="scans are done; left out, as they cannot be used:\n  shows neither"
    ):
        looked.finish()


@pytest.mark.parametrize("names, key", [
    (("inference",), "output_dir"), (("train",), "output_dir"), (("train",), "ckpt_dir"),
    (("train", "inference", "evaluate"), "output_dir"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_to_is_named_first(cohort, tmp_path, names, key):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "er", Path("/proc/deep")):
        settings = {"output_dir": str(tmp_path / "o"), "ckpt_dir": str(tmp_path / "o"), key: str(folder)}
        problems = parser_of(*names, dataset_dir=str(cohort), **settings).get_parsed_content("problems")
        assert [p for p in problems if p.startswith(f"{key}: {folder}") and "cannot be written to" in p], (
            problems
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content, told", [
    (b"{", "not readable as JSON"), (b"\xff\xfe\x00", "not readable as JSON"), (None, "cannot be read: No such file"),
])  # fmt: skip
def test_a_datalist_that_cannot_be_read_is_named(tmp_path, content, told):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    for name in ("train", "inference"):
        (problem,) = parser_of(name, dataset_dir=str(path)).get_parsed_content("problems")
        assert problem.startswith(f"dataset_dir: {path}") and told in problem


def test_monai_label_answers_with_the_sentence(tmp_path, monkeypatch):
    class HTTPException(Exception):  # as starlette's, which the server has; tests/label asks a real one
        def __init__(self, status_code, detail):
            self.status_code, self.detail = status_code, detail

    monkeypatch.setitem(sys.modules, "monailabel", sys)
    monkeypatch.setitem(sys.modules, "starlette.exceptions", SimpleNamespace(HTTPException=HTTPException))
    scan = tmp_path / "b.nii.gz"
    for fault in ("mr", "slab", "cut short"):
        BAD[fault][0](scan)
        steps = parser_of("inference").get_parsed_content("preprocessing").transforms[:3]
        with pytest.raises(HTTPException) as refused:
            reduce(
                lambda item, step: step(item), steps, {"image": str(scan)}
            )  # it calls the transforms one by one
        assert refused.value.status_code == 422
        assert (
            refused.value.detail.startswith(f"{scan} ")
            and BAD[fault][1].split("(")[0] in refused.value.detail
        )
    assert examined(tmp_path).refused[0].path == str(scan)


# -- other organs ---------------------------------------------------------------------------------


def data_set(folder, content, tail=""):
    """Six cases with three organs, and a dataset.json beside them."""
    for number in range(6):
        write_case(folder / "x", f"c{number}", AFFINE, "{}" + tail + ".nii.gz", organs=3)
    for one, other in (("images", "imagesTr"), ("labels", "labelsTr")):
        (folder / "x" / one).rename(folder / other)
    entries = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(6)]
    content = {k: entries if v == "entries" else v for k, v in content.items()}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


ORGANS = {"background": 0, "spleen": 1, "liver": 2, "pancreas": 3}
NUMBERED = {str(value): name for name, value in ORGANS.items()}
OTHERS = {
    "MSD": ({"labels": NUMBERED, "training": "entries"}, ""),
    "nnU-Net v1": ({"labels": NUMBERED, "modality": {"0": "CT"}, "training": "entries"}, "_0000"),
    "nnU-Net v2": ({"labels": ORGANS, "file_ending": ".nii.gz", "numTraining": 6}, "_0000"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("source", ["", "dataset.json", "imagesTr/.."])
def test_organs_that_are_numbered_otherwise_are_refused_and_can_be_mapped(tmp_path, kind, source):
    folder = data_set(tmp_path, *OTHERS[kind])
    settings = TINY | {"dataset_dir": str(folder / source)}
    (problem,) = parser_of("train", **settings).get_parsed_content("problems")
    assert "1 is 'spleen', 2 is 'liver', 3 is 'pancreas' in " in problem
    assert '--label_map "{1: 3, 2: 1, 3: 4}"' in problem and "['spleen', 'liver', 'pancreas']" in problem
    for way in ({"label_map": {1: 3, 2: "liver", 3: 4}}, {"labels": ["spleen", "liver", "pancreas"]}):
        parser = parser_of("train", **settings, **way)
        assert not parser.get_parsed_content("problems") and not parser.get_parsed_content("examined").refused
        assert len(parser.get_parsed_content("cases").records) == 6


def test_a_label_map_changes_values_in_training_and_evaluation(tmp_path):
    folder = data_set(tmp_path, *OTHERS["MSD"])
    settings = TINY | {"dataset_dir": str(folder), "label_map": {"1": 3, "2": "liver", "3": 0}}
    for names, key in (
        (("train",), "validate::preprocessing"),
        (("train", "inference", "evaluate"), "dataset::transform"),
    ):
        parser = parser_of(*names, **settings)
        record = parser.get_parsed_content("cases").records[0]
        voxels = parser.get_parsed_content(key)(record)["label"]
        assert set(torch.unique(voxels).tolist()) == {0, 1, 3}
    parser = parser_of(
        "train", **(settings | {"label_map": {1: 3, 2: 1}, "labels": ["liver", "b", "spleen"]})
    )
    (first, *_) = parser.get_parsed_content("examined").refused
    assert "label values [3.0] are not in label_map {1: 3, 2: 1}" in first.why


@pytest.mark.parametrize("label_map", [{1: 14}, {1: "heart"}, {"spleen": 3}, {1: -1}])
def test_a_label_map_that_maps_nothing_is_named(tmp_path, label_map):
    problems = parser_of("train", dataset_dir=str(tmp_path), label_map=label_map).get_parsed_content(
        "problems"
    )
    assert any(p.startswith("label_map: ") and "to 13 or to one of labels" in p for p in problems)


def test_an_lps_image_and_an_ras_label_of_one_place_are_one_case(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    for path in (data / "labels").iterdir():
        label = nib.load(path)
        turned = nib.orientations.axcodes2ornt(("L", "P", "S"))
        now = nib.orientations.io_orientation(label.affine)
        nib.save(label.as_reoriented(nib.orientations.ornt_transform(now, turned)), path)
    assert not examined(data, "train").refused
    for names, key in (
        (("train",), "validate::preprocessing"),
        (("train", "inference", "evaluate"), "dataset::transform"),
    ):
        read = []
        for folder in (cohort, data):
            parser = parser_of(*names, dataset_dir=str(folder), **TINY)
            record = parser.get_parsed_content("cases").records[1]
            read.append(torch.as_tensor(parser.get_parsed_content(key)(record)["label"]))
        assert torch.equal(*read)


# -- settings that must agree -----------------------------------------------------------------------


@pytest.mark.parametrize("names, settings, told", [
    (("train", "inference", "evaluate"), {"tolerances_mm": [2.0, 2.0]}, "tolerances_mm: [2.0, 2.0] are 2 for 13 labels"),
    (("train", "inference", "evaluate"), {"labels": ["a"], "tolerances_mm": [2.0] * 13}, "are 13 for 1 labels"),
    (("train",), {"labels": ["liver", "Liver"]}, "labels: liver is there twice"),
    (("inference",), {"labels": ["background", "liver"]}, "from value 1 on, without background"),
    (("train", "partial"), {"annotated": [1, 14]}, "annotated: [1, 14] are not label values; labels have 1 to 13"),
    (("train", "partial"), {"annotated": []}, "annotated: [] are not label values"),
    (("train",), {"roi_size": [64, 64, 40]}, "roi_size: UNETR takes three multiples of 16"),
    (("train", "swin_unetr"), {"roi_size": [96, 96, 48]}, "roi_size: SwinUNETR takes three multiples of 32"),
    (("inference",), {"roi_size": [64, 64]}, "roi_size: UNETR takes three multiples of 16"),
    (("train",), {"roi_size": [64, 32, 32], "rotate90_probability": 0.1}, "must be as long along x as along y"),
    (("train",), {"window_hu": [250, -175]}, "window_hu: [250, -175] are not a lower and a higher value"),
    (("inference",), {"spacing": [3, 3]}, "spacing: [3, 3] are not three lengths"),
    (("train",), {"epochs": 2, "val_interval": 3}, "val_interval: with 3 and 2 epochs no network would be validated"),
    (("train",), {"epochs": 2, "warmup_epochs": 3}, "warmup_epochs: 3 do not fit into 2 epochs"),
])  # fmt: skip
def test_settings_that_do_not_agree_are_named(names, settings, told):
    problems = parser_of(*names, **settings).get_parsed_content("settings_problems")
    assert len(problems) == 1 and told in problems[0]


def test_the_settings_of_every_config_agree():
    for names in (("train",), ("train", "unetr"), ("train", "swin_unetr"), ("train", "nnformer"), ("inference",),
                  ("train", "smoke"), ("train", "inference", "evaluate"), ("train", "inference", "smoke", "evaluate")):  # fmt: skip
        assert not parser_of(*names).get_parsed_content("settings_problems"), names


def test_tolerances_follow_the_organs_by_name():
    for labels, expected in ((["spleen", "tumour", "Duodenum"], [3.0, 2.0, 7.0]), (["a", "b"], [2.0, 2.0])):
        parser = parser_of("train", "inference", "evaluate", labels=labels)
        assert parser.get_parsed_content("tolerances_mm") == expected


def test_sawtooth_and_layer_decay_exclude_each_other():
    with pytest.raises(
        SystemExit, match=r"sawtooth.yaml has 2 groups of parameters, not 1\d; layer_decay.yaml"
    ):
        parser_of("train", "sawtooth", "layer_decay", **TINY, total_steps=100).get_parsed_content(
            "lr_scheduler"
        )


@pytest.mark.slow
def test_own_classes_are_trained_and_evaluated(cohort, tmp_path):
    """As a user types it: --labels of another number, with no word about tolerances."""
    for path in shutil.copytree(cohort, tmp_path / "data").glob("labels/*"):
        label = nib.load(path)
        voxels = np.asarray(label.dataobj)
        nib.save(nib.Nifti1Image(np.where(voxels > 3, 0, voxels).astype(np.uint8), label.affine), path)
    words = [
        "--bundle_root",
        str(FLARE),
        "--dataset_dir",
        str(tmp_path / "data"),
        "--labels",
        "['a','b','c']",
    ]
    small = [str(word) for key, value in TINY.items() for word in (f"--{key}", value)]
    short = ["--epochs", "1", "--crops_per_case", "1"]
    for names, more in (
        (("train",), ["--output_dir", tmp_path / "r", "--ckpt_dir", tmp_path / "r", *short]),
        (("train", "inference", "evaluate"), ["--output_dir", tmp_path / "e", "--checkpoint", tmp_path / "r" / "model_finetuned.pt"]),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(configs(*names)), *words, *small, *map(str, more)],
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "tolerances in mm: a 2, b 2, c 2" in done.stdout
        and (tmp_path / "e" / "surface_dice_raw.csv").is_file()
    )


@pytest.mark.parametrize(
    ("space", "version", "refused"),
    [
        ("LAS", "5.4.6", True),
        ("left-anterior-superior", "5.4.0", True),
        ("LPS", "5.4.6", False),
        ("LAS", "5.4.7", False),
    ],
)
def test_a_nrrd_that_an_old_itk_turns_is_refused(tmp_path, monkeypatch, space, version, refused):
    """ITK 5.4.0 to 5.4.6 read left-anterior-superior with x and y reversed, so that left is right."""
    monkeypatch.syspath_prepend(str(FLARE))
    from scripts_alice_seg_flare import checks

    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(space=space))
    monkeypatch.setattr(checks.metadata, "version", lambda name: version)
    assert ("pip install -U itk" in checks.file_problem(str(tmp_path / "a.nrrd"))) is refused
