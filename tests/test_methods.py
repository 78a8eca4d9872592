"""Methods of the engine: what each one learns from, who gets gradients, and how a run goes on."""

import re

import pytest
import torch
from conftest import REPO, TINY_VIT

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from custom.engine.loader import sample_loader
from custom.engine.monitors import Monitors
from custom.engine.profile import StepProfile
from custom.engine.run_log import read_log
from custom.engine.schedules import decay_groups
from custom.engine.trainer import PretrainTrainer, Schedule
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss
from custom.methods.alice.method import Alice
from custom.methods.draws import OneCrop
from custom.methods.mae import Mae, MaeStudent
from custom.methods.pairs import AlignedPair
from custom.methods.registry import build_student
from custom.methods.run_folder import load_run
from custom.methods.views import MaskedBatch, Masking

DECODER = {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 4}
PATCH, GRID, CROP = (16, 16, 16), (2, 3, 1), (32, 48, 16)


def encoder():
    torch.manual_seed(0)
    return token_encoder(MaskedViT(**TINY_VIT, pos_embed_type="sincos"))


def alice(**loss):
    student = StudentBranch(encoder(), **DECODER, head_width=64, bottleneck=32)
    return Alice(student, AliceLoss(PATCH, width=32, **loss))


def mae():
    return Mae(MaeStudent(encoder(), **DECODER))


def trainer(method, store, folder, steps=4, handlers=(), draws=None, batch=2, rate=1e-3, **kwargs):
    if draws is None and isinstance(method, Alice):
        draws = AlignedPair(store, CoordinateAligner(store), CROP)
    elif draws is None:
        draws = OneCrop(store, CROP)
    network = method.student.encoder.encoder
    about = {"network": {**network.settings, "img_size": list(CROP)}, "network_type": type(network).__name__}
    return PretrainTrainer(
        device="cpu",
        method=method,
        optimizer=torch.optim.AdamW(decay_groups(method.student, 0.05), lr=1.0),
        loader=sample_loader(draws, batch, steps, collate=MaskedBatch(Masking(0.5), GRID, draws.crop_keys)),
        schedule=Schedule(steps, rate, momentum=0.9),
        run_dir=folder,
        summary=about,
        train_handlers=handlers,
        **kwargs,
    )


def test_mae_is_alice_without_its_similarity_terms(store, tmp_path):
    with_teacher, alone = alice(weight_dv=0.0, weight_st=0.0), mae()
    named = with_teacher.student.state_dict()
    alone.student.load_state_dict({k: named[k] for k in alone.student.state_dict()})
    batch = next(iter(trainer(with_teacher, store, tmp_path).data_loader))
    same = {
        "crop": torch.cat([batch["crop_q"], batch["crop_k"]]),
        "hidden": torch.cat([batch["hidden_q"], batch["hidden_k"]]),
    }
    views, own = with_teacher.views(batch, torch.device("cpu")), alone.views(same, torch.device("cpu"))
    theirs = with_teacher.losses(
        with_teacher.online(with_teacher.student, views, with_teacher.target(views)), views, None, 0
    )
    ours = alone.losses(alone.online(alone.student, own, None), own, None, 0)
    # Alice sums l_r over Q and K, MAE takes the mean of its crops
    torch.testing.assert_close(2 * ours["l_r"], theirs["l_r"], rtol=0, atol=0)
    assert float(theirs["total"]) == float(theirs["l_r"])
    theirs["total"].backward()
    ours["total"].backward()
    for name, weight in alone.student.named_parameters():
        other = dict(with_teacher.student.named_parameters())[name]
        if weight.requires_grad:
            torch.testing.assert_close(2 * weight.grad, other.grad, msg=name)


@pytest.mark.parametrize("make", [alice, mae])
def test_every_student_weight_learns_and_no_teacher_weight_does(make, store, tmp_path):
    engine = trainer(make(), store, tmp_path)
    engine.forward(next(iter(engine.data_loader)), 0)[1]["total"].backward()
    for name, weight in engine.online.named_parameters():
        assert not weight.requires_grad or weight.grad.abs().sum() > 0, name
    for name, weight in engine.teacher.named_parameters() if engine.teacher is not None else ():
        assert weight.grad is None, name


