"""The engine: schedules by hand, exact resume, refusals."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY_VIT
from ignite.engine import Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.engine.checkpoint import (
    CheckpointError,
    checkpoints_of,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from custom.engine.loader import sample_loader
from custom.engine.monitors import Monitors, ProbeHandler, effective_rank, embedding_std, mean_cosine
from custom.engine.run_log import LeaveOnSignal, RunLog, read_log
from custom.engine.schedules import cosine_ramp, decay_groups, linear_ramp, scaled_rate, warmup_cosine
from custom.engine.trainer import NonFiniteLoss, PretrainTrainer, Schedule
from custom.errors import AliceError
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss
from custom.methods.alice.method import Alice
from custom.methods.pairs import AlignedPair
from custom.methods.run_folder import load_run
from custom.methods.views import MaskedBatch, Masking, TargetView


def make_trainer(
    store,
    run_dir,
    steps=6,
    batch=2,
    seed=0,
    handlers=(),
    similarity="cosine",
    width=48,
    log_every=1,
    **kwargs,
):
    torch.manual_seed(seed)
    network = MaskedViT(**(TINY_VIT | {"hidden_size": width, "dropout_rate": 0.1}), pos_embed_type="sincos")
    student = StudentBranch(
        token_encoder(network), decoder_width=48, decoder_depth=1, decoder_heads=4, head_width=64, bottleneck=32,
        prototypes=32 if similarity == "dino" else None, casa_teacher="ema",
    )  # fmt: skip
    pairs = AlignedPair(store, CoordinateAligner(store), (32, 48, 16), seed=seed)
    loss = AliceLoss((16, 16, 16), similarity, width=student.head.out_width)
    return PretrainTrainer(
        device="cpu",
        method=Alice(student, loss, TargetView(store.spacing)),
        optimizer=torch.optim.AdamW(decay_groups(student, 0.05), lr=1.0, betas=(0.9, 0.95)),
        loader=sample_loader(
            pairs,
            batch,
            steps,
            kwargs.pop("workers", 0),
            collate=MaskedBatch(Masking(0.5), (2, 3, 1), pairs.crop_keys, parts=kwargs.get("accumulate", 1)),
        ),
        schedule=kwargs.pop("schedule", Schedule(steps, 1e-3, warmup=min(2, steps), momentum=0.9)),
        run_dir=run_dir,
        seed=seed,
        train_handlers=[*handlers, RunLog(run_dir, log_every)],
        **kwargs,
    )


def losses(folder):
    return [
        (line["step"], line["total"], line["l_r"], line["l_dv"], line["l_st"], line["grad_norm"])
        for line in read_log(folder)
    ]


def test_the_last_step_and_probe_are_logged_whatever_log_every_is(store, tmp_path):
    probe = ProbeHandler(lambda encoder: {"retrieval": 0.5}, every=6)
    make_trainer(store, tmp_path, steps=6, handlers=[probe], log_every=4).run()
    assert [line["step"] for line in read_log(tmp_path)] == [0, 4, 6]
    assert read_log(tmp_path)[-1]["probe/retrieval"] == 0.5


def test_alarms_stand_in_the_log(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Alice, "alarms", lambda self, latest, untrained: ["a smell of smoke"])
    make_trainer(store, tmp_path, steps=4, handlers=[Monitors(every=2)]).run()
    assert [line["step"] for line in read_log(tmp_path) if line.get("alarms") == ["a smell of smoke"]] == [
        2,
        4,
    ]


def test_schedules_by_hand():
    rates = [warmup_cosine(s, 10, 2.0, 4, 0.2) for s in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(0.2 + 1.8 * 0.5) and rates[4] == 2.0 and rates[10] == pytest.approx(0.2)
    assert cosine_ramp(0, 8, 0.996, 1.0) == pytest.approx(0.996) and cosine_ramp(8, 8, 0.996, 1.0) == 1.0
    assert cosine_ramp(4, 8, 0.996, 1.0) == pytest.approx(0.998)
    assert cosine_ramp(2, 8, 0.0, 1.0) == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))
    assert [linear_ramp(s, 2, 4) for s in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    loader = sample_loader(range(9), 4, 2, rank=0, world_size=2)  # 8 samples of one crop
    assert scaled_rate(5e-5, loader) == pytest.approx(5e-5 * 8 / 128)


def test_matrices_decay_and_the_rest_does_not():
    student = StudentBranch(token_encoder(MaskedViT(**TINY_VIT)), 48, 1, 4, 64, 32)
    decayed, spared = decay_groups(student, 0.05)
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    tokens = {id(student.decoder.mask_token), id(student.encoder.encoder.patch_embedding.position_embeddings)}
    assert tokens <= {id(p) for p in spared["params"]}
    assert sum(len(g["params"]) for g in (decayed, spared)) == sum(
        p.requires_grad for p in student.parameters()
    )


@pytest.mark.parametrize("similarity", ["cosine", "dino"])
def test_a_resumed_run_goes_on_to_the_bit(store, tmp_path, similarity):
    whole = make_trainer(store, tmp_path / "whole", similarity=similarity)
    whole.run()
    make_trainer(
        store,
        tmp_path / "cut",
        similarity=similarity,
        checkpoint_every=2,
        steps_per_epoch=4,
        handlers=[StopAt(3)],
    ).run()
    assert [p.name for p in checkpoints_of(tmp_path / "cut" / "checkpoints")] == [
        "iteration_00000002.pt",
        "iteration_00000003.pt",
    ]
    resumed = make_trainer(
        store, tmp_path / "cut", similarity=similarity, checkpoint_every=2, steps_per_epoch=4, workers=1
    )
    resumed.run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    for name, tensor in whole.teacher.state_dict().items():
        assert torch.equal(tensor, resumed.teacher.state_dict()[name]), name


class StopAt:
    def __init__(self, step, act=None):
        self.step, self.act = step, act

    def attach(self, engine):
        from ignite.engine import Events

        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=self.step), self.act or (lambda e: e.terminate())
        )


def test_a_finished_run_does_nothing_and_a_cut_log_line_is_dropped(store, tmp_path, caplog):
    trainer = make_trainer(store, tmp_path, steps=2)
    trainer.logger.setLevel("INFO")
    with caplog.at_level("INFO"):
        trainer.run()
    assert "Terminate" not in caplog.text and "Saved" in caplog.text  # nobody asked it to leave
    before = (tmp_path / "log.jsonl").read_text()
    make_trainer(store, tmp_path, steps=2).run()
    assert (tmp_path / "log.jsonl").read_text() == before
    (tmp_path / "log.jsonl").write_text(before + '{"step": 3, "tot')
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_every_loss_is_lower_after_training_on_one_batch(store, tmp_path):
    trainer = make_trainer(store, tmp_path, steps=40, schedule=Schedule(40, 2e-3, warmup=4, momentum=0.9))
    batch = next(iter(trainer.data_loader))
    assert batch["hidden_q"].shape == (2, 2, 3, 1)
    trainer.data_loader.dataset.__class__ = type(
        "Same", (AlignedPair,), {"__getitem__": lambda self, i: super(type(self), self).__getitem__(i % 2)}
    )
    trainer.run()
    first, last = read_log(tmp_path)[0], read_log(tmp_path)[-1]
    assert last["l_r"] < first["l_r"] and last["l_dv"] < first["l_dv"] and last["l_st"] < first["l_st"]
    assert batch["crop_q"].shape == (2, 1, 32, 48, 16)


def test_the_teacher_follows_the_student_after_its_step(store, tmp_path):
    follow_at_once = Schedule(1, 1e-3, momentum=0.0, final_momentum=0.0)
    trainer = make_trainer(store, tmp_path, steps=1, schedule=follow_at_once)
    before = {name: tensor.clone() for name, tensor in trainer.student.named_parameters()}
    trainer.run()
    after = dict(trainer.student.named_parameters())
    for name, tensor in trainer.teacher.named_parameters():
        assert torch.equal(tensor, after[name]), name
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())  # it did learn


def test_parts_of_a_batch_give_the_whole_batchs_gradient(store, tmp_path):
    gradients = []
    for accumulate in (1, 2):
        trainer = make_trainer(
            store, tmp_path / str(accumulate), steps=1, batch=4, accumulate=accumulate, clip=None
        )
        trainer.student.eval()
        for module in trainer.student.modules():
            module.train = lambda mode=True, module=module: module  # no dropout: its draws depend on shapes
        trainer.run()
        gradients.append([p.grad for p in trainer.student.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="must divide the batch of 4"):
        make_trainer(store, tmp_path / "x", batch=4, accumulate=3)


def test_a_non_finite_loss_names_term_and_scans_and_keeps_the_last_checkpoint(store, tmp_path):
    def poison(engine):
        with torch.no_grad():
            engine.student.decoder.pixels.bias.fill_(math.nan)

    trainer = make_trainer(store, tmp_path, checkpoint_every=2, handlers=[StopAt(3, poison)])
    with pytest.raises(NonFiniteLoss, match=r"Step 4: .*l_r.* on case\d.*iteration_00000002.pt"):
        trainer.run()
    content = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert content["iteration"] == 2
    assert all(torch.isfinite(t).all() for t in content["student"].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_leaves(store, tmp_path, number):
    trainer = make_trainer(
        store, tmp_path, handlers=[LeaveOnSignal(), StopAt(3, lambda e: os.kill(os.getpid(), number))]
    )
    before = signal.getsignal(number)
    trainer.run()
    assert signal.getsignal(number) is before
    assert trainer.state.iteration in (3, 4)
    assert (
        load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))["iteration"] == trainer.state.iteration
    )


def test_a_second_ctrl_c_does_not_wait(store, tmp_path):
    leave = LeaveOnSignal()

    def twice(engine):
        signal.raise_signal(signal.SIGINT)  # returns after the handler ran
        assert leave.asked
        signal.raise_signal(signal.SIGINT)

    ignored_under_nohup = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_trainer(store, tmp_path, handlers=[leave, StopAt(3, twice)]).run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ignored_under_nohup)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_trainer(store, tmp_path):
    """torchrun, timeout and Slurm signal the group; a dead worker would end the run without a checkpoint."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import LeaveOnSignal, StopAt, make_trainer
