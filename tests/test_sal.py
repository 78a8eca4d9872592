"""SAL: both losses by hand, which crops belong together, and what tells learning from collapse."""

import logging
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, TINY_VIT

from custom.bundles.preflight import check_files
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.engine.loader import sample_loader
from custom.engine.monitors import Monitors
from custom.engine.run_log import RunLog, read_log
from custom.engine.schedules import decay_groups, scaled_rate
from custom.engine.trainer import PretrainTrainer, Schedule
from custom.errors import AliceError
from custom.methods.registry import build_student
from custom.methods.rivals.two_views import ALIKE_STEPS
from custom.methods.sal.crop_group import CropGroup
from custom.methods.sal.losses import exact, global_perception, local_alignment, local_term, near, variance
from custom.methods.sal.method import Sal, SalOutput, SalStudent
from custom.methods.views import MaskedBatch, Masking, TargetView

CROP = (32, 32, 16)
E = torch.eye(4)


def la(x, y, grid=None, windows=(1, 1, 1)):
    x, y = torch.as_tensor(x)[None].float(), torch.as_tensor(y)[None].float()
    return float(local_alignment(x, y, grid or (x.shape[1], 1, 1), windows))


def rolled(shape, shift, axis):
    """One-hot tokens of a grid, and the same ones moved along an axis."""
    tokens = torch.eye(math.prod(shape)).view(*shape, -1)
    return tokens.flatten(0, 2), tokens.roll(shift, axis).flatten(0, 2)


def places(*fractions):
    """Relative positions, written as decimals, as numerators and denominators."""
    exactly = [Fraction(text) for text in fractions]
    return torch.tensor([[f.numerator, f.denominator] for f in exactly])


def slices(count):
    return torch.tensor([[i + 1, count] for i in range(count)])


def encoder(depth=3, width=48, crop=CROP):
    torch.manual_seed(0)
    size = {"img_size": crop, "num_layers": depth, "hidden_size": width, "mlp_dim": 2 * width}
    return token_encoder(MaskedViT(**TINY_VIT | size, pos_embed_type="sincos"))


def engine_of(store, folder, steps=2, batch=2, rate=2e-4, handlers=(), net=None, draws=None, **options):
    net = net or encoder()
    method = Sal(SalStudent(net, 128), view=TargetView(rotation=0, zoom=0), **options)
    draws = draws or CropGroup(store, CROP)
    return PretrainTrainer(
        device="cpu",
        method=method,
        optimizer=torch.optim.AdamW(decay_groups(method.student, 0.05), lr=1.0, betas=(0.9, 0.95)),
        loader=sample_loader(draws, batch, steps, collate=MaskedBatch(Masking(0.5), (2, 2, 1), ())),
        schedule=Schedule(steps, rate),
        run_dir=folder,
        train_handlers=handlers,
    )


# -- local alignment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y, right",
    [
        (E[[0, 1]], E[[1, 0]], 0.0),
        (E[[0, 1]], E[[0, 0]], 0.5),
        (E[[0, 1]], (E[[0, 0]] + E[[1, 1]]) / math.sqrt(2), 0.292893),
        (torch.ones(5, 3), torch.ones(5, 3), 0.0),  # constant features are its trivial optimum
        ([[1.0, 0.0]], [[-1.0, 0.0]], 2.0),
    ],
)
def test_local_alignment_by_hand(x, y, right):
    assert la(x, y) == pytest.approx(right, abs=1e-5)


def test_local_alignment_has_a_direction():
    assert la(E[[0, 1]], E[[0, 0]]) == pytest.approx(0.5) and la(E[[0, 0]], E[[0, 1]]) == pytest.approx(0)


def test_windows_by_hand():
    for shift, right in ((2, (0, 1, 1)), (1, (0, 0.5, 1))):
        x, y = rolled((4, 4, 1), shift, 0)
        found = [la(x, y, (4, 4, 1), (r, r, 1)) for r in (1, 2, 4)]
        assert found == pytest.approx(right, abs=1e-5)
    x, y = rolled((4, 4, 4), 1, 2)
    assert [la(x, y, (4, 4, 4), (r, r, r)) for r in (1, 2, 4)] == pytest.approx((0, 0.5, 1), abs=1e-5)
    # a slab that moved along z finds itself, since windows are cut in the plane alone
    assert [la(x, y, (4, 4, 4), (r, r, 1)) for r in (1, 2, 4)] == pytest.approx((0, 0, 0), abs=1e-5)


