import json
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import SaveImage

from custom.cli.main import main
from custom.cli.scores import score
from custom.evaluation.scores.case_files import find_references, match_files, possible_cases
from custom.evaluation.scores.csv_rows import read_rows
from custom.evaluation.scores.metrics import case_rows, flare_scores
from custom.evaluation.scores.rules import FLARE22, FLARE22_ORGANS, plain_rule
from custom.evaluation.scores.score_folder import make_rule, score_folder, score_markdown

SHAPE = (23, 19, 17)
AFFINE = np.array([[-1.5, 0, 0, 12.0], [0, -1.7, 0, -7.0], [0, 0, 2.5, 31.0], [0, 0, 0, 1.0]])
TWO = plain_rule(("liver", "spleen"), 2.0)


def blocks(shift: int = 0, organs: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """Two boxes, labels 1 and 2."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[3 + shift : 11 + shift, 4:13, 2:9] = 1
    labels[3 + shift : 9 + shift, 3:11, 10:15] = 2
    return np.where(np.isin(labels, organs), labels, 0)


def write(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """FLARE22's layout: three references, predictions as MONAI's SaveImage writes them."""
    for number in (1, 2, 3):
        name = f"FLARE22_Tr_000{number}"
        write(tmp_path / "data" / "images" / f"{name}_0000.nii.gz", np.full(SHAPE, -1000, np.int16))
        write(tmp_path / "data" / "labels" / f"{name}.nii.gz", blocks())
        meta = {"filename_or_obj": f"{name}_0000.nii.gz", "original_affine": AFFINE}
        save = SaveImage(
            output_dir=tmp_path / "out", output_postfix="seg", separate_folder=True, print_log=False
        )
        save(MetaTensor(blocks(number - 1)[None], affine=AFFINE, meta=meta))
    return tmp_path


def test_what_monai_saves_is_found_and_scored_as_by_hand(cohort):
    assert next((cohort / "out").rglob("*.nii.gz")).name.endswith("_0000_seg.nii.gz")
    scored = score_folder(cohort / "out", cohort / "data", FLARE22)
    assert (scored.failed, scored.strangers) == ([], [])
    assert [row["case"] for row in scored.rows[::13]] == [f"FLARE22_Tr_000{n}" for n in (1, 2, 3)]
    expected = flare_scores(blocks(1), blocks(), (1.5, 1.7, 2.5))
    second = {row["organ"]: (row["dsc"], row["nsd"]) for row in scored.rows if row["case"].endswith("2")}
    assert second == expected
    assert second["liver"][0] == round(7 / 8, 4)
    volume_ml = 8 * 9 * 7 * 1.5 * 1.7 * 2.5 / 1000
    assert scored.rows[0]["reference_ml"] == pytest.approx(volume_ml)


def test_a_missing_prediction_is_a_failure_that_stays_in_the_mean(cohort):
    shutil.rmtree(cohort / "out" / "FLARE22_Tr_0002_0000")
    scored = score_folder(cohort / "out", cohort / "data" / "labels", TWO)
    assert scored.failed == ["FLARE22_Tr_0002"]
    rows = [row for row in scored.rows if row["case"] == "FLARE22_Tr_0002"]
    assert [(r["status"], r["dsc"], r["nsd"], r["hd95"]) for r in rows] == [("failed", 0, 0, math.inf)] * 2
    text = score_markdown(scored, TWO)
    liver = (1 + 0 + 6 / 8) / 3
    assert f"| liver | {liver:.4f} |" in text
    assert "3 cases, 1 of them without a prediction" in text
    assert "counted as 0: FLARE22_Tr_0002" in text
    assert "1 failed" in text


def test_a_failure_earns_nothing_for_organs_the_reference_lacks(tmp_path):
    write(tmp_path / "labels" / "a.nii.gz", blocks())
    write(tmp_path / "labels" / "b.nii.gz", blocks(organs=(1,)))
    write(tmp_path / "out" / "a.nii.gz", blocks())
    flare = score_folder(tmp_path / "out", tmp_path / "labels", FLARE22).rows[13:]
    assert {row["dsc"] for row in flare} == {row["nsd"] for row in flare} == {0.0}
    plain = score_folder(tmp_path / "out", tmp_path / "labels", TWO).rows[2:]
    assert plain[0]["dsc"] == 0.0
    assert math.isnan(plain[1]["dsc"])  # the plain rules score no absent organ, whoever finds it


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("img0007_seg", "label0007"),  # BTCV
        ("FLARE22_Tr_0001_0000_trans", "FLARE22_Tr_0001"),
        ("case_0000", "case_0000"),  # a number of its own, no channel
        ("liver_1_pred", "liver_1"),
        ("P3_seg", "P3_label"),
        ("scan.seg", "scan"),
        ("train_7_ct_trans", "train_7_label"),
    ],
)
def test_names_of_a_case(tmp_path, prediction, reference):
    path = write(tmp_path / "out" / f"{prediction}.nii.gz", blocks())
    write(tmp_path / "refs" / f"{reference}.nii.gz", blocks())
    (found,) = find_references(tmp_path / "refs")
    assert match_files(tmp_path / "out", [found]) == ({found.case: path}, [])


def test_a_case_number_is_not_cut_as_a_channel():
    assert possible_cases(Path("case_0001_seg.nii.gz")) == ["case_0001_seg", "case_0001"]


def test_a_datalist_gives_cases_and_their_folds(cohort):
    listed = [
        {
            "image": f"data/images/FLARE22_Tr_000{n}_0000.nii.gz",
            "label": f"data/labels/FLARE22_Tr_000{n}.nii.gz",
            "fold": n % 2,
        }
        for n in (1, 2, 3)
    ]
    datalist = cohort / "list.json"
    datalist.write_text(json.dumps({"training": listed}))
    rows = score_folder(cohort / "out", datalist, TWO, seed=4).rows
    assert [(row["case"][-1], row["fold"], row["seed"]) for row in rows[::2]] == [
        ("1", 1, 4),
        ("2", 0, 4),
        ("3", 1, 4),
    ]
    only = score_folder(cohort / "out", datalist, TWO, fold=1)
    assert {row["case"][-1] for row in only.rows} == {"1", "3"}
    assert (only.failed, only.strangers) == ([], [])
    with pytest.raises(ValueError, match=r"no case to score in fold 3; its folds are \[0, 1\]"):
        score_folder(cohort / "out", datalist, TWO, fold=3)


def test_a_bundles_split_says_which_cases_a_fold_has(cohort):
    shutil.rmtree(cohort / "out" / "FLARE22_Tr_0002_0000")  # of another fold, so no failure
    split = cohort / "folds.json"
    split.write_text(json.dumps({"folds": [["FLARE22_Tr_0002"], ["FLARE22_Tr_0003", "FLARE22_Tr_0001"]]}))
    scored = score_folder(cohort / "out", cohort / "data", TWO, split=split, fold=1)
    assert [(row["case"][-1], row["fold"]) for row in scored.rows[::2]] == [("1", 1), ("3", 1)]
    assert scored.failed == []
    with pytest.raises(ValueError, match="none of its files belongs to a case to score .FLARE22_Tr_0002"):
        score_folder(cohort / "out", cohort / "data", TWO, split=split, fold=0)
    for content, message in [
        ({"folds": [["FLARE22_Tr_0002"]]}, "'FLARE22_Tr_0001' .* is in none of its folds"),
        ({"folds": [["a"], ["a"]]}, "in two folds: a"),
        ({"splits": []}, "folds.json: not a split"),
    ]:
        split.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            score_folder(cohort / "out", cohort / "data", TWO, split=split)


def test_axes_stored_in_another_order_do_not_change_what_a_slice_is(tmp_path):
    reference, prediction = (np.where(b == 1, 5, 0).astype(np.uint8) for b in (blocks(), blocks(1)))
    prediction[3:12, 4:13, 8:] = 5  # beyond the last slice, which FLARE22's aorta does not count
    straight = case_rows(prediction, reference, (1.5, 1.7, 2.5), FLARE22, with_hd95=False)[4]
    order = (2, 0, 1)
    turned = np.eye(4)[:, [*order, 3]]
    write(tmp_path / "refs" / "a.nii.gz", reference.transpose(order), AFFINE @ turned)
    write(tmp_path / "out" / "a.nii.gz", prediction.transpose(order), AFFINE @ turned)
    row = score_folder(tmp_path / "out", tmp_path / "refs", FLARE22).rows[4]
    assert (row["dsc"], row["nsd"]) == (straight["dsc"], straight["nsd"])
    assert row["dsc"] == round(7 / 8, 4)


def spoil(cohort: Path, what: str) -> None:
    path = cohort / "out" / "FLARE22_Tr_0002_0000" / "FLARE22_Tr_0002_0000_seg.nii.gz"
    label = cohort / "data" / "labels" / "FLARE22_Tr_0002.nii.gz"
    match what:
        case "shape":
            write(path, blocks()[:-1])
        case "affine":
            write(path, blocks(), AFFINE + np.outer([0, 0.4, 0, 0], [0, 0, 0, 1]))
        case "label":
            write(path, np.where(blocks() == 2, 3, blocks()).astype(np.uint8))
        case "fraction":
            write(path, blocks() * np.float32(0.5))
        case "reference label":
            write(label, np.where(blocks() == 2, 9, blocks()).astype(np.uint8))
        case "empty reference":
            write(label, blocks() * np.uint8(0))
        case "damaged":
            path.write_bytes(path.read_bytes()[:60])
        case "twice":
            write(cohort / "out" / "FLARE22_Tr_0002.nii.gz", blocks())
        case "strangers":
            shutil.rmtree(cohort / "out")
            write(cohort / "out" / "other.nii.gz", blocks())


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "shape",
            r"FLARE22_Tr_0002_0000_seg.nii.gz has shape \(22, 19, 17\).*FLARE22_Tr_0002.nii.gz has \(23",
        ),
        ("affine", r"FLARE22_Tr_0002_0000_seg.nii.gz and .*FLARE22_Tr_0002.nii.gz .* 0.4 mm apart"),
        ("label", r"FLARE22_Tr_0002_0000_seg.nii.gz holds the label 3, but plain has 0 to 2"),
        ("fraction", r"FLARE22_Tr_0002_0000_seg.nii.gz holds the label 0.5, which is not an integer"),
        ("reference label", r"labels/FLARE22_Tr_0002.nii.gz holds the label 9"),
        ("empty reference", r"labels/FLARE22_Tr_0002.nii.gz: the reference holds no organ"),
        ("damaged", r"FLARE22_Tr_0002_0000_seg.nii.gz: (truncated|not a readable image)"),
        ("twice", r"FLARE22_Tr_0002.nii.gz and .*_seg.nii.gz both belong to case 'FLARE22_Tr_0002'"),
        ("strangers", r"no file is named after a case. It holds 'other.nii.gz'.*'FLARE22_Tr_0001'"),
    ],
)
def test_bad_files_are_refused_by_name_and_nothing_is_written(cohort, what, message):
    spoil(cohort, what)
    with pytest.raises(ValueError, match=message):
        score(
            str(cohort / "out"),
            str(cohort / "data"),
            rules="plain",
            names="liver,spleen",
            o=str(cohort / "r.csv"),
        )
    assert not (cohort / "r.csv").exists()


def test_a_header_rounded_to_float32_is_the_same_grid(cohort):
    path = cohort / "out" / "FLARE22_Tr_0002_0000" / "FLARE22_Tr_0002_0000_seg.nii.gz"
    write(path, blocks(), AFFINE * (1 + 1e-6))
    assert score_folder(cohort / "out", cohort / "data", TWO).failed == []


def test_rules_of_a_name(tmp_path):
    assert make_rule("flare22") is FLARE22
    assert make_rule("plain", "liver, spleen").tolerances_mm == (2.0, 2.0)
    assert make_rule("plain", ("liver", "spleen"), (1, 3)).tolerances_mm == (1.0, 3.0)
    channels = {"0": "background"} | {str(i): organ for i, organ in enumerate(FLARE22_ORGANS, 1)}
    metadata = {"network_data_format": {"outputs": {"pred": {"channel_def": channels}}}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    assert make_rule("plain", str(tmp_path / "metadata.json"), 3).organs == FLARE22_ORGANS
    (tmp_path / "other.json").write_text("{}")
    for arguments, message in [
        (("amos",), "no rules 'amos'; choose among flare22, btcv, plain"),
        (("flare22", "liver"), "fix organs and tolerances"),
        (("btcv", None, 2.0), "fix organs and tolerances"),
        (("plain",), "need the organs in label order"),
        (("plain", "liver,liver"), "Two labels have one name"),
        (("plain", "liver,spleen", (1, 2, 3)), "2 organs and 3 tolerances"),
        (("plain", str(tmp_path / "other.json")), "other.json: not the metadata.json of a bundle"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_rule(*arguments)


def test_the_command_writes_rows_and_says_what_was_left_out(cohort, capsys):
    write(cohort / "out" / "other_seg.nii.gz", blocks())
    score(
        str(cohort / "out"),
        str(cohort / "data"),
        rules="plain",
        names=("liver", "spleen"),
        o=str(cohort / "new" / "rows.csv"),
        cases=("FLARE22_Tr_0001", "FLARE22_Tr_0003"),
        fold=2,
    )
    rows = read_rows(cohort / "new" / "rows.csv")
    assert [(row["case"][-1], row["fold"], row["organ"]) for row in rows] == [
        ("1", 2, "liver"),
        ("1", 2, "spleen"),
        ("3", 2, "liver"),
        ("3", 2, "spleen"),
    ]
    said = capsys.readouterr().out
    assert "Left out, since no reference belongs to them: 1 files" in said and "other_seg.nii.gz" in said
    with pytest.raises(ValueError, match=r"No reference for the case\(s\) \['0009'\]"):
        score(str(cohort / "out"), str(cohort / "data"), cases="0009", o=str(cohort / "x.csv"))


@pytest.mark.parametrize(
    "label_map", ["{7: 1, 3: 2}", "{'7': 1, 3: 'liver'}", "{7: 'spleen', 3: 2, 9: background}"]
)
def test_references_that_number_organs_otherwise_are_mapped(tmp_path, label_map, capsys):
    rng = np.random.default_rng(0)
    ours = rng.integers(0, 3, (8, 8, 8)).astype(np.uint8)
    theirs = np.array([9, 7, 3], np.uint8)[ours]  # 9 is of another structure
    write(tmp_path / "out" / "a.nii.gz", ours)
    write(tmp_path / "refs" / "labels" / "a.nii.gz", theirs)
    content = {"labels": {"0": "background", "3": "liver", "7": "spleen", "9": "heart"}, "name": "x"}
    (tmp_path / "refs" / "dataset.json").write_text(json.dumps(content))
    words = [
        "score",
        str(tmp_path / "out"),
        str(tmp_path / "refs" / "labels"),
        "--rules",
        "plain",
        "--names",
        "spleen,liver",
    ]
    words += ["-o", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--label_map" in capsys.readouterr().err
    main([*words, "--label_map", label_map])
    assert [row["dsc"] for row in read_rows(tmp_path / "rows.csv")] == [1.0, 1.0]


@pytest.mark.parametrize("label_map", ["{1: 3}", "{1: kidney}", "{liver: 1}", "spleen", "{1: "])
def test_a_label_map_that_maps_nothing_of_the_rule_is_refused(tmp_path, label_map, capsys):
    words = ["score", str(tmp_path), str(tmp_path), "--rules", "plain", "--names", "spleen,liver"]
    with pytest.raises(SystemExit):
        main([*words, "--label_map", label_map])
    assert "label_map" in capsys.readouterr().err
