"""The worked experiments: their overrides mean something, arms differ in what they should, and tables follow from rows."""

import json
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import REPO
from monai.bundle import ConfigParser

from custom.bundles.preflight import check_keys
from custom.evaluation.scores.csv_rows import write_rows

sys.path.insert(0, str(REPO / "benchmarks"))
import few_shot
import few_shot_plan
import few_shot_report

EXPERIMENTS = sorted(path.parent for path in (REPO / "docs" / "experiments").glob("*/plan.yaml"))
REPORTED = [folder for folder in EXPERIMENTS if (folder / "table.md").is_file()]


def small_plan(folder, **changes):
    """A copy of the OpenKBP experiment, changed."""
    shutil.copytree(
        REPO / "docs" / "experiments" / "openkbp",
        folder,
        ignore=shutil.ignore_patterns("rows", "*.md", "*.svg"),
    )
    content = ConfigParser.load_config_file(folder / "plan.yaml") | changes
    (folder / "plan.yaml").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return few_shot_plan.read_plan(folder)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_every_override_names_a_key_of_the_config_it_changes(folder):
    plan = few_shot_plan.read_plan(folder)
    changed = [("task.yaml", plan.bundle, "train.yaml"), ("task.yaml", plan.bundle, "inference.yaml")]
    changed += [("finetune.yaml", plan.bundle, "train.yaml")]
    changed += [(name, "alice_pretrain", "train.yaml") for files in plan.arms.values() for name in files]
    for name, bundle, config in changed:
        complete = ConfigParser.load_config_file(few_shot_plan.bundle_config(bundle, config))
        check_keys(complete, ConfigParser.load_config_file(few_shot_plan.config_of(folder, name)), name)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_crops_of_pre_training_are_those_of_fine_tuning_and_left_stays_left(folder):
    task = ConfigParser.load_config_file(folder / "task.yaml")
    pretrain = ConfigParser.load_config_file(folder / "pretrain.yaml")
    assert (pretrain["crop_size"], pretrain["spacing"]) == (task["roi_size"], task["spacing"])
    for name in ("pretrain.yaml", "finetune.yaml"):
        assert not {"method::view::flip", "flip_probability"} & set(
            ConfigParser.load_config_file(folder / name)
        )


def test_openkbp_has_the_runs_that_were_promised():
    plan = few_shot_plan.read_plan(REPO / "docs" / "experiments" / "openkbp")
    runs = list(few_shot_plan.runs_of(plan))
    assert len(runs) == len(set(runs)) == len({run.folder for run in runs}) == 6 + 27
    for run in (r for r in runs if r.labelled is not None and plan.arms[r.arm]):
        assert runs.index(few_shot_plan.Run(run.arm, run.seed)) < runs.index(run)
    assert few_shot_plan.Run("scratch", 0) not in runs


def test_arms_of_a_row_differ_in_the_encoder_alone(tmp_path):
    plan = few_shot_plan.read_plan(REPO / "docs" / "experiments" / "openkbp")
    commands = {}
    for arm in plan.arms:
        words = few_shot_plan.finetune_words(plan, few_shot_plan.Run(arm, 2, 10), tmp_path)
        commands[arm] = [word.replace(f"/{arm}/", "/ARM/") for word in words]
    added = len(commands["scratch"])
    assert commands["MAE"][:added] == commands["Alice"][:added] == commands["scratch"]
    assert commands["Alice"][added:] == [
        "--pretrained",
        str(tmp_path / "runs/ARM/pretrain/seed2/encoder.safetensors"),
    ]
    settings = dict(zip(commands["scratch"][4::2], commands["scratch"][5::2], strict=True))
    assert (settings["--labelled"], settings["--seed"], settings["--fold_seed"]) == ("10", "2", "2")


def test_mae_differs_from_alice_in_the_similarities_alone():
    plan = few_shot_plan.read_plan(REPO / "docs" / "experiments" / "openkbp")
    assert plan.arms["MAE"] == [*plan.arms["Alice"], "mae.yaml"]
    changed = ConfigParser.load_config_file(plan.folder / "mae.yaml")
    assert changed == {"method::loss::weight_dv": 0.0, "method::loss::weight_st": 0.0}


