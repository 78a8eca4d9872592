"""Fine-tuning that stops and goes on: the same run to the bit, one schedule over the whole, and refusals by name."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from ignite.engine import Events
from monai.utils import set_determinism
from seg_bundles import BUNDLES, FLARE, REPO, TRIAL, bundle_run, configs, parser_of

RUN = TRIAL | {"labelled": 3, "epochs": 3, "val_interval": 2}


def scripts():
    return parser_of("train").get_parsed_content("scripts")


def state_of(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def settings_of(cohort, folder, **more):
    return RUN | {"dataset_dir": str(cohort), "output_dir": str(folder), "ckpt_dir": str(folder)} | more


def assert_same(one, two):
    """Two states of a run, or parts of them, are equal to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


# -- to the bit ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(cohort, tmp_path_factory):
    """A run without any stop."""
    folder = tmp_path_factory.mktemp("whole")
    bundle_run("train", **settings_of(cohort, folder))
    return folder


def assert_same_run(one, two):
    first, second = state_of(one), state_of(two)
    for part in ("model", "optimizer", "best", "trainer"):
        assert_same(first[part], second[part])
    assert first["lr_scheduler"]["_last_lr"] == second["lr_scheduler"]["_last_lr"]
    best = [torch.load(folder / "model_finetuned.pt", weights_only=True) for folder in (one, two)]
    assert_same(*best)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_two_runs_are_equal_to_the_bit(cohort, whole, tmp_path, workers):
    bundle_run("train", **settings_of(cohort, tmp_path, workers=workers))
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 4, 8])  # at an epoch's end, and twice within one
def test_a_run_stopped_by_sigterm_goes_on_to_the_bit(cohort, whole, tmp_path, steps):
    parser = parser_of("train", **settings_of(cohort, tmp_path))
    set_determinism(parser.get_parsed_content("seed"))
    trainer = parser.get_parsed_content("train::trainer")
    end = Events.ITERATION_COMPLETED(once=steps)
    trainer.add_event_handler(end, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        parser.get_parsed_content("run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert state_of(tmp_path)["trainer"]["iteration"] == trainer.state.iteration == steps
    bundle_run("train", **settings_of(cohort, tmp_path, resume=True))
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_a_run_killed_with_sigkill_goes_on_to_the_bit(cohort, whole, tmp_path):
    settings = settings_of(cohort, tmp_path)
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--bundle_root", str(FLARE)]
    last = tmp_path / "checkpoints" / "last.pt"
    process = subprocess.Popen(
        [*command, "--config_file", *configs("train"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(3000):
        if last.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert 0 < state_of(tmp_path)["trainer"]["iteration"] < 9
    bundle_run("train", **settings_of(cohort, tmp_path, resume=True))
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_a_run_made_longer_follows_one_schedule_and_keeps_its_best_network(cohort, tmp_path):
    """A worse validation after the stop leaves the best network as it is; the rate is that of a run of all epochs."""
    bundle_run("train", **settings_of(cohort, tmp_path, epochs=2, val_interval=1))
    last, best = tmp_path / "checkpoints" / "last.pt", tmp_path / "model_finetuned.pt"
    state = torch.load(last, weights_only=True)
    assert state["lr_scheduler"]["_last_lr"] == [0.0]
    (saved,) = state["best"]["_saved"]
    state["best"]["_saved"] = [(2.0, saved[1])]  # better than any Dice to come
    torch.save(state, last)
    before = best.read_bytes()
    parser = parser_of("train", **settings_of(cohort, tmp_path, epochs=4, val_interval=1, resume=True))
    trainer, rates = parser.get_parsed_content("train::trainer"), []
    optimizer = parser.get_parsed_content("optimizer")
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    parser.get_parsed_content("run")
    schedule = scripts_schedule(parser, 12)
    assert rates == pytest.approx(schedule[6:]) and rates[0] > 0.4 * max(schedule)
    assert state_of(tmp_path)["trainer"] == {"iteration": 12, "epoch_length": 3, "max_epochs": 4}
    assert best.read_bytes() == before


def scripts_schedule(parser, steps):
    """The rates of a run of so many steps from its beginning."""
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=parser.get_parsed_content("learning_rate")
    )
    kind = type(parser.get_parsed_content("lr_scheduler"))
    schedule = kind(optimizer, warmup_steps=parser.get_parsed_content("warmup_steps"), t_total=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# -- what a run keeps, and what it may change ---------------------------------------------------


def stopped(cohort, folder, iteration=6, **settings):
    """A run that stopped, without having trained: its settings and how far it came."""
    parser = parser_of("train", **settings_of(cohort, folder, **settings))
    (folder / "checkpoints").mkdir(exist_ok=True)
    fixed = scripts().resume.plain(parser.get_parsed_content("fixed"))
    trainer = {"iteration": iteration, "epoch_length": 3, "max_epochs": 3}
    torch.save(
        {"settings": fixed, "trainer": trainer, "best": {"_saved": []}}, folder / "checkpoints" / "last.pt"
    )


def said_of(cohort, folder, **settings):
    """What stops the run before anything is read or trained."""
    parser = parser_of("train", **settings_of(cohort, folder, resume=True, **settings))
    return [told for told in parser.get_parsed_content("problems") if told.startswith("resume: ")]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_goes_on_with_the_same_settings(cohort, tmp_path, bundle):
    stopped(cohort, tmp_path)
    assert said_of(cohort, tmp_path) == []
    may_change = {
        "epochs": 9,
        "val_interval": 1,
        "workers": 2,
        "overlap": 0.5,
        "cache_rate": 0.0,
        "warmup_epochs": 2,
    }
    assert said_of(cohort, tmp_path, **may_change) == []


@pytest.mark.parametrize("changed, told", [
    ({"batch_size": 2}, "batch_size was 1, now 2"),
    ({"learning_rate": 2.0e-3}, "learning_rate was 0.001, now 0.002"),
    ({"labels": ["spleen", "liver"]}, 'labels was ["liver", "right kidney"'),
    ({"fold": 1}, "fold was 0, now 1"),
    ({"labelled": 2}, "the cases are others (without case_"),
    ({"seed": 1}, "seed was 0, now 1"),
    ({"roi_size": [32, 32, 32]}, "roi_size was [32, 32, 16], now [32, 32, 32]"),
    ({"clip": 1.0, "crops_per_case": 2}, "crops_per_case was 1, now 2; clip was null, now 1.0"),
])  # fmt: skip
def test_changed_settings_are_refused_by_name(cohort, tmp_path, changed, told):
    stopped(cohort, tmp_path)
    (said,) = said_of(cohort, tmp_path, **changed)
    assert told in said and said.endswith("give them again, or another output_dir for a new run.")
    parser = parser_of("train", **settings_of(cohort, tmp_path, **changed))  # without resume it is a new run
    assert parser.get_parsed_content("resume_problems") == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", "other", "list"])
def test_a_checkpoint_that_is_none_is_named(cohort, tmp_path, content):
    stopped(cohort, tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model": {}} if content == "other" else [1], path)
    (said,) = said_of(cohort, tmp_path)
    assert said.startswith(f"resume: {path} is damaged, or no checkpoint of this version.")


def test_a_best_network_that_is_gone_is_named(cohort, tmp_path):
    stopped(cohort, tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    torch.save(torch.load(path) | {"best": {"_saved": [(0.5, "x.pt")]}}, path)
    (said,) = said_of(cohort, tmp_path)
    assert "model_finetuned.pt, the best network of" in said
    (tmp_path / "model_finetuned.pt").touch()
    assert said_of(cohort, tmp_path) == []


@pytest.mark.parametrize("epochs, iteration", [(2, 6), (1, 6), (3, 9)])
def test_a_run_that_has_all_its_epochs_is_not_trained_again(cohort, tmp_path, capsys, epochs, iteration):
    stopped(cohort, tmp_path, iteration)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        bundle_run("train", **settings_of(cohort, tmp_path, epochs=epochs, resume=True, val_interval=1))
    assert ended.value.code == 0
    assert f"alice_seg: {tmp_path} has all its {epochs} epochs." in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


def test_it_says_where_a_run_goes_on(cohort, tmp_path):
    stopped(cohort, tmp_path, iteration=4)
    resume = scripts().resume
    last = tmp_path / "checkpoints" / "last.pt"
    assert resume.StoppedRun(tmp_path, True).told_start("x") == f"goes on from {last}, 1.33333 epochs done"
    assert resume.StoppedRun(tmp_path, False).told_start("from scratch") == "from scratch"
    assert resume.StoppedRun("gone", True).told_start("x") == "resume: no checkpoint in gone/checkpoints; x"


# -- schedules, order, crops ---------------------------------------------------------------------


def schedules(total):
    """New schedules of several kinds over so many steps, each with its optimizer."""
    training = scripts().training

    def optimizer(groups=1):
        return torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=0.5
        )

    lambdas, kinds = torch.optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler
    return [
        lambdas(optimizer(), training.polynomial(total, 0.9)),
        lambdas(optimizer(2), training.sawtooth(total, total // 5)),
        kinds.CosineAnnealingLR(optimizer(), total),
        kinds.LinearLR(optimizer(), total_iters=total),
    ]


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_schedule_is_brought_to_the_step_at_which_a_run_stopped(steps):
    for followed, wound in zip(schedules(20), schedules(20), strict=True):
        for _ in range(steps):
            followed.optimizer.step()
            followed.step()
        scripts().resume._wind(wound, steps)
        rates = [[group["lr"] for group in s.optimizer.param_groups] for s in (followed, wound)]
        assert rates[0] == pytest.approx(rates[1]) and followed.last_epoch == wound.last_epoch


@pytest.mark.parametrize("name", ["layer_decay", "sawtooth"])
def test_other_groups_of_parameters_are_refused(cohort, tmp_path, name):
    settings = settings_of(cohort, tmp_path, total_steps=9)
    one, two = (
        parser_of(*names, **settings).get_parsed_content(key)
        for names, key in ((("train",), "optimizer"), (("train", name), "optimizer"))
    )
    resume = scripts().resume
    resume._refuse_other_groups(one, one.state_dict(), "last.pt")
    with pytest.raises(
        SystemExit, match="resume: the optimizer of last.pt is another one: its parameters are grouped"
    ):
        resume._refuse_other_groups(two, one.state_dict(), "last.pt")


def test_processes_share_the_cases_of_an_epoch_in_one_order():
    order = scripts().chance.Order
    alone = list(order(range(7), seed=3))
    assert sorted(case for _, case in alone) == list(range(7)) and {epoch for epoch, _ in alone} == {1}
    parts = [list(order(range(7), 3, rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 4] == [len(order(range(7), 3, 0, 2))] * 2
    merged = [pair for pairs in zip(*parts, strict=True) for pair in pairs]
    assert merged == [*alone, alone[0]]
    later = order(range(7), 3)
    later.start(2)
    assert sorted(later) != sorted(alone) and list(later) != [(2, case) for _, case in alone]
    later.start(1, skipped=5)
    assert list(later) == alone[5:] and list(order(range(7), 4)) != alone


def test_crops_depend_on_the_seed_the_epoch_and_the_case_alone(cohort):
    settings = settings_of(cohort, "run", cache_rate=0.0)

    def crop(at, seed=0):
        dataset = parser_of("train", **settings, seed=seed).get_parsed_content("train::dataloader::dataset")
        dataset[2, 1]  # whatever was drawn before
        return dataset[at][0]["image"]

    assert torch.equal(crop((1, 0)), crop((1, 0)))
    assert not torch.equal(crop((1, 0)), crop((2, 0))) and not torch.equal(crop((1, 0)), crop((1, 0), seed=1))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, bundle):
    resume = parser_of("train", bundle=REPO / "bundles" / bundle).get_parsed_content("scripts").resume
    state = {
        "trainer": type(
            "T",
            (),
            {"scaler": None, "state": type("S", (), {"iteration": 3, "epoch_length": 3, "max_epochs": 3})},
        )
    }
    saver = resume.Saver(str(tmp_path), state, {"seed": 0})
    saver.save()
    before = (tmp_path / "last.pt").read_bytes()
    state["trainer"].state.iteration = 6
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(
        SystemExit, match=r"last.pt: cannot be written \(No space left on device\). Make room"
    ):
        saver.save()
    assert (tmp_path / "last.pt").read_bytes() == before
