"""alice compare-methods: a plan means what it says, arms differ in what they should, and tables follow from rows."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import REPO
from monai.bundle import ConfigParser

from custom.bundles.preflight import check_keys
from custom.cli.main import main
from custom.errors import AliceError
from custom.evaluation.scores.csv_rows import write_rows
from custom.processes import locked
from custom.study import plan as plans
from custom.study import report, sweep
from custom.study.plan import Run, read_plan

EXPERIMENTS = sorted(path.parent for path in (REPO / "docs" / "experiments").glob("*/plan.yaml"))
REPORTED = [folder for folder in EXPERIMENTS if (folder / "table.md").is_file()]
OPENKBP = REPO / "docs" / "experiments" / "openkbp"


def small_plan(folder, **changes):
    """A copy of the OpenKBP experiment, changed; None takes a key out."""
    shutil.copytree(OPENKBP, folder, ignore=shutil.ignore_patterns("rows", "*.md", "*.svg"))
    content = ConfigParser.load_config_file(folder / "plan.yaml") | changes
    (folder / "plan.yaml").write_text(
        yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    )
    return read_plan(folder)


# -- the plan ------------------------------------------------------------------


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_every_override_names_a_key_of_the_config_it_changes(folder):
    plan = read_plan(folder)
    for network in plan.networks:
        stages = [plan.pretrain_files(network, arm) for arm in plans.trained_arms(plan)]
        if plan.labelled:
            stages += [plan.finetune_files(network, way) for way in plan.ways] + [
                plan.inference_files(network)
            ]
        for base, *overrides in stages:
            complete = ConfigParser.load_config_file(base)
            for path in overrides:
                check_keys(complete, ConfigParser.load_config_file(path), path.name)
                complete |= ConfigParser.load_config_file(path)


@pytest.mark.parametrize(
    "folder", [f for f in EXPERIMENTS if (f / "task.yaml").is_file()], ids=lambda f: f.name
)
def test_crops_of_pre_training_are_those_of_fine_tuning_and_left_stays_left(folder):
    task = ConfigParser.load_config_file(folder / "task.yaml")
    pretrain = ConfigParser.load_config_file(folder / "pretrain.yaml")
    assert (pretrain["crop_size"], pretrain["spacing"]) == (task["roi_size"], task["spacing"])
    for name in ("pretrain.yaml", "finetune.yaml"):
        assert not {"method::view::flip", "flip_probability"} & set(
            ConfigParser.load_config_file(folder / name)
        )


def test_openkbp_has_the_runs_that_were_promised():
    plan = read_plan(OPENKBP)
    runs = list(plans.runs_of(plan))
    assert len(runs) == len(set(runs)) == len({run.folder for run in runs}) == 6 + 27
    for run in (r for r in runs if r.labelled is not None and plan.arms[r.arm]):
        assert runs.index(Run("unetr", run.arm, run.seed)) < runs.index(run)
    assert Run("unetr", "scratch", 0) not in runs


def test_networks_ways_and_the_bundle_as_it_stands(tmp_path):
    networks = {"unetr": None, "swin": {"pretrain": ["swin.yaml"], "finetune": ["swin_unetr.yaml"]}}
    ways = {"tuned": None, "frozen": ["frozen.yaml"]}
    plan = small_plan(
        tmp_path / "p", networks=networks, ways=ways, arms={"Alice": ["train.yaml"]}, compare=[], labelled=[3]
    )
    names = [path.name for path in plan.pretrain_files("swin", "Alice")]
    assert names == ["train.yaml", "swin.yaml"]
    names = [path.name for path in plan.finetune_files("swin", "frozen")]
    assert names == ["train.yaml", "swin_unetr.yaml", "task.yaml", "finetune.yaml", "frozen.yaml"]
    assert [path.name for path in plan.inference_files("swin")] == [
        "inference.yaml",
        "swin_unetr.yaml",
        "task.yaml",
    ]
    assert len(list(plans.runs_of(plan))) == 3 * 2 * (1 + 2)


def test_yaml_numbers_that_are_text_are_numbers(tmp_path):
    plan = small_plan(
        tmp_path / "p",
        budget={"flops": "1e9"},
        choose={"learning_rate": ["1e-3"], "scans": "x", "by": "linear"},
    )
    assert plan.budget == {"flops": 1e9} and plan.rates == [1e-3]


def test_every_arm_tries_the_same_rates(tmp_path):
    choose = {"learning_rate": [1e-3, 1e-2], "scans": "^train_6", "by": "linear"}
    plan = small_plan(tmp_path / "p", choose=choose)
    tried = list(plans.trials_of(plan))
    assert [(run.arm, run.rate) for run in tried] == [
        ("MAE", 1e-3),
        ("MAE", 1e-2),
        ("Alice", 1e-3),
        ("Alice", 1e-2),
    ]
    assert len({run.folder for run in tried}) == 4


@pytest.mark.parametrize(("labelled", "name"), [(3, "3"), (10, "10"), (1.0, "all"), (0.1, "10pc"), (1, "1")])
def test_one_patient_and_everybody_have_different_names(labelled, name):
    assert plans.labelled_name(labelled) == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_bakc": "x"}, "held_bakc"),
        ({"held_back": None}, "held_back"),
        ({"held_back": "("}, "no regular expression"),
        ({"arms": ["scratch"]}, "arms is"),
        ({"arms": {"scratch": [], "Alice": ["pretrian.yaml"]}, "compare": []}, "pretrian.yaml"),
        ({"arms": {"../../x": []}, "compare": []}, "names folders"),
        ({"compare": [["scratch", "alice"]]}, "alice"),
        ({"networks": {"unet": {"pretrained": []}}}, "network unet: unknown keys"),
        ({"networks": {"swin": {"finetune": ["swinunetr.yaml"]}}}, "swinunetr.yaml"),
        ({"ways": {"frozen": ["frozn.yaml"]}}, "frozn.yaml"),
        ({"bundle": "alice_seg_brats"}, "alice_seg_brats"),
        ({"budget": {"epochs": 3}}, "one of crops, seconds, flops"),
        ({"budget": {"crops": 3, "seconds": 4}}, "one of crops"),
        ({"budget": {"crops": -1}}, "above 0"),
        ({"budget": {"crops": "many"}}, "above 0"),
        ({"choose": {"learning_rate": [1e-3], "scans": "^train_6"}}, "it needs"),
        ({"choose": {"learning_rate": [], "scans": "^train_6", "by": "linear"}}, "rates that every arm tries"),
        ({"choose": {"learning_rate": [1e-3], "scans": "^train_6", "by": "dice"}}, "retrieval, linear, place_mm"),
        ({"seeds": []}, r"lacks \['seeds'\]"),
        ({"seeds": [0, True]}, "seeds are"),
        ({"seeds": [0, 0, 1]}, "one value twice"),
        ({"labelled": [0]}, "labelled is"),
        ({"labelled": [1.5]}, "labelled is"),
        ({"held_back": ""}, "lacks"),
        ({"choose": {"learning_rate": [1e-3], "scans": "", "by": "linear"}}, "it needs scans"),
        ({"choose": {"learning_rate": [1e-3, 1e-3], "scans": "x", "by": "linear"}}, "one value twice"),
        ({"budget": {"seconds": float("inf")}}, "above 0"),
        ({"drop_labels": ["x"]}, "drop_labels is"),
        ({"compare": [["MAE", "MAE"]]}, "different arms"),
        ({"compare": [5]}, "different arms"),
        ({"arms": {"A": [], "a": []}, "compare": []}, "but for capitals"),
        ({"arms": {1: []}, "compare": []}, "names folders"),
        ({"arms": {"A": "mae.yaml"}, "compare": []}, "give a list of override files"),
        ({"networks": {"a": 5}}, "network a"),
        ({"networks": {"swin_unetr": None}}, "without any it is UNETR"),
    ],
)  # fmt: skip
def test_a_plan_with_a_slip_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(AliceError, match=rf"plan\.yaml: .*{message}"):
        small_plan(tmp_path / "plan", **changes)


# -- the data ------------------------------------------------------------------


def read_lists(work):
    return {path.stem: json.loads(path.read_text()) for path in work.glob("*.json")}


def test_patients_held_back_are_in_no_training_and_dropped_labels_are_gone(scans, tmp_path):
    plan = small_plan(
        tmp_path / "plan",
        held_back="^case[14]$",
        drop_labels=[2],
        choose={"learning_rate": [1e-3], "scans": "^case[35]$", "by": "linear"},
        labelled=[2],
    )
    sweep.Sweep(plan, scans, tmp_path / "work").prepare()
    lists = read_lists(tmp_path / "work")
    assert lists["split"]["split"] == [["case0", "case2", "case3", "case5"], ["case1", "case4"]]
    assert lists["split_choose"]["split"] == [["case0", "case2"], ["case3", "case5"]]
    records = lists["labelled"]["training"]
    assert [record["fold"] for record in records] == [1, 0, 1, 1, 0, 1]
    assert [r["image"].rsplit("/", 1)[1] for r in lists["held_back"]["testing"]] == [
        "case1.nii.gz",
        "case4.nii.gz",
    ]
    for record in records:
        before = nib.load(scans / record["label"].rsplit("/", 1)[1])
        after = nib.load(record["label"])
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(
            np.asarray(after.dataobj), np.where(np.asarray(before.dataobj) == 1, 1, 0)
        )


def test_a_folder_of_other_settings_is_refused_but_another_comparison_is_not(scans, tmp_path):
    def prepare(name, of=scans, **changes):
        sweep.Sweep(small_plan(tmp_path / name, labelled=[2], **changes), of, tmp_path / "work").prepare()

    prepare("a", held_back="^case1$")
    prepare("b", held_back="^case1$", compare=[], seeds=[0])
    with pytest.raises(AliceError, match="other settings"):
        prepare("c", held_back="^case2$")
    with pytest.raises(AliceError, match="other settings"):
        prepare("d", held_back="^case1$", drop_labels=[1])
    shutil.copytree(scans, tmp_path / "others")  # of the same names
    with pytest.raises(AliceError, match="other scans"):
        prepare("e", tmp_path / "others", held_back="^case1$")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_back": "^nobody$"}, "no scan of 6 matches held_back"),
        ({"held_back": "^case"}, "0 of 6 scans are left"),
        ({"held_back": "^case[1-5]$"}, "1 of 6 scans are left"),
        ({"held_back": "^case1$", "labelled": [2], "choose": {"learning_rate": [1e-3], "scans": "^case[12]$", "by": "linear"}}, "never chosen on what is reported"),
        ({"held_back": "^case1$", "labelled": [2], "choose": {"learning_rate": [1e-3], "scans": "^case2$", "by": "linear"}}, "one patient matches choosing"),
        ({"held_back": "^case1$", "labelled": None}, "one patient matches held_back"),
        ({"held_back": "^case1$", "labelled": [300]}, r"asks for \[300\] patients; 5 are labelled"),
    ],
)  # fmt: skip
def test_patients_in_two_roles_or_none_are_refused(scans, tmp_path, changes, message):
    with pytest.raises(AliceError, match=message):
        sweep.Sweep(small_plan(tmp_path / "plan", **changes), scans, tmp_path / "work").prepare()


def test_two_scans_of_a_patient_have_one_role(tmp_path, scans):
    patients = ["anna", "anna", "bert", "cleo", "dora", "emil"]
    records = [{"image": str(scans / f"case{i}.nii.gz"), "patient": who} for i, who in enumerate(patients)]
    (tmp_path / "list.json").write_text(json.dumps({"training": records}))
    plan = small_plan(tmp_path / "plan", held_back="case1$", labelled=[])
    with pytest.raises(AliceError, match="case1: its patient anna is in two roles"):
        sweep.Sweep(plan, tmp_path / "list.json", tmp_path / "work").prepare()


# -- the runs ------------------------------------------------------------------

CHOOSE = {"learning_rate": [1e-3, 1e-2], "scans": "^train_6", "by": "linear"}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def examined(made, **crops):
    """Costs of arms as examine() leaves them."""
    for arm, each in crops.items():
        costs = {"iterations": 7, "crops a step": each, "seconds a step": 2.0, "flops a step": 1e8}
        write_json(made.work / "examined" / "unetr" / f"{arm}.json", costs)


@pytest.fixture
def commands(monkeypatch):
    """The command lines that would be run; a pre-training writes its last step, a fine-tuning its last epoch."""
    told = []

    def execute(words: list, log) -> None:
        told.append(list(words))
        settings = settings_of(words)
        if "alice_pretrain" in settings.get("--bundle_root", ""):
            write_json(log.parent / "log.jsonl", {"step": int(settings.get("--iterations", 7))})
        elif "--labelled" in settings:
            (log.parent / "checkpoints").mkdir(parents=True, exist_ok=True)
            state = {"iteration": 6, "max_epochs": 2, "epoch_length": 3}
            torch.save({"trainer": state}, log.parent / "checkpoints" / "last.pt")

    monkeypatch.setattr(sweep, "execute", execute)
    return told


def settings_of(words):
    return dict(zip(words[2::2], words[3::2], strict=False))


def test_arms_of_a_row_differ_in_the_encoder_alone(tmp_path, commands):
    made = sweep.Sweep(read_plan(OPENKBP), tmp_path, tmp_path / "work")
    for arm in made.plan.arms:
        encoder = made.work / Run("unetr", arm, 2).folder / "encoder.safetensors"
        encoder.parent.mkdir(parents=True)
        encoder.touch()
        made.finetune(Run("unetr", arm, 2, 10, "tuned"))
    scratch, *others = (settings_of(words) for words in commands)
    assert (scratch["--labelled"], scratch["--seed"], scratch["--fold_seed"]) == ("10", "2", "2")
    assert scratch["--validate::dataset::data"] == "[]"
    for arm, other in zip(("MAE", "Alice"), others, strict=True):
        other = {key: value.replace(f"/{arm}/", "/scratch/") for key, value in other.items()}
        assert other.pop("--pretrained") == str(
            made.work / "runs/unetr/scratch/pretrain/seed2/encoder.safetensors"
        )
        assert other == scratch


def test_a_pre_training_spends_the_budget_at_the_rate_that_was_chosen(tmp_path, commands):
    made = sweep.Sweep(
        small_plan(tmp_path / "p", choose=CHOOSE, budget={"crops": 320}), tmp_path, tmp_path / "work"
    )
    examined(made, MAE=8, Alice=16)
    write_json(made.work / "chosen.json", {"unetr/MAE": {"rate": 1e-2}, "unetr/Alice": {"rate": None}})
    made.pretrain(Run("unetr", "MAE", 1))
    made.pretrain(Run("unetr", "Alice", 0, rate=1e-3))
    mae, trial = (settings_of(words) for words in commands)
    assert (mae["--iterations"], mae["--learning_rate"], mae["--seed"]) == ("40", "0.01", "1")
    assert mae["--probe_every"] == "41"  # the untrained encoder alone
    assert (trial["--iterations"], trial["--learning_rate"]) == ("20", "0.001")
    assert "split.json" in mae["--config_file"] and "split_choose.json" in trial["--config_file"]
    with pytest.raises(sweep.RunFailed, match="Alice, unetr: no learning rate"):
        made.pretrain(Run("unetr", "Alice", 1))


@pytest.mark.parametrize(
    ("budget", "steps"), [({"crops": 320}, 20), ({"seconds": 100}, 50), ({"flops": 6e9}, 60)]
)
def test_budgets_become_steps(tmp_path, budget, steps):
    made = sweep.Sweep(small_plan(tmp_path / "p", budget=budget), tmp_path, tmp_path / "work")
    examined(made, MAE=16)
    assert made._costs("unetr", "MAE")["iterations"] == steps
    ((unit, value),) = budget.items()
    small = sweep.Sweep(small_plan(tmp_path / "q", budget={unit: value / 10}), tmp_path, tmp_path / "work")
    with pytest.raises(AliceError, match="take a larger one"):
        small._costs("unetr", "MAE")


def test_a_rate_that_diverges_is_told_and_other_failures_are_tried_again(tmp_path, monkeypatch, capsys):
    choose = {"learning_rate": [1e-3, 1e-2, 1.0], "scans": "^train_6", "by": "place_mm"}
    made = sweep.Sweep(small_plan(tmp_path / "p", choose=choose), tmp_path, tmp_path / "work")
    examined(made, MAE=8, Alice=8)
    full = True

    def pretrain(run):
        if run.rate == 1.0:
            raise sweep.RunFailed("x.log: exit code 1; it ends with: Step 3: l_r not finite.")
        if run.arm == "MAE" and run.rate == 1e-2 and full:
            raise sweep.RunFailed("the disk is full")

    monkeypatch.setattr(made, "pretrain", pretrain)
    monkeypatch.setattr(made, "_probe", lambda run: {"trained": {"place_mm": 50.0 + 1000 * run.rate}})
    made.choose()
    chosen = json.loads((made.work / "chosen.json").read_text())
    tried = {"0.001": 51.0, "0.01": 60.0, "1": None}
    assert chosen["unetr/Alice"] == {"by": "place_mm", "tried": tried, "rate": 1e-3}
    assert chosen["unetr/MAE"]["rate"] is None and "0.01" not in chosen["unetr/MAE"]["tried"]
    assert capsys.readouterr().out.count("diverged") == 2
    full = False
    made.choose()
    assert json.loads((made.work / "chosen.json").read_text())["unetr/MAE"] == chosen["unetr/Alice"]
    monkeypatch.setattr(made, "pretrain", lambda run: pytest.fail("was tried again"))
    made.choose()


def test_a_run_that_was_stopped_does_not_count(tmp_path, monkeypatch):
    """A signal lets a run save, and end with exit code 0."""
    made = sweep.Sweep(small_plan(tmp_path / "p", budget={"crops": 320}), tmp_path, tmp_path / "work")
    examined(made, MAE=8)
    monkeypatch.setattr(
        sweep, "execute", lambda words, log: write_json(log.parent / "log.jsonl", {"step": 11})
    )
    with pytest.raises(sweep.RunFailed, match="stopped after 11 of 40 steps"):
        made.pretrain(Run("unetr", "MAE", 0))

    def half(words, log):
        (log.parent / "checkpoints").mkdir(parents=True)
        torch.save(
            {"trainer": {"iteration": 5, "max_epochs": 2, "epoch_length": 3}},
            log.parent / "checkpoints" / "last.pt",
        )

    monkeypatch.setattr(sweep, "execute", half)
    with pytest.raises(sweep.RunFailed, match="stopped after 5 steps"):
        made.finetune(Run("unetr", "scratch", 0, 3, "tuned"))


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"scratch": [], "MAE": ["pooled.yaml", "mae.yaml", "pretrain.yaml"]}},  # another order
        {"arms": {"scratch": [], "MAE": ["pooled.yaml", "pretrain.yaml"]}},  # Alice under the name of MAE
        {"budget": {"crops": 640}},
        {"choose": CHOOSE},
    ],
    ids=["order", "swapped", "budget", "rate"],
)
def test_a_run_of_other_settings_is_never_taken_for_this_one(tmp_path, changes):
    first = {
        "arms": {"scratch": [], "MAE": ["pooled.yaml", "pretrain.yaml", "mae.yaml"]},
        "budget": {"crops": 320},
        "compare": [],
    }
    made = sweep.Sweep(small_plan(tmp_path / "p", **first), tmp_path, tmp_path / "work")
    examined(made, MAE=8)
    write_json(made.work / "chosen.json", {"unetr/MAE": {"rate": 1e-2}})
    tuned = Run("unetr", "MAE", 0, 3, "tuned")
    for run in (Run("unetr", "MAE", 0), tuned):
        made._same(run)
        made._same(run)  # it is
    other = sweep.Sweep(small_plan(tmp_path / "q", **first | changes), tmp_path, tmp_path / "work")
    for run in (Run("unetr", "MAE", 0), tuned):
        with pytest.raises(AliceError, match="made with other settings"):
            other._same(run)
    more = {"arms": first["arms"] | {"Alice": ["pretrain.yaml"]}, "seeds": [0, 1, 2, 3]}
    sweep.Sweep(small_plan(tmp_path / "r", **first | more), tmp_path, tmp_path / "work")._same(
        tuned
    )  # more arms and seeds


def test_another_bundle_is_another_fine_tuning(tmp_path):
    run = Run("unetr", "scratch", 0, 3, "tuned")
    sweep.Sweep(small_plan(tmp_path / "p"), tmp_path, tmp_path / "work")._same(run)
    with pytest.raises(AliceError, match="made with other settings"):
        sweep.Sweep(small_plan(tmp_path / "q", bundle="alice_seg_flare"), tmp_path, tmp_path / "work")._same(
            run
        )


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    with (
        locked(tmp_path / "work" / "sweep.lock", "alice compare-methods"),
        pytest.raises(AliceError, match="is at work here"),
    ):
        sweep.Sweep(read_plan(OPENKBP), tmp_path, tmp_path / "work").run()


def test_a_slip_in_the_fine_tuning_is_refused_before_anything_runs(tmp_path):
    plan = small_plan(tmp_path / "plan")
    (plan.folder / "finetune.yaml").write_text("epoch: 3\n")
    with pytest.raises(AliceError, match="'epoch' is no setting.*Did you mean 'epochs'"):
        sweep.Sweep(plan, tmp_path, tmp_path / "work").examine()


def test_what_is_finished_is_not_run_again_and_a_failure_names_its_log(tmp_path):
    made = sweep.Sweep(small_plan(tmp_path / "plan"), tmp_path, tmp_path / "work")
    run = Run("unetr", "scratch", 0, 3, "tuned")
    rows = made.work / run.folder / "rows.csv"
    rows.parent.mkdir(parents=True)
    rows.write_text("finished")
    assert not made.make(run)
    assert rows.read_text() == "finished"
    with pytest.raises(sweep.RunFailed, match=r"some\.log: exit code 1; it ends with: .*No module named"):
        sweep.execute(["custom.no_such_module"], tmp_path / "some.log")


# -- the report ----------------------------------------------------------------


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


CELL = ("unetr", "tuned", 3)


@pytest.fixture
def reported(tmp_path):
    plan = small_plan(
        tmp_path / "plan",
        labelled=[3],
        arms={"scratch": [], "Alice": ["pretrain.yaml"]},
        compare=[["scratch", "Alice"]],
    )
    for arm, gain in (("scratch", 0.0), ("Alice", 0.2)):
        write_rows(report.rows_file(plan.folder, CELL, arm), rows_of(gain))
    return plan


def test_the_table_states_means_and_marks_intervals_without_zero(reported):
    results = report.read_results(reported, reported.folder)
    text = report.markdown(reported, reported.folder, results, [])
    means = {arm: np.mean([row["dsc"] for row in results[CELL, arm]]) for arm in reported.arms}
    assert f"| 3 labelled | {means['scratch']:.3f} [" in text
    gain = means["Alice"] - means["scratch"]
    assert f"**{gain:+.3f} [" in text
    assert f"- **Alice against scratch**: better at 3 labelled ({gain:+.3f})." in text
    same = dict.fromkeys(results, results[CELL, "scratch"])
    text = report.markdown(reported, reported.folder, same, [])
    assert "not told apart at 3 labelled (+0.000)" in text and "**+" not in text


def test_p_is_adjusted_for_the_number_of_rows(reported, tmp_path):
    results = dict(report.read_results(reported, reported.folder))
    more = small_plan(tmp_path / "more", labelled=[3, 10], arms=reported.arms, compare=[["scratch", "Alice"]])
    results |= {(("unetr", "tuned", 10), arm): rows for (_, arm), rows in list(results.items())}
    lines = [
        line.split(" | ")
        for line in report.markdown(more, more.folder, results, []).splitlines()
        if "| scratch | Alice | " in line
    ]
    lines = [line for line in lines if len(line) == 7]
    assert [float(line[5]) for line in lines] == pytest.approx(
        [2 * float(line[4]) for line in lines], abs=2e-3
    )
    assert len(lines) == 2


def test_fewer_than_three_seeds_print_no_interval(tmp_path, reported):
    few = small_plan(
        tmp_path / "few", labelled=[3], arms=reported.arms, compare=[["scratch", "Alice"]], seeds=[0, 1]
    )
    rows = {(CELL, arm): rows_of(gain, seeds=(0, 1)) for arm, gain in (("scratch", 0.0), ("Alice", 0.2))}
    text = report.markdown(few, few.folder, rows, [])
    assert "Seeds: 2. Fewer than 3: no interval is printed" in text
    assert "better" not in text and "## Paired" not in text
    assert not [line for line in text.splitlines() if line.startswith("| 3 labelled") and "[" in line]


def test_an_arm_without_a_seed_is_told_and_not_compared(reported):
    write_rows(report.rows_file(reported.folder, CELL, "Alice"), rows_of(0.2, seeds=(0, 2)))
    text = report.markdown(reported, reported.folder, report.read_results(reported, reported.folder), [])
    assert "2 of 3 seeds" in text and "**Alice against scratch**: runs are missing." in text


def test_the_figure_draws_every_seed_and_comparison(reported):
    left, right = report.figure(reported, report.read_results(reported, reported.folder)).axes
    assert [len(line.get_xdata()) for line in left.lines] == [3, 1, 3, 1]
    assert [label.get_text() for label in right.get_yticklabels()] == ["Alice - scratch, 3 labelled"]
    assert right.lines[-1].get_xdata()[0] == pytest.approx(0.2, abs=0.02)


def test_what_is_dropped_is_not_scored_and_what_is_missing_is_named(tmp_path):
    plan = small_plan(tmp_path / "plan", labelled=[3], seeds=[0], drop_labels=[2, 9])
    rows = [
        {**row, "organ": organ} for organ in plan.organs for row in rows_of(0.1, (0,)) if row["label"] == 1
    ]
    write_rows(tmp_path / "work" / Run("unetr", "scratch", 0, 3, "tuned").folder / "rows.csv", rows)
    missing = report.collect(plan, tmp_path / "work", tmp_path / "out")
    assert (
        "runs/unetr/Alice/pretrain/seed0" in missing
        and "runs/unetr/scratch/tuned_labelled-3/seed0" not in missing
    )
    taken = report.read_results(plan, tmp_path / "out")[CELL, "scratch"]
    assert {row["organ"] for row in taken} == set(plan.organs) - {plan.organs[1]}


@pytest.mark.parametrize(
    "folder",
    [pytest.param(f, marks=pytest.mark.slow) if f.name == "openkbp" else f for f in REPORTED],
    ids=lambda folder: folder.name,
)
def test_the_committed_table_follows_from_the_committed_rows(folder, tmp_path):
    plan = read_plan(folder)
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("table.md"))
    assert report.write_report(plan, copy) == (folder / "table.md").read_text(encoding="utf-8")


# -- the whole way -------------------------------------------------------------


@pytest.mark.slow
def test_a_small_plan_runs_from_scans_to_the_table_and_goes_on(tmp_path, monkeypatch, capsys):
    main(["phantom", str(tmp_path / "scans"), "--n", "8", "--size", "small", "--canonical", "False"])
    (tmp_path / "plan").mkdir()
    files = {
        "plan.yaml": {
            "bundle": "alice_seg_flare",
            "held_back": "000[12]$",
            "arms": {"scratch": [], "Alice": ["train.yaml"], "MAE": ["mae.yaml"]},
            "pretrain": ["smoke.yaml", "few.yaml"],
            "budget": {"crops": 80},
            "choose": {"learning_rate": [5e-3], "scans": "000[34]$", "by": "retrieval"},
            "labelled": [2],
            "seeds": [0],
            "ways": {"frozen": ["frozen.yaml"]},
            "published": ["A line of theirs."],
        },
        "few.yaml": {"workers": 0},
        "task.yaml": {"spacing": [6.0] * 3, "roi_size": [32] * 3, "overlap": 0.0},
        "finetune.yaml": {"epochs": 1, "validate::dataset::data": [], "train::saver::save_interval": 0},
    }
    for name, content in files.items():
        (tmp_path / "plan" / name).write_text(yaml.safe_dump(content))
    words = ["compare-methods", str(tmp_path / "plan"), str(tmp_path / "scans"), str(tmp_path / "work")]
    main(words)
    text = (tmp_path / "work" / "report" / "table.md").read_text()
    for said in (
        "| unetr | MAE |",
        "no interval",
        "## Probe",
        "## Costs",
        "## Learning rates",
        "A line of theirs.",
    ):
        assert said in text, said
    rows = report.read_results(read_plan(tmp_path / "plan"), tmp_path / "work" / "report")
    assert {arm for _, arm in rows} == {"scratch", "Alice", "MAE"}
    costs = json.loads((tmp_path / "work" / "report" / "costs.json").read_text())
    assert costs["unetr/MAE"]["steps"] == 2 * costs["unetr/Alice"]["steps"] == 20
    capsys.readouterr()
    main(words)  # all is there
    assert capsys.readouterr().out.count("was there") == 5
    assert (tmp_path / "work" / "report" / "table.md").read_text() == text