@pytest.mark.parametrize(("labelled", "name"), [(3, "3"), (10, "10"), (1.0, "all"), (0.1, "10pc"), (1, "1")])
def test_one_patient_and_everybody_have_different_names(labelled, name):
    assert few_shot_plan.labelled_name(labelled) == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_bakc": "x"}, "held_bakc"),
        ({"held_back": None}, "held_back"),
        ({"arms": {"scratch": [], "Alice": ["pretrian.yaml"]}, "compare": []}, "pretrian.yaml"),
        ({"compare": [["scratch", "alice"]]}, "alice"),
    ],
)
def test_a_plan_with_a_slip_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"plan\.yaml: .*{message}"):
        small_plan(tmp_path / "plan", **changes)


def test_patients_held_back_are_in_no_training_list_and_dropped_labels_are_gone(scans, tmp_path):
    plan = small_plan(tmp_path / "plan", held_back="^case[14]$", drop_labels=[2])
    few_shot.prepare(plan, scans, tmp_path / "work")
    lists = {
        path.stem: next(iter(json.loads(path.read_text()).values()))
        for path in (tmp_path / "work").glob("*.json")
    }
    names = {
        name: [record["image"].rsplit("/", 1)[1] for record in records] for name, records in lists.items()
    }
    assert names["held_back"] == ["case1.nii.gz", "case4.nii.gz"]
    assert names["unlabelled"] == [f"case{i}.nii.gz" for i in (0, 2, 3, 5)]
    assert not any("label" in record for record in lists["unlabelled"] + lists["held_back"])
    assert [record["fold"] for record in lists["labelled"]] == [1, 0, 1, 1, 0, 1]
    for record in lists["labelled"]:
        before = nib.load(scans / record["label"].rsplit("/", 1)[1])
        after = nib.load(record["label"])
        np.testing.assert_array_equal(after.affine, before.affine)
        expected = np.where(np.asarray(before.dataobj) == 1, 1, 0)
        np.testing.assert_array_equal(np.asarray(after.dataobj), expected)


def test_a_folder_of_other_settings_is_refused_but_another_comparison_is_not(scans, tmp_path):
    few_shot.prepare(small_plan(tmp_path / "a", held_back="^case1$"), scans, tmp_path / "work")
    few_shot.prepare(small_plan(tmp_path / "b", held_back="^case1$", compare=[]), scans, tmp_path / "work")
    with pytest.raises(ValueError, match="other settings"):
        few_shot.prepare(small_plan(tmp_path / "c", held_back="^case2$"), scans, tmp_path / "work")
    shutil.copytree(scans, tmp_path / "others")  # of the same names
    with pytest.raises(ValueError, match="other scans"):
        few_shot.prepare(
            small_plan(tmp_path / "d", held_back="^case1$"), tmp_path / "others", tmp_path / "work"
        )


@pytest.mark.parametrize("pattern", ["^nobody$", "^case"])
def test_nobody_or_everybody_held_back_is_refused(scans, tmp_path, pattern):
    with pytest.raises(ValueError, match="match held_back"):
        few_shot.prepare(small_plan(tmp_path / "plan", held_back=pattern), scans, tmp_path / "work")


def test_what_is_finished_is_not_run_again_and_a_failure_names_its_log(tmp_path):
    plan = small_plan(tmp_path / "plan")
    run = few_shot_plan.Run("scratch", 0, 3)
    rows = tmp_path / run.folder / "rows.csv"
    rows.parent.mkdir(parents=True)
    rows.write_text("finished")
    assert not few_shot.do(plan, run, tmp_path)
    assert rows.read_text() == "finished"
    with pytest.raises(RuntimeError, match=r"some\.log: exit code 1"):
        few_shot.execute(["custom.no_such_module"], tmp_path / "some.log")
    assert "No module named custom.no_such_module" in (tmp_path / "some.log").read_text()


