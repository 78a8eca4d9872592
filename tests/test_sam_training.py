"""Training SAM: views and their correspondences, the contrastive losses, the engine, the weights' file, the YAML."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, write_scan
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.handlers import from_engine
from monai.optimizers import WarmupCosineSchedule
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from custom.bundles.preflight import check_keys
from custom.data.phantom.cohort import find_canonical, make_phantom, write_cohort
from custom.data.store.build import build_store
from custom.engine.checkpoint import latest_checkpoint
from custom.engine.loader import sample_loader
from custom.engine.trainer import PretrainTrainer, Schedule
from custom.landmarks.embeddings.folder import EmbeddingFolder
from custom.landmarks.sam.network import SAM, SAMMaps, unit_length
from custom.landmarks.sam.scan_grid import hu_to_units
from custom.landmarks.sam.weights import load_sam_weights, note_in_weights, read_sam_metadata, save_sam
from custom.landmarks.training.look import CURVE_HU, Look, rotation_matrix, see
from custom.landmarks.training.loss import Memory, SAMLoss, both_at, cells_of, hardest, info_nce
from custom.landmarks.training.method import SamTraining, start_from
from custom.landmarks.training.places import PhantomPlaces, phantom_places
from custom.landmarks.training.training_scans import training_names
from custom.landmarks.training.view_cells import Cells, cell_indices, matched_cells
from custom.landmarks.training.view_pairs import ViewPairs
from custom.space import to_world

BUNDLE = REPO / "bundles" / "sam_landmarks"
CONFIGS = BUNDLE / "configs"
SMALL = {"crop_size": (40, 36, 18), "anchors": 30, "candidates": 600}


@pytest.fixture(scope="module")
def two_mm(tmp_path_factory):
    """Four scans of four patients at 2 mm."""
    folder = tmp_path_factory.mktemp("two_mm")
    for i in range(4):
        write_scan(folder / "scans" / f"case{i}.nii.gz", seed=i, spacing=(2.0, 2.0, 2.0))
    return build_store(folder / "scans", folder / "store", (2.0, 2.0, 2.0), progress=False)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Three small phantoms and their store."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_cohort(folder / "cohort", 3, seed=5, size="small")
    return folder / "cohort", build_store(
        folder / "cohort", folder / "store", (2.0, 2.0, 2.0), progress=False
    )


class Ramp:
    """A store of one scan whose HU are linear in world mm: x + 2 y + 3 z."""

    spacing = (2.0, 2.0, 2.0)
    slope = np.array([1.0, 2.0, 3.0])

    def __init__(self):
        self.matrix = np.array([[2.0, 0, 0, -31], [0, 2.0, 0, 17], [0, 0, 2.0, 5], [0, 0, 0, 1]])

    def affine(self, name):
        return self.matrix

    def read_crop(self, name, start, size, fill):
        index = np.stack(
            np.meshgrid(*[np.arange(n) + s for n, s in zip(size, start, strict=True)], indexing="ij"), -1
        )
        return to_world(self.matrix, index) @ self.slope


def plain(affine):
    return Look(affine, CURVE_HU, 0.0, 0.0, 0)


# -- views ---------------------------------------------------------------------------------------------------


def test_a_scaled_and_turned_view_of_a_ramp_shows_the_ramp_at_its_own_voxels():
    affine = np.eye(4)
    affine[:3, :3] = rotation_matrix(np.deg2rad([7.0, -5.0, 9.0])) @ np.diag([-1.0, -1.0, 1.0]) * 1.7
    affine[:3, 3] = (3.0, -8.0, 11.0)
    size = np.array([11, 7, 5])
    view = see(Ramp(), "ramp", plain(affine), size)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
    wanted = (to_world(affine, index) @ Ramp.slope).transpose(2, 1, 0)  # z, y, x
    np.testing.assert_allclose(view, wanted, atol=2e-3)


def test_positions_of_cells_are_the_means_of_their_voxels_and_as_many_as_sams_cells():
    for size in ((37, 50, 21), (64, 48, 18)):
        maps = SAM(2, 3).eval()(torch.zeros(1, 1, *size[::-1]))
        for level in ("fine", "coarse"):
            cells = cell_indices(size, level)
            assert len(cells) == getattr(maps, level)[0, 0].numel()
            assert tuple(cells[-1] + 1) == tuple(getattr(maps, level).shape[2:])


def test_matched_cells_of_two_views_lie_within_the_distance_asked_for(two_mm):
    pairs = ViewPairs(two_mm, **SMALL, seed=3)
    seen = 0
    for index in range(4):
        item = pairs[index]
        for view in (0, 1):
            rows = item["fine_match"][view]
            rows = rows[rows[:, 0] >= 0]
            here, there = item["fine_mm"][view][rows[:, 0]], item["fine_mm"][1 - view][rows[:, 1]]
            apart = torch.cdist(here, item["fine_mm"][1 - view])
            inside = item["fine_inside"][1 - view]
            nearest = apart.masked_fill(~inside, torch.inf).min(dim=1).values
            torch.testing.assert_close((here - there).norm(dim=1), nearest, atol=1e-3, rtol=0)
            assert (nearest < 2.0).all() and item["fine_mm"].dtype == torch.float32
            seen += len(rows)
            rows = item["coarse_match"][view]
            rows = rows[rows[:, 0] >= 0]
            off = item["coarse_mm"][view][rows[:, 0]] - item["coarse_mm"][1 - view][rows[:, 1]]
            assert (off.norm(dim=1) < 25).all() and (off[:, 2].abs() < 8).all()
    assert seen > 100


def test_a_pair_is_a_function_of_seed_and_number_and_shows_one_body(two_mm):
    first, again, other = (ViewPairs(two_mm, **SMALL, seed=s)[5] for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first if isinstance(first[k], torch.Tensor))
    assert not torch.equal(first["crop"], other["crop"])
    assert first["crop"].shape == (2, 1, 18, 36, 40) and first["crop"].min() >= -50.001


def test_views_without_augmentation_have_the_voxels_of_the_scan(two_mm):
    pairs = ViewPairs(two_mm, **SMALL, scale=(1.0, 1.0), rotation=0, contrast=0, blur=0, noise=0, jitter=0)
    name = pairs.names[0]
    look = pairs._draw_look(
        name, to_world(two_mm.affine(name), np.array([30, 26, 23])), np.random.default_rng(0)
    )
    look.affine[:3, 3] = to_world(two_mm.affine(name), np.array([50.0, 45.0, 10.0]))
    view = see(two_mm, name, look, pairs.size)
    voxels = two_mm.read_crop(name, (11, 10, 10), pairs.size)[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_allclose(view, voxels, atol=1e-2)


def test_cells_outside_of_the_scan_or_the_body_are_never_matched():
    places = np.arange(12.0).reshape(4, 3) * 10
    here = Cells(places, np.array([True, True, True, False]), np.array([True, False, True, False]))
    there = Cells(places + 0.5, np.array([True, True, False, True]), np.ones(4, bool))
    assert matched_cells(here, there, 2.0).tolist() == [[0, 0]]
    assert matched_cells(here, there, 0.1).tolist() == []
    assert matched_cells(here, there, 2.0, within_z_mm=0.4).tolist() == []


def test_two_phantoms_are_matched_where_their_canonical_coordinates_agree(phantoms):
    folder, store = phantoms
    places = phantom_places(folder, store)
    item = ViewPairs(store, places=places, across=1.0, crop_size=(64, 64, 24), seed=1)[0]
    assert item["space"] == 0 and phantom_places(None, store) is None
    rows = item["fine_match"][0]
    rows = rows[rows[:, 0] >= 0]
    assert len(rows) > 10
    assert ((item["fine_mm"][0][rows[:, 0]] - item["fine_mm"][1][rows[:, 1]]).norm(dim=1) < 2).all()
    # the same coordinates as the phantom's own inverse finds
    phantom = make_phantom([5, 0], size="small")
    voxels = np.argwhere(phantom.label == 1)[::97]
    name = store.names[0]
    points = find_canonical(phantom, phantom.canonical[tuple(voxels.T)]).points_mm
    np.testing.assert_allclose(places.at(name, points), phantom.canonical[tuple(voxels.T)], atol=1.0)
    near = places.find(name, phantom.canonical[tuple(voxels[0])])
    assert np.linalg.norm(near - points[0]) < 25


def test_scans_are_held_back_and_repeated_by_name(two_mm):
    assert training_names(two_mm, held_back="case[01]", repeats={"3$": 2}) == ["case2", "case3", "case3"]
    with pytest.raises(ValueError, match="leaves no scan"):
        training_names(two_mm, held_back="case")
    with pytest.raises(ValueError, match="no regular expression"):
        training_names(two_mm, held_back="(")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"crop_size": (8, 40, 18)}, "at least 16, 16, 4"),
        ({"scale": (1.2, 0.8)}, "two positive numbers that rise"),
        ({"jitter": 0.5}, "out of range"),
        ({"names": ["nobody"]}, "unknown ones"),
    ],
)
def test_views_refuse_settings_that_cannot_be(two_mm, settings, message):
    with pytest.raises(ValueError, match=message):
        ViewPairs(two_mm, **settings)


def test_views_and_places_refuse_a_store_that_does_not_fit(store, two_mm, tmp_path):
    with pytest.raises(ValueError, match="SAM sees 2 mm"):
        ViewPairs(store)
    with pytest.raises(ValueError, match="no canonical maps"):
        PhantomPlaces(tmp_path, two_mm)


# -- losses --------------------------------------------------------------------------------------------------


def test_uniform_similarities_cost_log_of_one_plus_the_negatives():
    loss = info_nce(torch.full((3,), 0.3), torch.full((3, 7), 0.3), temperature=0.5)
    torch.testing.assert_close(loss, torch.full((3,), math.log(8)))


def test_info_nce_by_hand_with_a_negative_left_out():
    loss = info_nce(torch.tensor([0.9]), torch.tensor([[0.4, -torch.inf, -0.1]]), temperature=0.5)
    wanted = -math.log(math.exp(1.8) / (math.exp(1.8) + math.exp(0.8) + math.exp(-0.2)))
    torch.testing.assert_close(loss, torch.tensor([wanted]))


def test_excluded_cells_are_never_negatives_even_where_all_others_score_less_than_zero():
    score = torch.tensor([[0.9, -0.5, -0.7, -0.2]])
    excluded = torch.tensor([[True, False, False, False]])
    columns, real = hardest(score, excluded, ranked=4, kept=4)
    assert columns[real].tolist() == [3, 1, 2]
    # a similarity multiplied by zero would come first here
    assert hardest(score, excluded, ranked=1, kept=1)[0].tolist() == [[3]]


def test_negatives_are_spread_over_the_hardest_ranks():
    columns, real = hardest(torch.arange(20.0)[None], torch.zeros(1, 20, dtype=torch.bool), ranked=12, kept=4)
    assert columns.tolist() == [[19, 16, 13, 10]] and real.all()


def one_pair(cells=4, coarse_cells=2):
    """A hand-made batch: cells 10 mm apart on a line, the same in both views; anchor 0 only."""
    line = torch.zeros(1, 2, cells, 3)
    line[..., 0] = 10.0 * torch.arange(cells)
    coarse = torch.zeros(1, 2, coarse_cells, 3)
    coarse[..., 0] = 40.0 * torch.arange(coarse_cells)
    first = torch.tensor([[[[0, 0], [-1, -1]]]]).expand(1, 2, 2, 2)
    return {
        "space": torch.tensor([1]),
        "fine_mm": line,
        "fine_inside": torch.ones(1, 2, cells, dtype=torch.bool),
        "fine_match": first,
        "fine_candidates": torch.arange(2 * cells)[None],
        "coarse_mm": coarse,
        "coarse_inside": torch.ones(1, 2, coarse_cells, dtype=torch.bool),
        "coarse_match": first,
    }


def test_the_losses_of_a_hand_made_pair_of_equal_cells():
    maps = SAMMaps(torch.ones(2, 1, 1, 1, 4), torch.ones(2, 1, 1, 1, 2))
    terms = SAMLoss(exclusion_mm=15.0, ranked=8, negatives=8, memory=3, fine_memory=9, embedding_dim=1)(
        maps, one_pair()
    )
    # fine: cells 0 and 1 of both views are nearer than 15 mm, 4 of 8 are left; coarse: the other cell of both views
    torch.testing.assert_close(terms["fine"], torch.tensor(math.log(5)))
    torch.testing.assert_close(terms["coarse"], torch.tensor(math.log(3)))
    torch.testing.assert_close(terms["joint"], terms["fine"])
    torch.testing.assert_close(terms["total"], torch.tensor(2 * math.log(5) + math.log(3)))


def test_embeddings_of_places_that_are_excluded_do_not_reach_the_fine_loss():
    torch.manual_seed(0)
    batch = one_pair()
    fine = torch.nn.functional.normalize(torch.randn(2, 3, 1, 1, 4), dim=1)
    coarse = torch.nn.functional.normalize(torch.randn(2, 3, 1, 1, 2), dim=1)
    loss = SAMLoss(exclusion_mm=15.0, ranked=8, negatives=8, memory=0, fine_memory=0, embedding_dim=3)
    fine.requires_grad_()
    loss(SAMMaps(fine, coarse), batch)["fine"].backward()
    assert (fine.grad[..., 1] == 0).all()  # 10 mm from the anchor, and not its counterpart
    assert (fine.grad[..., 2] != 0).any() and (fine.grad[..., 0] != 0).any()


def test_other_volumes_are_coarse_negatives_and_the_memory_keeps_them():
    one = one_pair()
    two = {k: torch.cat([v, v]) for k, v in one.items()}
    two["space"] = torch.tensor([1, 2])
    maps = SAMMaps(torch.ones(4, 1, 1, 1, 4), torch.ones(4, 1, 1, 1, 2))
    loss = SAMLoss(exclusion_mm=15.0, ranked=8, negatives=8, memory=8, embedding_dim=1)
    torch.testing.assert_close(loss(maps, two)["coarse"], torch.tensor(math.log(1 + 2 + 4)))
    # next time the memory holds 4 cells of each space; of its own space 2 are at the anchor's place
    torch.testing.assert_close(loss(maps, two)["coarse"], torch.tensor(math.log(1 + 2 + 4 + 4 + 2)))
    two["space"] = torch.tensor([1, 1])
    loss = SAMLoss(exclusion_mm=15.0, ranked=8, negatives=8, memory=0, fine_memory=0, embedding_dim=1)
    torch.testing.assert_close(loss(maps, two)["coarse"], torch.tensor(math.log(1 + 4)))


def test_fine_cells_of_earlier_batches_are_negatives_but_for_those_at_the_anchors_place():
    maps = SAMMaps(torch.ones(2, 1, 1, 1, 4), torch.ones(2, 1, 1, 1, 2))
    settings = {"exclusion_mm": 15.0, "ranked": 99, "negatives": 99, "memory": 0, "embedding_dim": 1}
    same, other = SAMLoss(**settings, remembered=8), SAMLoss(**settings, remembered=3)
    torch.testing.assert_close(same(maps, one_pair())["fine"], torch.tensor(math.log(1 + 4)))
    torch.testing.assert_close(same(maps, one_pair())["fine"], torch.tensor(math.log(1 + 4 + 4)))
    other(maps, one_pair())
    elsewhere = one_pair() | {"space": torch.tensor([2])}
    torch.testing.assert_close(other(maps, elsewhere)["joint"], torch.tensor(math.log(1 + 4 + 3)))


def test_the_joint_term_by_hand():
    # one cell per view but for a second, far cell of view 1; fine and coarse similarity 1 and 0, their mean 0.5
    batch = one_pair(cells=2, coarse_cells=1)
    batch["fine_mm"][..., 1, 0] = 90.0
    batch["fine_inside"][0, 1, 1] = False
    batch["fine_candidates"] = torch.tensor([[0, 1, 2]])
    batch["fine_match"] = torch.tensor([[[[0, 0]], [[-1, -1]]]])
    batch["coarse_match"] = torch.full((1, 2, 1, 2), -1)
    fine = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]]).view(2, 2, 1, 1, 2)
    coarse = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(2, 2, 1, 1, 1)
    loss = SAMLoss(temperature=0.5, ranked=9, negatives=9, memory=0, fine_memory=0, embedding_dim=2)
    terms = loss(SAMMaps(fine, coarse), batch)
    torch.testing.assert_close(terms["fine"], torch.tensor(math.log(1 + math.exp((0 - 1) / 0.5))))
    torch.testing.assert_close(terms["joint"], torch.tensor(math.log(1 + math.exp((0.5 - 1) / 0.5))))
    assert terms["error_mm"] == 0 and terms["coarse"] == 0


def test_a_memory_keeps_the_newest():
    memory = Memory(3, 1)
    for value in (1.0, 2.0):
        memory.put(torch.full((2, 1), value), torch.zeros(2, 3), torch.tensor([int(value)] * 2))
    assert memory.vectors.flatten().tolist() == [2, 2, 1] and memory.spaces.tolist() == [2, 2, 1]


def test_a_batch_without_matches_costs_nothing_and_still_has_gradients():
    batch = one_pair()
    batch["fine_match"] = batch["coarse_match"] = torch.full((1, 2, 2, 2), -1)
    fine, coarse = (
        torch.ones(2, 1, 1, 1, 4, requires_grad=True),
        torch.ones(2, 1, 1, 1, 2, requires_grad=True),
    )
    terms = SAMLoss(memory=0, fine_memory=0, embedding_dim=1)(SAMMaps(fine, coarse), batch)
    terms["total"].backward()
    assert terms["total"] == 0 and fine.grad is not None and coarse.grad is not None


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"negatives": 0}, {"memory": -1}])
def test_losses_refuse_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SAMLoss(**settings)


# -- training ------------------------------------------------------------------------------------------------


def tiny_trainer(store, run_dir, steps=4, freeze_norm_from=None, **settings):
    torch.manual_seed(0)
    network = SAM(4, 8)
    method = SamTraining(
        network, SAMLoss(ranked=300, negatives=50, memory=64, embedding_dim=8), freeze_norm_from
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    loader = sample_loader(ViewPairs(store, **SMALL), 2, steps)
    return PretrainTrainer("cpu", method, optimizer, loader, Schedule(steps, 2e-3), run_dir, **settings)


def test_a_gradient_reaches_every_weight(two_mm, tmp_path):
    trainer = tiny_trainer(two_mm, tmp_path)
    batch = default_collate([trainer.draws[i] for i in range(2)])
    _, terms = trainer.forward(batch, 0)
    assert set(terms) == {"total", *SamTraining.terms, *SamTraining.meters}
    terms["total"].backward()
    for name, weight in trainer.online.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_training_on_one_pair_brings_its_cells_together(two_mm):
    torch.manual_seed(0)
    network, loss = SAM(8, 16), SAMLoss(ranked=300, negatives=50, memory=0, embedding_dim=16)
    pairs = ViewPairs(two_mm, **SMALL, contrast=0.3, noise=5, seed=3)
    batch = default_collate([pairs[0], pairs[2]])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        terms = loss(network(batch["crop"].flatten(0, 1)), batch)
        terms["total"].backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in terms.items()})
    assert history[-1]["total"] < 0.7 * history[0]["total"]
    assert history[-1]["error_mm"] < 0.6 * history[0]["error_mm"]


def test_batch_norm_keeps_its_statistics_from_the_step_asked_for(two_mm, tmp_path):
    trainer = tiny_trainer(two_mm, tmp_path, steps=3, freeze_norm_from=2)
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append(e.online.stem.norm.running_mean.clone())
    )
    trainer.run()
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert set(trainer.state.output[0]) == {
        "loss",
        "total",
        "fine",
        "coarse",
        "joint",
        "error_mm",
        "grad_norm",
    }
    logged = from_engine(["loss"], first=True)(
        trainer.state.output
    )  # what --tracking mlflow logs at each step
    assert logged == trainer.state.output[0]["loss"]


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(two_mm, tmp_path):
    whole = tiny_trainer(two_mm, tmp_path, checkpoint_every=2, keep_checkpoints=9)
    whole.run()
    (tmp_path / "checkpoints" / "iteration_00000004.pt").unlink()
    resumed = tiny_trainer(two_mm, tmp_path)
    with torch.no_grad():
        for weight in resumed.online.parameters():
            weight.add_(1.0)  # so that what is equal at the end came from the file
    resumed.run()
    assert resumed.state.iteration == 4
    for part in ("online", "loss"):
        one, other = (getattr(t, part).state_dict() for t in (whole, resumed))
        for name, value in one.items():
            assert torch.equal(value, other[name]), (part, name)


def test_a_warm_up_from_zero_is_monais():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=3e-4)
    theirs, ours = WarmupCosineSchedule(optimizer, 5, 12), Schedule(12, 3e-4, 5, from_zero=True)
    for step in range(12):
        assert ours.rate(step) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        theirs.step()


# -- weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    network = SAM(3, 5)
    network.stem.norm.running_mean.normal_()
    return network, tmp_path / "m.safetensors", save_sam(tmp_path / "m.safetensors", network, {"steps": 7})


def test_saved_weights_load_again_to_half_precision(saved):
    network, path, metadata = saved
    again = load_sam_weights(path)
    assert again.settings == {"width": 3, "embedding_dim": 5} and not again.training
    assert metadata == read_sam_metadata(path) and metadata["steps"] == 7
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-3, msg=name)
    exact = save_sam(path, network, {}, dtype=torch.float32)
    assert exact["sha256"] != metadata["sha256"]
    volume = hu_to_units(torch.randn(1, 1, 9, 21, 25) * 300)
    torch.testing.assert_close(load_sam_weights(path)(volume), network.eval()(volume), atol=0, rtol=0)


def test_a_note_leaves_the_tensors_as_they_are(saved):
    _, path, metadata = saved
    before = load_sam_weights(path).state_dict()
    noted = note_in_weights(path, {"threshold": 0.55})
    assert noted == read_sam_metadata(path) == {**metadata, "threshold": 0.55}
    for name, value in load_sam_weights(path).state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="sha256"):
        note_in_weights(path, {"sha256": "0" * 64})


def rewritten(path, change):
    metadata, state = read_sam_metadata(path), load_file(path)
    change(metadata, state)
    save_file(state, path, metadata={"sam": json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, s: s.pop("stem.conv.weight"), "stem.conv.weight: missing"),
        (lambda m, s: s.update(more=torch.ones(1)), "more: not one of SAM's"),
        (lambda m, s: m.update(width=4), r"stem.norm.weight: \(3,\), expected \(4,\)"),
        (lambda m, s: s["stem.norm.weight"].add_(1), "its tensors were altered"),
        (lambda m, s: m.update(format="other"), "not SAM's weights as save_sam writes them"),
        (lambda m, s: m.update(spacing_mm=1.0), "spacing_mm = 1.0; this version embeds 2.0"),
        (lambda m, s: m.update(width="x"), "width = 'x'"),
        (lambda m, s: m.pop("sha256"), "no sha256"),
    ],
)
def test_weights_that_are_not_whole_are_refused(saved, change, message):
    with pytest.raises(ValueError, match=message):
        load_sam_weights(rewritten(saved[1], change))


def test_files_of_another_kind_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_sam_weights(tmp_path / "nowhere.safetensors")
    (tmp_path / "SAM.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="official.load_sam"):
        load_sam_weights(tmp_path / "SAM.pth")
    saved[1].write_bytes(saved[1].read_bytes()[:500])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_sam_weights(saved[1])
    with pytest.raises(ValueError, match="save_sam writes SAM"):
        save_sam(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match=r"write to \.safetensors"):
        save_sam(tmp_path / "x.pt", SAM(2, 2), {})
    broken = SAM(2, 2)
    broken.stem.conv.weight.data.fill_(1e6)  # too large for float16
    with pytest.raises(ValueError, match="not finite"):
        save_sam(tmp_path / "x.safetensors", broken, {})


def test_a_run_may_start_from_weights_of_the_same_network(saved):
    network, path, _ = saved
    again = start_from(SAM(3, 5), path)
    torch.testing.assert_close(
        again.stem.norm.running_mean, network.stem.norm.running_mean, atol=1e-3, rtol=1e-3
    )
    assert start_from(again, None) is again
    with pytest.raises(ValueError, match="the config asks for"):
        start_from(SAM(4, 5), path)


def test_the_shipped_weights_load_and_are_compact():
    path = BUNDLE / "models" / "model.safetensors"
    model = load_sam_weights(path)
    assert path.stat().st_size <= 25 * 2**20 and sum(p.numel() for p in model.parameters()) <= 6_000_000
    held_back = read_sam_metadata(path)["held_back"]
    assert "validation_" in held_back and "chest_portal" in held_back


# -- the bundle ----------------------------------------------------------------------------------------------


def bundle_run(folder, *files, **settings):
    words = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str([str(CONFIGS / f) for f in files]),
    ]
    words += [f"--{k}={v}" for k, v in settings.items()]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.slow
def test_the_yaml_runs_saves_and_goes_on(two_mm, tmp_path):
    tiny = {
        "width": 4, "embedding_dim": 8, "crop_size": "[32,32,12]", "candidates": 300, "ranked": 100, "negatives": 20, "fine_memory": 99, "checkpoint_every": 2,
        "dataset_dir": tmp_path / "gone", "store_dir": two_mm.path, "output_dir": tmp_path / "run",
    }  # fmt: skip
    done = bundle_run(tmp_path, "train.yaml", "smoke.yaml", iterations=3, **tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_sam_weights(tmp_path / "run" / "model.safetensors").settings == {
        "width": 4,
        "embedding_dim": 8,
    }
    assert read_sam_metadata(tmp_path / "run" / "model.safetensors")["steps"] == 3
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "iteration_00000003.pt"
    done = bundle_run(tmp_path, "train.yaml", "smoke.yaml", iterations=5, **tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_folder_is_embedded_and_aligners_are_compared_from_their_yaml(scans, tmp_path):
    torch.manual_seed(0)
    save_sam(tmp_path / "w.safetensors", SAM(4, 8).eval(), {"threshold": 0.5})
    shared = {"dataset_dir": scans, "weights": tmp_path / "w.safetensors", "bundle_root": CONFIGS.parent}
    done = bundle_run(tmp_path, "inference.yaml", output_dir=tmp_path / "embedded", **shared)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(EmbeddingFolder(tmp_path / "embedded").names) == 6
    assert EmbeddingFolder(tmp_path / "embedded").threshold == 0.5
    assert re.search(
        r"case0\.sam: .* MiB, cosine to float32 (0\.99|1\.0)\d+ on average", done.stderr + done.stdout
    )
    few = {"pairs": 1, "points": 2, "pictures": 1, "warps": 1, "workers": 0, "spacing": "[4.0,4.0,4.0]"}
    done = bundle_run(tmp_path, "evaluate.yaml", output_dir=tmp_path / "report", **shared, **few)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "report" / "table.csv").read_text()
    for aligner in ("sam", "sam_nearest", "coordinate", "random"):
        assert f"\n{aligner},accepted,mean" in table and f'\n{aligner},"known warp, error, mm",P90' in table
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_run_asked_to_leave_keeps_its_step_and_no_finished_weights_and_refuses_other_settings(
    two_mm, tmp_path
):
    tiny = {
        "width": 4, "embedding_dim": 8, "crop_size": "[32,32,12]", "candidates": 300, "ranked": 100, "negatives": 20, "fine_memory": 99,
        "checkpoint_every": 10_000, "store_dir": two_mm.path, "output_dir": tmp_path / "run", "dataset_dir": tmp_path / "gone",
    }  # fmt: skip
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str([str(CONFIGS / f) for f in ("train.yaml", "smoke.yaml")])]  # fmt: skip
    words += [f"--{k}={v}" for k, v in (tiny | {"iterations": 100_000, "log_every": 1}).items()]
    running = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log, checkpoints = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "checkpoints"
    while not (log.is_file() and log.read_text().count("\n") > 1):
        assert running.poll() is None, running.communicate()[0][-3000:]
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    said = running.communicate()[0]
    assert running.returncode == 0, said[-3000:]
    left_at = max(json.loads(line)["step"] for line in log.read_text().splitlines())
    assert f"Left at step {left_at} of 100000; the same command goes on." in said
    assert latest_checkpoint(checkpoints).name == f"iteration_{left_at:08d}.pt"
    assert not (tmp_path / "run" / "model.safetensors").exists()

    other = bundle_run(tmp_path, "train.yaml", "smoke.yaml", iterations=left_at + 1, **tiny, temperature=0.2)
    assert other.returncode != 0
    assert "loss::temperature was 0.1, now 0.2. Set it back, or choose another output_dir" in other.stderr
    done = bundle_run(tmp_path, "train.yaml", "smoke.yaml", iterations=left_at + 1, **tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_sam_metadata(tmp_path / "run" / "model.safetensors")["steps"] == left_at + 1


def test_statistics_that_an_untrained_network_has_not_are_not_kept():
    with pytest.raises(ValueError, match="give init_weights"):
        start_from(SAM(3, 5), None, needed=True)


def test_every_override_names_a_key_of_train_yaml():
    complete = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    for name in ("smoke.yaml", "compact.yaml", "whole_body.yaml", "multi_gpu.yaml"):
        check_keys(complete, ConfigParser.load_config_file(CONFIGS / name), name)


def test_the_bundle_has_the_zoos_files():
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "configs/logging.conf",
        "docs/README.md",
        "docs/data_license.txt",
    ):
        assert (BUNDLE / name).is_file(), name
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize(
    ("fine", "coarse"), [((20, 14, 11), (10, 2, 2)), ((7, 13, 9), (4, 2, 2)), ((3, 5, 4), (2, 1, 1))]
)
def test_chosen_cells_are_those_of_the_whole_interpolated_maps(
    fine: tuple[int, int, int], coarse: tuple[int, int, int]
) -> None:
    maps = SAMMaps(3 * torch.randn(2, 5, *fine), unit_length(torch.randn(2, 5, *coarse)))
    context = F.interpolate(maps.coarse, size=fine, mode="trilinear", align_corners=False)
    whole = torch.cat([cells_of(unit_length(maps.fine)), cells_of(unit_length(context))], dim=2).flatten(0, 1)
    cells = torch.randint(len(whole), (200,))
    torch.testing.assert_close(both_at(maps, cells), whole[cells], atol=1e-5, rtol=0)