def test_smaller_windows_find_no_better_partner_and_order_inside_them_does_not_matter():
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, 16)
    grown = [la(x, y, (8, 8, 1), (r, r, 1)) for r in (1, 2, 4, 8)]
    unit_x, unit_y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    assert grown[0] == pytest.approx(float((1 - (unit_x @ unit_y.T).amax(1)).mean()), abs=1e-6)
    assert all(a < b for a, b in pairwise(grown))
    first_window = torch.arange(64).view(8, 8)[:4, :4].flatten()
    shuffled = torch.arange(64)
    shuffled[first_window] = first_window[torch.randperm(16)]
    windows = ((8, 8, 1), (2, 2, 1))
    assert la(x, y[shuffled], *windows) == pytest.approx(grown[1], abs=1e-6)
    with pytest.raises(
        ValueError, match="windows: 3 along y do not divide the grid's 8 tokens; take one of 1, 2, 4, 8"
    ):
        la(x, y, (8, 8, 1), (1, 3, 1))


def test_windows_are_those_of_their_axis():
    """On unequal sides, by loops over the tokens of each window."""
    grid, windows = (2, 6, 4), (1, 3, 2)
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(2, 48, 5), dim=-1)
    cells = np.stack(np.unravel_index(np.arange(48), grid), -1)
    window = [tuple(c // (np.array(grid) // windows)) for c in cells]
    expected = [1 - max(float(x[p] @ y[q]) for q in range(48) if window[q] == window[p]) for p in range(48)]
    assert la(x, y, grid, windows) == pytest.approx(np.mean(expected), abs=1e-5)


def test_half_precision_gives_no_negative_distance():
    x = torch.randn(1, 64, 48).bfloat16()
    assert float(local_alignment(x, x, (64, 1, 1))) == pytest.approx(0, abs=1e-6)


def test_without_pairs_the_local_loss_is_0_and_so_is_its_gradient():
    tokens = torch.randn(3, 4, 5, requires_grad=True)
    found = local_term(tokens, torch.zeros(0, 2, dtype=torch.long), (4, 1, 1), (1, 1, 1))
    found.backward()
    assert float(found) == 0 and torch.equal(tokens.grad, torch.zeros(3, 4, 5))


# -- global perception ---------------------------------------------------------------------------------------


def gp(z, positions, t, tau=0.1):
    return global_perception(z, near(positions, positions, exact(t)), tau)


FOUR = ("0.1", "0.1", "0.9", "0.9")


def test_global_perception_by_hand():
    p, alike = places(*FOUR), torch.ones(4, 3)
    assert float(gp(E[[0, 0, 1, 1]], p, 0.35)) == pytest.approx(9.08e-5, abs=1e-6)
    for z in (alike, E):
        assert float(gp(z, p, 0.35)) == pytest.approx(1.098612, abs=1e-5)
        assert float(gp(z, p, 0.35)) / 0.7 == pytest.approx(1.569446, abs=1e-5)
    assert float(gp(E[[0, 1, 0, 1]], p, 0.35)) == pytest.approx(10.000091, abs=1e-5)
    assert float(gp(E[[0, 0, 1, 1]], p, 0.35, tau=1.0)) == pytest.approx(0.551445, abs=1e-5)


def test_rows_without_a_positive_do_not_count():
    z = torch.randn(3, 5, requires_grad=True)
    none = gp(z, places("0", "0.5", "1"), 0.1)
    none.backward()
    assert float(none) == 0 and torch.equal(z.grad, torch.zeros(3, 5))
    # the third row has none: the mean is over two rows, which see it as a wrong answer
    found = gp(E[[0, 0, 1]], places("0.2", "0.25", "0.9"), 0.1, tau=1.0)
    assert float(found) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_the_scale_and_the_weights_act_on_the_terms():
    method = Sal(SalStudent(encoder(), 8), gp_scale=0.1 / 0.07, weight_la=0.3, weight_gp=2.0)
    batch = {
        "crops": torch.rand(1, 4, 1, *CROP), "pairs": torch.zeros(1, 4, 4, dtype=torch.bool), "seed": torch.arange(1),
        "position": places(*FOUR)[None], "threshold": torch.tensor([[7, 20]]),
    }  # fmt: skip
    batch["pairs"][0, 0, 1] = True
    views = method.views(batch, torch.device("cpu"))
    assert views.pairs.tolist() == [[0, 1]] and views.threshold == exact(0.35)
    local = torch.stack([E, E[[0, 0, 0, 0]], E, E])  # one token in four of the first crop finds its like
    terms = method.losses(SalOutput(torch.rand(4, 4, 48), local, torch.ones(4, 7)), views, None, 0)
    assert float(terms["l_gp"]) == pytest.approx(1.098612 / 0.7, abs=1e-5)
    assert float(terms["l_gp/alike"]) == pytest.approx(1.098612 / 0.7, abs=1e-5)
    assert float(terms["l_la"]) == pytest.approx(0.75)
    assert float(terms["total"]) == pytest.approx(0.3 * float(terms["l_la"]) + 2 * 1.098612 / 0.7, abs=1e-4)


# -- which crops belong together -----------------------------------------------------------------------------


@pytest.mark.parametrize("t, count", [(0.35, 48), (0.1, 0), (0.2, 18), (0.3, 34)])
def test_positions_are_compared_exactly(t, count):
    p = slices(10)
    found = near(p, p, exact(t))
    assert int(found.sum()) - 10 == count
    if t in (0.1, 0.2, 0.3):  # what floating point makes of it
        real = p[:, 0] / p[:, 1]
        assert int(((real[:, None] - real).abs() < t).sum()) - 10 != count


def test_another_scan_at_the_same_place_is_a_positive_and_no_local_pair(store, tmp_path):
    batch = next(iter(engine_of(store, tmp_path, batch=3).data_loader))
    views = engine_of(store, tmp_path).method.views(batch, torch.device("cpu"))
    scan_of = torch.arange(3).repeat_interleave(4)
    assert len(views.pairs) >= 6 and torch.equal(scan_of[views.pairs[:, 0]], scan_of[views.pairs[:, 1]])
    ordered = {tuple(pair) for pair in views.pairs.tolist()}
    assert {(j, i) for i, j in ordered} == ordered and not any(i == j for i, j in ordered)
    same = places("0.5", "0.5", "0.9")
    assert near(same, same, exact(0.1))[0, 1]


def test_every_sample_has_a_pair_and_crops_share_x_and_y(store):
    draws = CropGroup(store, CROP, t=0.1, seed=3)
    for i in range(200):
        name, start, trivial = draws.place(i)
        low, high = store.body_box_mm(name)[:, 2]
        apart = abs(int(start[1, 2] - start[0, 2]))
        assert not trivial and 0 < apart < min(16, 0.1 * (high - low))
        assert len(start) == 4 and (start[:, :2] == start[0, :2]).all()
        assert start[:, 2].min() >= 0 and start[:, 2].max() <= store.shape(name)[2] - 16
    heights = [int(draws.place(i)[1][k, 2]) for i in range(100) for k in (2, 3)]
    assert min(heights) < 3 and max(heights) > 28  # of 31: the others lie anywhere


def test_a_sample_is_a_function_of_its_number(store):
    draws = CropGroup(store, CROP, t=0.1, seed=3)
    samples = [draws[i] for i in range(6)]
    assert sorted(sample["patient"] for sample in samples) == draws.patients
    again = CropGroup(store, CROP, t=0.1, seed=3)[4]
    assert all(torch.equal(again[k], samples[4][k]) for k in ("crops", "start", "position", "pairs"))
    assert again["seed"] == samples[4]["seed"] != CropGroup(store, CROP, t=0.1, seed=4)[4]["seed"]


def test_positions_and_pairs_are_those_of_the_crops(store):
    sample = CropGroup(store, CROP, t=0.2, crops_per_scan=6, seed=3)[1]
    low, high = store.body_box_mm(sample["scan"])[:, 2]
    start, (above, below) = sample["start"][:, 2], sample["position"].unbind(1)
    expected = (start + 15 / 2 - low) / (high - low)
    torch.testing.assert_close(above / below, expected.float())
    for a in range(6):
        for b in range(6):
            apart = abs(int(start[a] - start[b]))
            assert sample["pairs"][a, b] == (0 < apart < min(16, 0.2 * (high - low)))
    tall = CropGroup(store, CROP, t=1.0, crops_per_scan=6, seed=3)[1]  # near, but some share no tissue
    apart = (tall["start"][:, 2, None] - tall["start"][:, 2]).abs()
    assert torch.equal(tall["pairs"], (apart > 0) & (apart < 16)) and (apart >= 16).any()


def test_crops_show_what_lies_where_they_start(store):
    sample = CropGroup(store, CROP, seed=1)[0]
    shift = int(sample["start"][1, 2] - sample["start"][0, 2])
    low, high = sorted((0, 1), key=lambda k: int(sample["start"][k, 2]))
    step = abs(shift)
    assert torch.equal(sample["crops"][low, ..., step:], sample["crops"][high, ..., : 16 - step])


def test_a_scan_too_thin_for_a_second_crop_is_counted_and_not_compared(store, tmp_path):
    thin = CropGroup(store, (32, 32, 48), t=0.1)  # 47 voxels in z
    assert thin[0]["trivial"] and not thin[0]["pairs"].any()
    assert torch.equal(thin[0]["crops"][0], thin[0]["crops"][1])
    narrow = CropGroup(store, CROP, t=0.02)  # less than one voxel
    assert narrow[0]["trivial"]
    folder = tmp_path / "run"
    net = encoder(crop=(32, 32, 48))
    engine = engine_of(store, folder, handlers=[Monitors(every=1), RunLog(folder)], net=net, draws=thin)
    engine.run()
    line = read_log(folder)[-1]
    assert line["monitor/pairs_trivial"] == 1 and line["l_la/pairs"] == 0 and line["l_la"] == 0


def test_views_of_one_crop_are_positives_but_no_pairs(store):
    sample = CropGroup(store, CROP, views_per_crop=2, crops_per_scan=3)[0]
    assert sample["crops"].shape == (6, 1, *CROP) and torch.equal(sample["crops"][0], sample["crops"][1])
    assert not sample["pairs"][0, 1] and sample["pairs"][0, 2]
    assert near(sample["position"], sample["position"], exact(0.1))[0, 1]
    assert CropGroup(store, CROP, views_per_crop=2, crops_per_scan=3).crops == 6


def test_rates_and_speeds_count_crops(store, tmp_path):
    engine = engine_of(store, tmp_path, batch=4)
    assert scaled_rate(1.6e-3, engine.data_loader) == pytest.approx(2e-4)  # 16 crops of 128
    assert engine.crops == 4


# -- views ---------------------------------------------------------------------------------------------------


def test_a_scan_has_one_geometry_and_each_crop_its_own_intensity():
    crops = torch.rand(2, 1, 1, *CROP).expand(2, 3, 1, *CROP)
    batch = {
        "crops": crops, "pairs": torch.zeros(2, 3, 3, dtype=torch.bool), "seed": torch.tensor([5, 6]),
        "position": torch.ones(2, 3, 2, dtype=torch.long), "threshold": torch.tensor([[1, 10]] * 2),
    }  # fmt: skip
    turned = TargetView(rotation=15, scale=0, shift=0, noise=0)
    student = SalStudent(encoder(), 8)
    seen = Sal(student, scan_view=turned).views(batch, torch.device("cpu")).crop.view(2, 3, *CROP)
    assert torch.equal(seen[0, 0], seen[0, 1]) and torch.equal(seen[1, 0], seen[1, 2])
    assert not torch.equal(seen[0, 0], crops[0, 0, 0])
    own = Sal(student, view=TargetView(rotation=0, zoom=0)).views(batch, torch.device("cpu")).crop
    assert not torch.equal(own[0], own[1])
    with pytest.raises(AliceError, match="set rotation, zoom and flip of method::view to 0"):
        Sal(student, view=TargetView(rotation=1, zoom=0))


# -- learning and collapse -----------------------------------------------------------------------------------


def test_it_learns_on_one_batch_and_tokens_stay_apart(store, tmp_path):
    engine = engine_of(store, tmp_path, batch=3, net=encoder(4, 96))
    batch = next(iter(engine.data_loader))
    optimizer = torch.optim.AdamW(engine.online.parameters(), lr=2e-4, betas=(0.9, 0.95))
    values = []
    for step in range(60):
        terms = engine.forward(batch, step)[1]
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        values.append(float(terms["l_gp"]))

    assert values[0] == pytest.approx(math.log(11), rel=0.05) and values[-1] < 0.75 * values[0]
    assert float(terms["sal/local_variance"]) > 0.05


@pytest.mark.slow
def test_collapse_is_told(store, tmp_path, caplog):
    """At a rate of masked modelling every token becomes alike, and the run says so (1e-3 for 8 crops)."""
    handlers = [Monitors(every=50), RunLog(tmp_path)]
    with caplog.at_level(logging.WARNING):
        engine_of(store, tmp_path, 200, rate=1e-3, handlers=handlers, net=encoder(4, 96), weight_la=1.0).run()
    log = read_log(tmp_path)
    assert log[-1]["sal/local_variance"] < 0.05 and log[-1]["l_gp/alike"] == pytest.approx(math.log(7))
    assert log[-1]["l_gp"] == pytest.approx(math.log(7), rel=0.01)
    told = [record.getMessage() for record in caplog.records]
    assert any("raise weight_gp or lower weight_la" in message for message in told)


def test_alarms_are_about_what_was_measured():
    method = Sal(SalStudent(encoder(), 8))
    method.loss.remember(torch.tensor([0.3, 0.09]))
    method.loss.remember(torch.tensor([0.2, 0.2]))  # the first step's stay
    healthy = {"sal/local_variance": 0.06, "sal/map_variance": 0.04}
    assert not method.alarms(healthy, {}) and not method.alarms({}, {})
    (told,) = method.alarms(healthy | {"sal/local_variance": 0.04}, {})
    assert "embedded tokens become alike (sal/local_variance is 0.0400, below 0.0500)" in told
    (told,) = method.alarms(healthy | {"sal/map_variance": 0.02}, {})  # it was small in the untrained network
    assert "encoder's tokens become alike (sal/map_variance is 0.0200, below 0.0300)" in told
    again = Sal(SalStudent(encoder(), 8))
    again.loss.load_state_dict(method.loss.state_dict())
    assert again.alarms(healthy | {"sal/map_variance": 0.02}, {}) == [told]
    assert float(variance(torch.ones(2, 3, 4))) == pytest.approx(0, abs=1e-6)
    assert float(variance(E)) == pytest.approx(0.75)


def test_only_long_alarms_about_vectors_are_told():
    method = Sal(SalStudent(encoder(), 8))
    for _ in range(ALIKE_STEPS):
        assert not method.alarms({}, {})
        method.loss.see(torch.tensor(1.94), math.log(7))
    assert "all alike" in method.alarms({}, {})[0]


# -- refusals and files --------------------------------------------------------------------------------------


def test_what_sal_cannot_do_is_said_before_a_run(store):
    student = SalStudent(encoder(), 8)
    with pytest.raises(AliceError, match="crops_per_scan must be at least 2, got 1"):
        CropGroup(store, CROP, crops_per_scan=1)
    with pytest.raises(AliceError, match="views_per_crop must be at least 1, got 0"):
        CropGroup(store, CROP, views_per_crop=0)
    for t in (0, 1.5, True):
        with pytest.raises(AliceError, match=f"t must be in .0, 1., a share of the body's height; got {t}"):
            CropGroup(store, CROP, t=t)
    with pytest.raises(
        AliceError, match="windows: 3 along x do not divide the grid's 2 tokens; take one of 1, 2"
    ):
        Sal(student, windows=[3, 1, 1], crop_size=CROP)
    with pytest.raises(AliceError, match="windows must be three positive whole numbers, got .2, 2"):
        Sal(student, windows=[2, 2], crop_size=CROP)
    with pytest.raises(AliceError, match="tau and gp_scale must be positive"):
        Sal(student, tau=0)
    with pytest.raises(AliceError, match="weight_la and weight_gp must be 0 or more, and not both 0"):
        Sal(student, weight_la=0, weight_gp=0)
    with pytest.raises(AliceError, match="embed_dim and out_width must be positive"):
        SalStudent(encoder(), 0)


def test_the_student_of_a_checkpoint_is_the_one_that_was_trained():
    for settings in ({"embed_dim": 24}, {"embed": False, "out_width": 32}):
        student = SalStudent(encoder(), **settings)
        again = build_student("sal", encoder().encoder, student.settings)
        again.load_state_dict(student.state_dict())
        crop = torch.rand(2, 1, *CROP)
        for ours, theirs in zip(student.eval()(crop), again.eval()(crop), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert SalStudent(encoder(), 24).embed.bias is None
    plain = SalStudent(encoder(), embed=False)(crop)
    assert plain.local is plain.tokens and plain.whole.shape == (2, 512)


def test_settings_of_sal_are_checked_by_name():
    configs = REPO / "bundles" / "alice_pretrain" / "configs"
    files = [str(configs / name) for name in ("train.yaml", "smoke.yaml", "sal.yaml")]
    check_files(files, {"method::weight_la": 0.3, "train::dataset::t": 0.35, "method::windows": [1, 1, 1]})
    with pytest.raises(ValueError, match="'method::wieght_la' is no setting .* Did you mean 'weight_la'"):
        check_files(files, {"method::wieght_la": 0.3})
    with pytest.raises(ValueError, match="is no setting"):  # the files in another order
        check_files([files[0], files[2], files[1]], {})