@pytest.mark.parametrize("make", [alice, mae])
def test_a_run_that_goes_on_writes_the_log_of_an_uninterrupted_one(make, store, tmp_path):
    from custom.engine.run_log import RunLog

    def run(folder, steps_left=None):
        meters = [Monitors(every=2), RunLog(folder)]
        engine = trainer(make(), store, folder, steps=6, handlers=meters, checkpoint_every=3)
        if steps_left:
            engine.add_event_handler(_completed(once=steps_left), lambda e: e.terminate())
        engine.run()

    run(tmp_path / "whole")
    run(tmp_path / "cut", steps_left=3)
    run(tmp_path / "cut")
    timed = ("samples_per_second", "crops_per_second")
    whole, cut = (
        [{k: v for k, v in line.items() if k not in timed} for line in read_log(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert whole == cut and len(whole) == 6 and any("monitor/grad/l_r" in line for line in whole)


def _completed(once):
    from ignite.engine import Events

    return Events.ITERATION_COMPLETED(once=once)


@pytest.mark.parametrize("make", [alice, mae])
def test_the_student_of_a_run_is_built_again(make, store, tmp_path):
    engine = trainer(make(), store, tmp_path)
    engine.run()
    loaded = load_run(tmp_path)
    assert loaded.summary["method"] == engine.method.name and loaded.iteration == 4
    for name, tensor in engine.online.state_dict().items():
        assert torch.equal(tensor, loaded.student.state_dict()[name]), name


def test_a_method_that_exports_its_teacher_hands_out_the_teachers_encoder(store, tmp_path):
    method = alice()
    method.exported = "teacher"
    engine = trainer(method, store, tmp_path)
    engine.run()
    found = load_run(tmp_path).student.encoder.state_dict()
    for name, tensor in engine.teacher.encoder.state_dict().items():
        assert torch.equal(tensor, found[name]), name
    assert any(not torch.equal(found[k], v) for k, v in engine.online.encoder.state_dict().items())


def test_changed_settings_are_named_by_their_path(store, tmp_path):
    trainer(alice(), store, tmp_path, steps=2).run()
    with pytest.raises(CheckpointError, match=r"loss::weight_dv was 1.0, now 0.5. Set it back"):
        trainer(alice(weight_dv=0.5), store, tmp_path, steps=4).run()
    with pytest.raises(CheckpointError, match=r"method was 'alice', now 'mae'"):
        trainer(mae(), store, tmp_path, steps=4).run()


def test_checkpoints_of_before_the_engine_are_refused_in_one_line(store, tmp_path):
    trainer(mae(), store, tmp_path, steps=2).run()
    path = latest_checkpoint(tmp_path / "checkpoints")
    content = load_checkpoint(path)
    torch.save(content | {"format": "alice-run-1"}, path)
    with pytest.raises(
        CheckpointError, match="its format is 'alice-run-1', this version reads 'alice-run-2'"
    ):
        trainer(mae(), store, tmp_path, steps=4).run()
    path.rename(path.with_name("checkpoint_iteration=2.pt"))
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        trainer(mae(), store, tmp_path, steps=4).run()


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="Method 'x' .* unknown here.* alice, mae"):
        build_student("x", torch.nn.Identity(), {})
    with pytest.raises(ValueError, match=r"Method 'sam' .* model\.safetensors"):
        build_student("sam", torch.nn.Identity(), {})


def test_a_profile_shows_sections_of_a_methods_own(store, tmp_path):
    profile, method = StepProfile(skip=0), mae()
    method.timed = lambda: {"mine": [method.student.decoder]}
    trainer(method, store, tmp_path, steps=2, handlers=[profile]).run()
    assert profile.shares()["mine"][0] > 0
    assert sum(share for _, share in profile.shares().values()) == pytest.approx(1)


def test_one_crop_lies_in_its_volume_and_is_a_function_of_its_number(store):
    draws = OneCrop(store, CROP, seed=3)
    for i in range(20):
        start = draws._draw_start(draws._draw_scan(i), draws._rng(i, 0))
        room = torch.tensor(store.shape(draws._draw_scan(i))) - torch.tensor(CROP)
        assert ((torch.as_tensor(start) >= 0) & (torch.as_tensor(start) <= room)).all()
    again = OneCrop(store, CROP, seed=3)
    assert torch.equal(draws[7]["crop"], again[7]["crop"]) and draws[7]["seed"] == again[7]["seed"]
    assert {draws[i]["patient"] for i in range(30)} == set(draws.patients)


def test_the_engine_names_no_method():
    """What only one method has must stay behind the interface."""
    parts = re.compile(
        r"l_r\b|l_dv|l_st\b|student_pooled|CASA|casa|crop_q|crop_k|hidden_q|patient_q|\bMae\b|\bAlice\b(?!'| for MONAI)"
    )
    for room in (REPO / "custom").iterdir():
        for path in () if room.name == "methods" else room.rglob("*.py"):
            code = re.sub(
                r'""".*?"""|#[^\n]*|"[^"\n]*`[^"\n]*"', "", path.read_text(encoding="utf-8"), flags=re.S
            )
            found = [word for word in parts.findall(code) if word]
            allowed = (
                {"crop_q", "crop_k"} if path.name == "runs.py" else set()
            )  # the picture draws a pair of its own
            assert not set(found) - allowed, (path, found)
