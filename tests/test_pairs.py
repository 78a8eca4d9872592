import subprocess
import sys

import numpy as np
import pytest
import torch

from custom.data.grid.profiles import window
from custom.engine.loader import RankedBatches, sample_loader
from custom.landmarks.aligners.make import make_aligner
from custom.landmarks.aligners.protocol import Match
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.pairs import AlignedPair
from custom.methods.split import hold_back
from custom.methods.views import MaskedBatch, Masking, TargetView
from custom.space import to_voxels, to_world

CROP = (16, 12, 8)


class Shifted:
    """Every point lies 9, -6, 4 mm further in every other scan."""

    name, threshold = "shifted", 0.0
    shift = np.array([9.0, -6.0, 4.0])

    def align(self, scan_q, point_mm, scan_k, rng):
        return Match(point_mm + self.shift, 0.9)


class Unsure(Shifted):
    threshold = 0.95


def dataset(store, aligner=None, **kwargs):
    return AlignedPair(store, aligner or CoordinateAligner(store), CROP, **kwargs)


def test_a_pair_is_two_patients_at_the_matched_point_with_one_offset(store):
    pairs = dataset(store, Shifted(), max_redraws=0)
    for index in range(30):
        place = pairs.place(index)
        assert store.patient(place.scan_q) != store.patient(place.scan_k)
        np.testing.assert_allclose(place.point_k - place.point_q, Shifted.shift)
        offsets = [
            start + np.array(CROP) // 2 - np.rint(to_voxels(store.affine(scan), point))
            for scan, point, start in (
                (place.scan_q, place.point_q, place.start_q),
                (place.scan_k, place.point_k, place.start_k),
            )
        ]
        assert np.array_equal(offsets[0], offsets[1])
        assert np.all(np.abs(offsets[0]) <= np.array(CROP) // 4)


def test_query_points_lie_in_the_body(store):
    pairs = dataset(store)
    for index in range(40):
        place = pairs.place(index)
        voxel = np.rint(to_voxels(store.affine(place.scan_q), place.point_q)).astype(int)
        assert (store.body_voxels(place.scan_q) == voxel).all(axis=1).any()


def test_crops_are_read_where_the_bookkeeping_says(store):
    pairs = dataset(store)
    item, place = pairs[5], pairs.place(5)
    expected = window(store.read_crop(place.scan_k, place.start_k, CROP, fill=-175), -175, 250)
    assert torch.equal(item["crop_k"][0], torch.from_numpy(expected))
    assert item["crop_q"].shape == (1, *CROP) and item["crop_q"].min() >= 0 and item["crop_q"].max() <= 1
    assert (item["scan_q"], item["scan_k"], item["score"]) == (place.scan_q, place.scan_k, place.score)


def test_the_window_maps_hu_to_0_to_1():
    out = window(np.array([-1000, -175, 37, 250, 3000], np.int16), -175, 250)
    np.testing.assert_allclose(out, [0, 0, 212 / 425, 1, 1], rtol=1e-6)


def test_pairs_are_a_function_of_their_number_and_the_seed(store):
    a, b, other = dataset(store, seed=3), dataset(store, seed=3), dataset(store, seed=4)
    assert torch.equal(a[17]["crop_q"], b[17]["crop_q"]) and a[17]["seed"] == b[17]["seed"]
    assert any(not torch.equal(a[i]["crop_q"], other[i]["crop_q"]) for i in range(3))
    assert len({a[i]["seed"] for i in range(50)}) == 50


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_ranks_and_restarts_give_the_same_pairs(store, workers):
    pairs = dataset(store, seed=1)
    whole = [b["seed"] for b in sample_loader(pairs, 4, 3)]
    split = [[b["seed"] for b in sample_loader(pairs, 2, 3, workers, rank, 2)] for rank in (0, 1)]
    assert all(torch.equal(w, torch.cat([s0, s1])) for w, s0, s1 in zip(whole, *split, strict=True))
    resumed = sample_loader(pairs, 4, 3, workers)
    resumed.batch_sampler.start = 2
    assert [b["seed"].tolist() for b in resumed] == [whole[2].tolist()]
    assert len(RankedBatches(4, 3, start=2)) == 1


def test_unsure_matches_are_redrawn_then_replaced_by_the_scan_itself(store):
    place = dataset(store, Unsure(), max_redraws=3).place(0)
    assert place.fallback and place.scan_q == place.scan_k and place.redraws == 3
    assert np.array_equal(place.start_q, place.start_k)
    item = dataset(store, Unsure(), max_redraws=3)[0]
    assert torch.equal(item["crop_q"], item["crop_k"])


def test_a_crop_that_would_leave_a_volume_is_redrawn_where_it_can_be(store):
    pairs = dataset(store, max_redraws=50)
    for index in range(30):
        place = pairs.place(index)
        for scan, start in ((place.scan_q, place.start_q), (place.scan_k, place.start_k)):
            assert (start >= 0).all() and (start + np.array(CROP) <= store.shape(scan)).all()


def test_a_volume_smaller_than_the_crop_is_padded_not_refused(store):
    pairs = AlignedPair(store, CoordinateAligner(store), (80, 64, 64), max_redraws=5)
    item = pairs[0]
    assert (
        item["crop_q"].shape == (1, 80, 64, 64) and (item["crop_q"] == 0).any() and (item["crop_q"] > 0).any()
    )


def test_a_queue_pairs_with_recent_queries(store):
    pairs = dataset(store, queue_length=1)
    followed = [pairs.place(i).scan_k == pairs.place(i - 1).scan_q for i in range(1, 30)
                if store.patient(pairs._draw_scan(i)) != store.patient(pairs._draw_scan(i - 1))]  # fmt: skip
    assert all(followed) and followed


def test_coordinate_alignment_keeps_the_relative_place_in_the_body(store):
    q, k = store.names[:2]
    aligner, rng = CoordinateAligner(store), np.random.default_rng(0)
    corner = to_world(store.affine(q), store.body_box_mm(q)[0])
    np.testing.assert_allclose(
        aligner.align(q, corner, k, rng).point_mm, to_world(store.affine(k), store.body_box_mm(k)[0])
    )
    point = to_world(store.affine(q), store.body_voxels(q)[100])
    there = aligner.align(q, point, k, rng).point_mm
    np.testing.assert_allclose(aligner.align(k, there, q, rng).point_mm, point, atol=1e-9)


def test_random_alignment_stays_in_the_body_and_knows_nothing(store):
    q, k = store.names[:2]
    aligner = make_aligner("random", store)
    points = [aligner.align(q, np.zeros(3), k, np.random.default_rng(i)).point_mm for i in range(20)]
    assert np.std(points, axis=0).min() > 10
    with pytest.raises(ValueError, match="aligner must be one of coordinate"):
        make_aligner("registration", store)


def test_patients_are_held_back_whole_and_two_stay(store):
    train, held = hold_back(store, 2, seed=0)
    assert len(held) == 2 and not {store.patient(n) for n in train} & {store.patient(n) for n in held}
    assert len(hold_back(store, 99)[0]) == 2
    assert hold_back(store, 2, seed=0) == (train, held)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"crop_size": (0, 4, 4)}, "crop_size"),
        ({"window_hu": (250, -175)}, "window_hu must be two rising"),
        ({"max_offset": 2}, "max_offset"),
        ({"names": ["case0"]}, "scans of 1 patient"),
    ],
)
def test_settings_out_of_range_are_refused(store, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AlignedPair(**({"store": store, "aligner": CoordinateAligner(store), "crop_size": CROP} | kwargs))


# -- views -------------------------------------------------------------------------------------------------------


def test_a_view_without_strength_is_the_crop():
    crop, seeds = torch.rand(2, 1, 12, 10, 8), torch.tensor([1, 2])
    same = TargetView((1, 1, 2), 0, 1e-12, scale=0, shift=0, noise=0)(crop, seeds)
    torch.testing.assert_close(same, crop, atol=1e-5, rtol=0)
    assert torch.equal(TargetView((1, 1, 2), 0, 0, scale=0, shift=0, noise=0)(crop, seeds), crop)


def test_a_view_depends_on_its_seed_alone_not_on_its_batch():
    crop, seeds = torch.rand(3, 1, 12, 10, 8), torch.tensor([5, 6, 7])
    view = TargetView((1.0, 1.0, 2.0))
    whole = view(crop, seeds)
    torch.testing.assert_close(view(crop[1:2], seeds[1:2]), whole[1:2])
    assert not torch.allclose(view(crop[1:2], seeds[2:3]), whole[1:2])


def test_flips_act_on_their_axis_and_left_right_is_off_by_default():
    crop, seeds = torch.rand(1, 1, 6, 5, 4), torch.tensor([0])
    still = {"rotation": 0, "zoom": 0, "scale": 0, "shift": 0, "noise": 0}
    for axis in range(3):
        flip = [0.0, 0.0, 0.0]
        flip[axis] = 1.0
        torch.testing.assert_close(
            TargetView(flip=flip, **still)(crop, seeds), crop.flip(axis + 2), atol=1e-5, rtol=0
        )
    assert TargetView().flip[0] == 0


def test_a_rotation_is_one_in_millimetres_on_unequal_voxels():
    view = TargetView((1.0, 1.0, 4.0), rotation=20, zoom=0.0)
    theta = view.matrices(torch.rand(4, 7, generator=torch.Generator().manual_seed(0)), (40, 30, 20))
    half = torch.tensor([40.0, 30.0, 20.0]) * torch.tensor([1.0, 1.0, 4.0]) / 2
    in_mm = theta[:, :, :3].flip(1).flip(2) * half[None, :, None] / half[None, None, :]
    torch.testing.assert_close(in_mm @ in_mm.transpose(1, 2), torch.eye(3).expand(4, 3, 3), atol=1e-5, rtol=0)


def test_a_quarter_turn_about_z_moves_voxels_as_it_should():
    crop = torch.zeros(1, 1, 9, 9, 3)
    crop[0, 0, 8, 4, 1] = 1.0  # at +x
    view = TargetView(rotation=90, zoom=0, scale=0, shift=0, noise=0)
    theta = view.matrices(torch.tensor([[0.5, 0.5, 1.0, 0.5, 1, 1, 1]]), (9, 9, 3))  # +90 degrees about z
    grid = torch.nn.functional.affine_grid(theta, [1, 1, 9, 9, 3], align_corners=False)
    out = torch.nn.functional.grid_sample(crop, grid, align_corners=False)
    assert (
        out[0, 0].argmax()
        == torch.zeros(9, 9, 3)
        .index_put((torch.tensor(4), torch.tensor(0), torch.tensor(1)), torch.tensor(1.0))
        .argmax()
    )


def test_a_crop_too_small_to_mask_is_refused_before_any_worker_starts():
    with pytest.raises(ValueError, match="leaves none visible"):
        MaskedBatch(Masking(0.75), (2, 1, 1))


def test_masks_follow_the_sample_not_the_batch():
    seeds = torch.tensor([3, 4, 5])
    masking = Masking(0.75)
    assert torch.equal(masking(seeds, (4, 3, 2))[1], masking(seeds[1:2], (4, 3, 2))[0])
    with pytest.raises(ValueError, match="masking must be one of random, column"):
        Masking(kind="grid")
    with pytest.raises(ValueError, match="flip must be three"):
        TargetView(flip=(0.5, 2, 0))


def test_q_and_k_hide_different_places_and_as_many():
    collate = MaskedBatch(Masking(0.75), (4, 3, 2), keys=("crop_q", "crop_k"))
    batch = collate([{"seed": seed} for seed in (3, 10**6, 2**40)])
    hidden_q, hidden_k = batch["hidden_q"].flatten(1), batch["hidden_k"].flatten(1)
    assert (hidden_q != hidden_k).any(dim=1).all()
    assert hidden_q.sum(dim=1).tolist() == hidden_k.sum(dim=1).tolist() == [18] * 3


@pytest.mark.slow
def test_a_program_ends_though_workers_are_left_that_do_not_hear_its_signal(store):
    code = (
        "import sys, torch\n"
        "from custom.methods.pairs import AlignedPair\nfrom custom.engine.loader import sample_loader\n"
        "from custom.data.store.volume_store import VolumeStore\n"
        "from custom.landmarks.aligners.make import make_aligner\n"
        "store = VolumeStore(sys.argv[1])\n"
        "loader = sample_loader(AlignedPair(store, make_aligner('random', store), (16, 16, 16)), 1, 1000, workers=2)\n"
        "sys.kept = iter(loader)\n"  # lives to the very end
        "next(sys.kept)\n"
        "print('drawn')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "drawn", done.stderr