def rows_of(gain, seeds=(0, 1, 2), cases=8):
    """Scores of a run whose DSC is ``gain`` above 0.5, give or take what patient and seed bring."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.02, (2, len(seeds), cases))
    return [
        {
            "case": f"p{case}", "fold": 0, "seed": seed, "protocol": "plain", "organ": organ, "label": 1 + o, "status": "ok",
            "dsc": 0.5 + gain + 0.1 * gain * noise[o, s, case] / 0.02 + noise[o, s, case], "nsd": 0.4 + gain, "hd95": 3.0,
            "reference_ml": 2.0, "prediction_ml": 2.0,
        }
        for s, seed in enumerate(seeds) for case in range(cases) for o, organ in enumerate(("cord", "parotid"))
    ]  # fmt: skip


@pytest.fixture
def reported(tmp_path):
    plan = small_plan(
        tmp_path / "plan",
        labelled=[3],
        arms={"scratch": [], "Alice": ["pretrain.yaml"]},
        compare=[["scratch", "Alice"]],
    )
    for arm, gain in (("scratch", 0.0), ("Alice", 0.2)):
        write_rows(few_shot_report.rows_file(plan, arm, 3), rows_of(gain))
    return plan


def test_the_table_states_means_and_marks_intervals_without_zero(reported):
    results = few_shot_report.read_results(reported)
    text = few_shot_report.markdown(reported, results)
    means = {arm: np.mean([row["dsc"] for row in results[arm, 3]]) for arm in reported.arms}
    assert f"| 3 | {means['scratch']:.3f} [" in text
    assert f"**{means['Alice'] - means['scratch']:+.3f} [" in text
    gain = means["Alice"] - means["scratch"]
    assert f"- **Alice against scratch**: better with 3 ({gain:+.3f}) labelled." in text
    assert f"worse with 3 ({-gain:+.3f})" in few_shot_report.verdict(reported, results, "Alice", "scratch")
    same = dict.fromkeys(results, results["scratch", 3])
    assert "not told apart with 3 (+0.000)" in few_shot_report.markdown(reported, same)
    assert "**+" not in few_shot_report.markdown(reported, same)


def test_the_figure_draws_every_seed_and_comparison(reported):
    left, right = few_shot_report.figure(reported, few_shot_report.read_results(reported)).axes
    assert [len(line.get_xdata()) for line in left.lines] == [3, 1, 3, 1]
    assert [label.get_text() for label in right.get_yticklabels()] == ["Alice - scratch, 3"]
    assert right.lines[-1].get_xdata()[0] == pytest.approx(0.2, abs=0.02)


def test_a_run_that_is_missing_is_named(reported, tmp_path):
    write_rows(few_shot_report.rows_file(reported, "Alice", 3), rows_of(0.2, seeds=(0, 2)))
    with pytest.raises(ValueError, match=r"Alice_labelled-3\.csv: lacks the seeds \[1\]"):
        few_shot_report.read_results(reported)
    assert few_shot_report.take_rows(reported, tmp_path / "nothing")[0] == "runs/scratch/labelled-3/seed0"


def test_what_is_dropped_is_not_scored(tmp_path):
    plan = small_plan(tmp_path / "plan", labelled=[3], seeds=[0], drop_labels=[2, 9])
    dropped = plan.organs[1]
    for arm in plan.arms:
        rows = [
            {**row, "organ": organ}
            for organ in plan.organs
            for row in rows_of(0.1, (0,))
            if row["label"] == 1
        ]
        write_rows(tmp_path / "work" / "runs" / arm / "labelled-3" / "seed0" / "rows.csv", rows)
    assert few_shot_report.take_rows(plan, tmp_path / "work") == []
    taken = few_shot_report.read_results(plan)["scratch", 3]
    assert {row["organ"] for row in taken} == set(plan.organs) - {dropped}


@pytest.mark.parametrize(
    "folder",
    [pytest.param(f, marks=pytest.mark.slow) if f.name == "openkbp" else f for f in REPORTED],
    ids=lambda folder: folder.name,
)
def test_the_committed_table_follows_from_the_committed_rows(folder):
    plan = few_shot_plan.read_plan(folder)
    text = few_shot_report.markdown(plan, few_shot_report.read_results(plan))
    assert (folder / "table.md").read_text(encoding="utf-8") == text