from custom.data.store.volume_store import VolumeStore
trainer = make_trainer(VolumeStore({str(store.path)!r}), {str(tmp_path)!r}, workers=1, steps=30,
    handlers=[LeaveOnSignal(), StopAt(3, lambda e: os.killpg(os.getpgid(0), signal.SIGINT))])
trainer.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], start_new_session=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 3 <= load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))["iteration"] < 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_repeated_signals_do_not_harm_the_last_save(store, tmp_path, number):
    """Schedulers send more than one; the last checkpoint takes seconds on a slow disk."""
    code = f"""
import os, sys, time, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import LeaveOnSignal, StopAt, make_trainer
from custom.data.store.volume_store import VolumeStore
save = torch.save
def slowly(content, file):
    print("saving", flush=True)
    time.sleep(1.5)
    save(content, file)
torch.save = slowly
make_trainer(VolumeStore({str(store.path)!r}), {str(tmp_path)!r}, workers=1, steps=1000, checkpoint_every=0,
    handlers=[LeaveOnSignal(), StopAt(3, lambda e: os.kill(os.getpid(), {int(number)}))]).run()
"""
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "saving\n"
    for _ in range(20):
        running.send_signal(number)
        time.sleep(0.05)
    assert running.wait() == 0, running.stderr.read()[-2000:]
    assert 3 <= load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))["iteration"] < 1000


