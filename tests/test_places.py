"""Place matching: numbers by hand, planted shifts and maps, and what must not matter."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import CROP, DECODER, GRID, PATCH, encoder, trainer

from custom.landmarks.aligners.simple import CoordinateAligner, RandomAligner
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss
from custom.methods.alice.method import Alice
from custom.methods.alice.places import PlaceLoss, index_share, token_centres
from custom.methods.placed_pairs import PlacedPair, _folded, inverse
from custom.methods.views import TargetView

ALIKE = torch.ones(1, 4, 1)
ONE_HOT = torch.eye(4)[None]


def line(sigma=10.0, shift=0.0, student=ALIKE, teacher=ALIKE, places=None, counted=None):
    """Four tokens of 10 mm along x; the others' sides are so long that they never matter."""
    loss = PlaceLoss((10.0, 10.0, 10.0), sigma, temperature=0.1)
    centres = token_centres((4, 1, 1), (10.0, 10.0, 10.0))[None]
    places = centres - torch.tensor([shift, 0.0, 0.0]) if places is None else places
    counted = torch.ones(student.shape[:2], dtype=torch.bool) if counted is None else counted
    return loss(student, teacher, places, centres, counted)


def each(**settings):
    """The divergence of every token by itself; 0 for one that does not count."""
    rows = []
    for i in range(4):
        counted = torch.zeros(1, 4, dtype=torch.bool)
        counted[0, i] = True
        rows.append(float(line(counted=counted, **settings)["l_place"]))
    return rows


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"sigma": 5.0}, [1.018372, 0.718458, 0.718458, 1.018372]),
        ({"sigma": 10.0}, [0.469056, 0.159030, 0.159030, 0.469056]),
        ({"sigma": 5.0, "student": ONE_HOT, "teacher": ONE_HOT}, [0.826845, 1.464517, 1.464517, 0.826845]),
        ({"sigma": 10.0, "shift": 10.0, "student": ONE_HOT, "teacher": ONE_HOT}, [0.0, 5.622890, 6.190128, 6.190128]),
        ({"sigma": 10.0, "shift": 10.0, "student": ONE_HOT, "teacher": ONE_HOT.roll(-1, 1)}, [0.0, 3.378309, 4.514647, 4.514647]),
    ],
)  # fmt: skip
def test_divergences_by_hand(settings, expected):
    assert each(**settings) == pytest.approx(expected, abs=2e-6)
    valid = [v for v in expected if v]
    assert float(line(**settings)["l_place"]) == pytest.approx(sum(valid) / len(valid), abs=2e-6)


def test_a_perfect_answer_costs_nothing_and_no_answer_the_rest_of_log_n():
    centres = token_centres((4, 1, 1), (10.0,) * 3)[:, 0]
    log_answer = torch.log_softmax(-(centres[:, None] - centres).square() / 200, dim=-1)
    # unit vectors with the cosines 0.1 * log answer: rows of the matrix, completed to length 1, against the axes
    rows = 0.1 * log_answer
    student = torch.cat([rows, (1 - rows.square().sum(1, keepdim=True)).sqrt()], dim=1)[None]
    teacher = torch.cat([torch.eye(4), torch.zeros(4, 1)], dim=1)[None]
    assert float(line(student=student, teacher=teacher)["l_place"]) == pytest.approx(0, abs=1e-6)
    entropy = -(log_answer.exp() * log_answer).sum(1).mean()
    assert float(line()["l_place"]) == pytest.approx(math.log(4) - float(entropy), abs=1e-6)


def test_meters_by_hand():
    found = line(
        shift=10.0, student=ONE_HOT, teacher=ONE_HOT.roll(-1, 1)
    )  # K's token j holds Q's feature j + 1
    assert float(found["place/hits"]) == 1.0 and float(found["place/mm"]) == pytest.approx(0.0)
    assert float(found["place/valid"]) == 0.75 and float(found["place/chance"]) == 0.25
    found = line(shift=10.0, student=ONE_HOT, teacher=ONE_HOT)  # each matches its own index, one token off
    assert float(found["place/hits"]) == 0.0 and float(found["place/mm"]) == pytest.approx(10.0)