def test_other_settings_or_scans_do_not_go_on_as_the_same_run(store, tmp_path):
    make_trainer(store, tmp_path, steps=2, summary={"seed": 0, "trained_on": "a", "iterations": 2}).run()
    with pytest.raises(
        CheckpointError, match="trained_on was 'a', now 'b'. Set it back, or choose another output_dir"
    ):
        make_trainer(store, tmp_path, steps=4, summary={"seed": 0, "trained_on": "b", "iterations": 4}).run()
    make_trainer(store, tmp_path, steps=4, summary={"seed": 0, "trained_on": "a", "iterations": 4}).run()


def test_checkpoints_of_other_runs_are_refused(store, tmp_path):
    make_trainer(store, tmp_path, steps=2).run()
    with pytest.raises(CheckpointError, match="trained with 2 samples a step, now 4"):
        make_trainer(store, tmp_path, steps=4, batch=4).run()
    with pytest.raises(CheckpointError, match="made with other settings"):
        make_trainer(store, tmp_path, steps=4, width=96).run()
    with pytest.raises(CheckpointError, match="resume is false"):
        make_trainer(store, tmp_path, steps=4, resume=False).run()


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"x": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"iteration_00000005.pt: not readable .*Delete it to go on"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "iteration_00000009.pt")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint that this version can go on with"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("iteration_00000005.pt", b"", r"it is empty\). Delete it to go on from the one before"),
        ("run.pt", b"", r"it is empty\). Name a run's iteration_<n>.pt"),
        ("model.safetensors", safetensors.torch.save({"x": torch.zeros(3)}), "it is a .safetensors file"),
        ("text.pt", b"no weights at all", "not readable as weights"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*{why}") as refusal:
        load_run(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("where", ["log.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(store, tmp_path, where):
    """Whatever the reason: a full disk, one that is gone, or a file in the way."""
    if where == "log.jsonl":
        (tmp_path / where).mkdir()
    else:
        (tmp_path / where).write_text("")
    with pytest.raises(
        AliceError, match=rf"{tmp_path}: the log cannot be written \(.*goes on from its newest"
    ):
        make_trainer(store, tmp_path, steps=1).run()


def test_a_disk_that_fills_up_during_a_run_is_said_in_one_line(store, tmp_path, monkeypatch):
    trainer = make_trainer(store, tmp_path, steps=3, checkpoint_every=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: monkeypatch.setattr(RunLog, "_write", full)
    )
    with pytest.raises(AliceError, match="the log cannot be written .No space left on device.. Make room"):
        trainer.run()
    assert read_log(tmp_path) and latest_checkpoint(tmp_path / "checkpoints") is not None


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(3)})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left.*Make room"):
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_00000001.pt"]


def test_only_the_newest_checkpoints_stay(tmp_path):
    for i in (1, 2, 10):
        save_checkpoint(tmp_path, i, {}, keep=2)
    assert [p.name for p in checkpoints_of(tmp_path)] == ["iteration_00000002.pt", "iteration_00000010.pt"]


def test_meters_tell_spread_from_collapse():
    torch.manual_seed(0)
    even, collapsed = torch.randn(512, 16), torch.ones(512, 16) + 0.001 * torch.randn(512, 16)
    assert (
        float(embedding_std(even)) == pytest.approx(1.0, abs=0.05) and float(embedding_std(collapsed)) < 0.01
    )
    line = torch.randn(100, 1) * torch.ones(1, 16)
    assert float(effective_rank(line)) == pytest.approx(1.0, abs=1e-2) and float(effective_rank(even)) > 15
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert float(mean_cosine(vectors, ["a", "a", "b"])) == 0.0
    assert float(mean_cosine(vectors, ["a", "b", "b"])) == pytest.approx(0.5)


def test_monitors_and_probe_report_without_touching_the_run(store, tmp_path):
    probed = []
    handlers = [
        Monitors(every=2),
        ProbeHandler(lambda encoder: probed.append(encoder.training) or {"retrieval": 0.5}, every=2),
    ]
    make_trainer(store, tmp_path / "with", steps=4, handlers=handlers, similarity="dino").run()
    make_trainer(store, tmp_path / "without", steps=4, similarity="dino").run()
    lines = read_log(tmp_path / "with")
    assert lines[0]["step"] == 0 and lines[0]["probe/retrieval"] == 0.5
    reported = next(line for line in lines if line["step"] == 2)
    assert {
        "monitor/std_teacher",
        "monitor/rank_teacher",
        "monitor/ema_drift",
        "monitor/grad/l_r",
        "monitor/grad/l_dv",
        "monitor/grad/l_st",
    } <= set(reported)
    assert reported["monitor/grad/l_r"] > 0 and probed == [False] * 3
    shown = reported["monitor/scores_histogram"]
    assert (shown["from"], shown["to"]) == (-1.0, 1.0) and sum(
        shown["counts"]
    ) == 2 * 2  # two steps of two pairs
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == ["monitor/scores"]
    assert losses(tmp_path / "without") == [row for row in losses_of(lines) if row[0] > 0]


def losses_of(lines):
    return [(x["step"], *(x.get(k) for k in ("total", "l_r", "l_dv", "l_st", "grad_norm"))) for x in lines]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"steps": 0}, "iterations must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"warmup": 20}, "warmup must be between 0 and the run's 10"),
    ],
)
def test_schedules_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"steps": 10, "learning_rate": 1e-3} | kwargs))