def test_tokens_without_a_place_do_not_count_and_make_no_nan():
    places = token_centres((4, 1, 1), (10.0,) * 3)[None].clone()
    places[0, 1] = math.nan
    student = ONE_HOT.clone().requires_grad_()
    found = line(places=places, student=student, teacher=ONE_HOT, sigma=5.0)
    assert float(found["l_place"]) == pytest.approx((0.826845 + 1.464517 + 0.826845) / 3, abs=2e-6)
    found["l_place"].backward()
    assert torch.isfinite(student.grad).all() and student.grad[0, 1].abs().sum() == 0
    nothing = line(counted=torch.zeros(1, 4, dtype=torch.bool))
    assert float(nothing["l_place"]) == 0 and math.isnan(float(nothing["place/hits"]))


def test_a_place_beside_the_crop_is_no_place():
    # 0.75 of a token's side from the nearest centre, along each axis
    assert float(line(shift=2.4)["place/valid"]) == 1.0 and float(line(shift=7.6)["place/valid"]) == 0.75
    sideways = token_centres((4, 1, 1), (10.0,) * 3)[None] + torch.tensor([0.0, 7.6, 0.0])
    assert float(line(places=sideways)["place/valid"]) == 0.0


def test_narrow_answers_and_temperatures_are_refused():
    with pytest.raises(
        ValueError, match="sigma_mm must be at least half of a token's side, 14 mm here; got 13"
    ):
        PlaceLoss((24.0, 24.0, 36.0), 13.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        PlaceLoss((24.0, 24.0, 36.0), temperature=0.0)


def test_the_share_of_the_index_is_one_for_positions_and_nothing_for_noise():
    torch.manual_seed(0)
    assert float(index_share(torch.randn(1, 30, 8).expand(6, -1, -1))) == pytest.approx(1.0)
    assert float(index_share(torch.randn(6, 300, 8))) < 0.02
    half = torch.randn(1, 300, 8) + torch.randn(8, 300, 8)
    assert float(index_share(half)) == pytest.approx(0.5, abs=0.05)


def placed(store, aligner=None, **options):
    return PlacedPair(store, aligner or CoordinateAligner(store), CROP, PATCH, **options)


def test_crops_lie_in_their_volumes_with_offsets_of_their_own(store):
    pairs = placed(store)
    apart = []
    for i in range(30):
        place = pairs.place(i)
        for name, start in ((place.scan_q, place.start_q), (place.scan_k, place.start_k)):
            assert ((start >= 0) & (start + np.array(CROP) <= store.shape(name))).all()
        of_points = (place.point_k - place.point_q) / store.spacing
        apart.append(np.abs((place.start_k - place.start_q) - of_points).max())
    assert max(apart) > 4  # voxels: not one offset for both


def test_a_shift_by_hand(store):
    class Shifted(RandomAligner):
        name = "shifted"

        def align(self, scan_q, point_mm, scan_k, rng):
            from custom.landmarks.aligners.protocol import Match

            return Match(point_mm + np.array([3.0, -6.0, 4.0]), 1.0)

    pairs = placed(store, Shifted(store))
    place = pairs.place(5)
    of_q, of_k = pairs.places(place)
    spacing = np.array(store.spacing)
    origins = [store.affine(n)[:3, 3] for n in (place.scan_q, place.scan_k)]
    world = (
        origins[0] + (place.start_q + np.array(PATCH) / 2 - 0.5) * spacing
    )  # the middle of Q's first token
    expected = world + np.array([3.0, -6.0, 4.0]) - origins[1] - (place.start_k - 0.5) * spacing
    np.testing.assert_allclose(of_q[0], expected, atol=1e-9)
    # there and back: what Q's token i is in K, K's coordinates bring back
    centres = token_centres(GRID, np.array(PATCH) * spacing).numpy()
    np.testing.assert_allclose(of_q - centres, -(of_k - centres), atol=1e-4)


def test_the_coordinate_aligner_maps_tokens_by_scaling(store):
    pairs = placed(store)
    aligner = CoordinateAligner(store)
    place = pairs.place(3)
    of_q, of_k = pairs.places(place)
    affine_q, affine_k = store.affine(place.scan_q), store.affine(place.scan_k)
    for token in (0, 4):
        world = affine_q[:3, :3] @ (pairs._centres[token] + place.start_q) + affine_q[:3, 3]
        there = aligner.align(place.scan_q, world, place.scan_k, None).point_mm
        inside = (
            np.linalg.solve(affine_k[:3, :3], there - affine_k[:3, 3]) - place.start_k + 0.5
        ) * store.spacing
        np.testing.assert_allclose(of_q[token], inside, atol=1e-6)
        world = affine_k[:3, :3] @ (pairs._centres[token] + place.start_k) + affine_k[:3, 3]
        back = aligner.align(place.scan_k, world, place.scan_q, None).point_mm
        inside = (
            np.linalg.solve(affine_q[:3, :3], back - affine_q[:3, 3]) - place.start_q + 0.5
        ) * store.spacing
        np.testing.assert_allclose(of_k[token], inside, atol=1e-3)


def test_an_inverse_is_one_and_says_where_it_is_not():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 100, (60, 3))

    def bent(p):
        return p @ np.diag([1.1, 0.9, 1.0]) + [5, 0, -3] + 4 * np.sin(p[:, ::-1] / 30)

    found = inverse(bent, bent(points), points)
    np.testing.assert_allclose(found, points, atol=0.05)

    def folding(p):
        return np.abs(p - 50)

    assert np.isnan(inverse(folding, np.full((4, 3), -20.0), points)).all()


def test_a_map_that_folds_is_seen_where_it_does():
    centres = token_centres((6, 4, 3), (10.0,) * 3).numpy()
    assert not _folded(centres @ np.diag([0.8, 1.2, 1.0]) + 7, centres, (6, 4, 3)).any()
    mirrored = centres.copy()
    mirrored[:, 0] = np.where(centres[:, 0] > 30, 60 - centres[:, 0], centres[:, 0])
    folded = _folded(mirrored, centres, (6, 4, 3)).reshape(6, 4, 3)
    assert folded[4:].all() and not folded[:2].any()


def test_pairs_that_share_too_little_are_drawn_again_and_counted(store):
    relaxed, strict = (
        placed(store, RandomAligner(store), min_overlap=share, max_redraws=40) for share in (0.0, 0.9)
    )
    redraws = [sum(pairs.place(i).redraws for i in range(15)) for pairs in (relaxed, strict)]
    assert redraws[0] == 0 < redraws[1]
    for i in range(15):
        of_q, of_k = strict.places(strict.place(i))
        sides = np.array(CROP) * store.spacing
        shares = [np.all((p >= 0) & (p <= sides), axis=1).mean() for p in (of_q, of_k)]
        assert min(shares) >= 0.8 or strict.place(i).redraws == 40
    with pytest.raises(ValueError, match="min_overlap must be in"):
        placed(store, min_overlap=1.5)
    with pytest.raises(ValueError, match="no multiple of the patch"):
        PlacedPair(store, CoordinateAligner(store), (32, 40, 16), PATCH)


def test_a_turned_view_says_what_each_of_its_places_shows():
    """A volume whose value is its own x, y or z in mm, seen turned: the view shows at p what ``seen_at`` says."""
    spacing, shape = (2.0, 3.0, 4.0), (24, 20, 16)
    view = TargetView(spacing, rotation=25.0, zoom=0.2, scale=0.0, shift=0.0, noise=0.0)
    seeds = torch.tensor([11, 12])
    axes = [(torch.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z) mm from the corner
    places = torch.tensor([[[24.0, 30.0, 32.0], [20.0, 36.0, 28.0], [27.0, 24.0, 34.0]]]).expand(2, -1, -1)
    said = view.seen_at(places, seeds, shape)
    for axis in range(3):
        scaled = coordinates[axis] / 100
        shown = view(scaled.expand(2, 1, *shape), seeds) * 100
        voxel = (places / torch.tensor(spacing) - 0.5) / (torch.tensor(shape) - 1) * 2 - 1
        sampled = F.grid_sample(shown, voxel.flip(-1)[:, None, None], align_corners=True)[:, 0, 0, 0]
        torch.testing.assert_close(sampled, said[..., axis], atol=0.05, rtol=0)
    still = TargetView(spacing, rotation=0.0, zoom=0.0)
    assert still.seen_at(places, seeds, shape) is places


def alice_places(**student):
    branch = StudentBranch(
        encoder(), **DECODER, head_width=64, bottleneck=32, alignment="none", inter_volume="places", **student
    )
    return Alice(
        branch,
        AliceLoss(PATCH, width=32, weight_dv=0.5, places=PlaceLoss((48.0, 48.0, 64.0))),
        TargetView((3.0, 3.0, 4.0)),
    )


@pytest.mark.parametrize("weight", ["student", "teacher"])
def test_gradients_reach_every_student_weight_and_no_teacher_weight(store, tmp_path, weight):
    engine = trainer(alice_places(), store, tmp_path, draws=placed(store))
    _, terms = engine.forward(next(iter(engine.data_loader)), 0)
    assert set(PlaceLoss.METERS) < set(terms) and float(terms["l_st"]) == 0
    terms["total"].backward()
    if weight == "student":
        for name, parameter in engine.online.named_parameters():
            assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    else:
        assert all(p.grad is None for p in engine.teacher.parameters())


@pytest.mark.slow
def test_it_learns_where_a_pair_is_cut(store, tmp_path):
    """Matches get nearer on pairs that were trained on: a planted correspondence is found."""
    pairs = placed(store, seed=4)
    pairs.__class__ = type(
        "Same", (PlacedPair,), {"__getitem__": lambda self, i: super(type(self), self).__getitem__(i % 4)}
    )
    engine = trainer(alice_places(), store, tmp_path, steps=60, draws=pairs, batch=4, rate=2e-3)
    seen = []
    from ignite.engine import Events

    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output[0]))
    engine.run()
    first, last = (np.mean([s["l_dv"] for s in part]) for part in (seen[:5], seen[-5:]))
    assert last < 0.6 * first
    hits = np.nanmean([s["place/hits"] for s in seen[-10:]])
    assert hits > 2.5 * seen[-1]["place/chance"]


def test_the_shortcut_rings_an_alarm_where_retrieval_falls():
    method, before = alice_places(), {"probe/retrieval": 0.5}
    told = {"place/index_share": 0.97, "place/hits": 0.2}
    assert (
        "place in the crop (97% of the variance" in method.alarms(told | {"probe/retrieval": 0.4}, before)[0]
    )
    assert method.alarms({"place/index_share": 0.1, "place/hits": 0.99, "probe/retrieval": 0.4}, before)
    assert not method.alarms(told | {"probe/retrieval": 0.6}, before)
    assert not method.alarms({"place/index_share": 0.3, "place/hits": 0.4, "probe/retrieval": 0.4}, before)
    assert not method.alarms({}, {})


def test_halves_of_the_method_that_do_not_fit_are_refused(store):
    student = StudentBranch(encoder(), **DECODER, head_width=64, bottleneck=32, inter_volume="places")
    with pytest.raises(ValueError, match="go together"):
        Alice(student, AliceLoss(PATCH, width=32))
    with pytest.raises(ValueError, match="inter_volume must be one of pooled, places"):
        StudentBranch(encoder(), inter_volume="place")
    with pytest.raises(ValueError, match="leave teacher_has_decoder false"):
        StudentBranch(encoder(), inter_volume="places", teacher_has_decoder=True)


def test_the_mean_is_over_crops_so_that_processes_agree_with_one():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    places = token_centres((4, 1, 1), (10.0,) * 3).expand(3, -1, -1)
    counted = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    loss = PlaceLoss((10.0,) * 3)
    whole = loss(student, teacher, places, places, counted)["l_place"]
    alone = [
        loss(*(x[i : i + 1] for x in (student, teacher, places, places, counted)))["l_place"]
        for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean())
