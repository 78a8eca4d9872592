import numpy as np
import pytest
import torch

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.evaluation.place_error import aligner_error, anatomical_points, place_error
from custom.evaluation.probe import (
    EncoderProbe,
    TokenTable,
    encoder_probe,
    linear_probe,
    region_points,
    region_retrieval,
)
from custom.landmarks.aligners.simple import CoordinateAligner, RandomAligner

CROP, WINDOW = (16, 16, 16), (-175.0, 250.0)


def test_regions_lie_at_the_same_anatomy_around_common_labels(store):
    points, by = region_points(store, store.names)
    assert by == "labels" and all(p.shape == (12, 3) for p in points.values())
    lattice = points[store.names[0]] - points[store.names[0]].mean(0)
    for p in points.values():
        np.testing.assert_allclose(p - p.mean(0), lattice, atol=1e-9)


def test_an_encoder_that_knows_the_place_finds_every_region_and_a_blind_one_is_at_chance(store):
    points, _ = region_points(store, store.names)
    order = iter(np.tile(np.arange(12), len(points)))

    def oracle(crops):
        return torch.stack([torch.eye(12)[next(order)] for _ in crops])[:, None]

    assert region_retrieval(oracle, store, points, CROP, WINDOW).accuracy == 1.0
    torch.manual_seed(0)
    blind = region_retrieval(lambda crops: torch.randn(len(crops), 1, 8), store, points, CROP, WINDOW)
    assert blind.chance == pytest.approx(1 / 12) and abs(blind.accuracy - 1 / 12) < 0.08


def test_retrieval_is_blind_to_an_offset_common_to_all_features(store):
    points, _ = region_points(store, store.names)

    def features(crops, offset=0.0):
        return (
            crops.flatten(2).mean(-1, keepdim=True) @ torch.ones(1, 4) * torch.tensor([1.0, -1, 2, 0])
            + offset
        )

    plain = region_retrieval(features, store, points, CROP, WINDOW).accuracy
    assert region_retrieval(
        lambda c: features(c, 1000.0), store, points, CROP, WINDOW
    ).accuracy == pytest.approx(plain, abs=0.05)


def test_a_linear_probe_reads_what_is_linear_and_nothing_from_noise():
    rng = np.random.default_rng(0)
    shares = np.zeros((600, 256), np.float32)
    shares[:, 3], shares[:, 5] = rng.uniform(size=600), rng.uniform(size=600)
    tokens = shares[:, [3, 5]] @ rng.normal(size=(2, 8)) + rng.normal(size=(600, 8)) * 0.01
    owners = np.repeat([f"p{i}" for i in range(6)], 100)

    def tables(features):
        return (
            TokenTable(features[:400], shares[:400], owners[:400]),
            TokenTable(features[400:], shares[400:], owners[400:]),
        )

    fit, test = tables(tokens)
    assert linear_probe(fit, test, [3, 5]).correlation > 0.98
    assert abs(linear_probe(*tables(rng.normal(size=(600, 8))), [3, 5]).correlation) < 0.2
    with pytest.raises(ValueError, match="None of the labels"):
        linear_probe(fit, test, [9])


def test_the_probe_gives_both_numbers_and_repeats_itself(store):
    torch.manual_seed(0)
    encoder = token_encoder(
        MaskedViT(1, (32, 32, 32), 16, hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4)
    ).eval()
    probe = encoder_probe(store, store.names[:4], crop_size=(32, 32, 32), window_hu=WINDOW, crops_per_scan=2)
    first, second = probe(encoder), probe(encoder)
    assert first == second
    assert {"retrieval", "chance", "linear", "place_mm", "place_chance_mm", "place_least_mm"} == set(first)
    assert first["place_least_mm"] <= first["place_mm"] and first["place_least_mm"] < first["place_chance_mm"]
    told = EncoderProbe(store, store.names, (32, 32, 32), WINDOW, crops_per_scan=2).measure(encoder)
    for key in ("retrieval", "place_mm", "linear"):
        assert told[key].low <= told[key].value <= told[key].high, key
    raw = EncoderProbe(store, store.names, (32, 32, 32), WINDOW, crops_per_scan=2).raw((16, 16, 16))
    assert set(raw) == set(told) and raw["place_least_mm"] == told["place_least_mm"]


def test_an_interval_of_correlations_is_that_of_patients_drawn_anew():
    rng = np.random.default_rng(1)
    shares = np.zeros((800, 256), np.float32)
    shares[:, 3] = rng.uniform(size=800)
    owners = np.repeat([f"p{i}" for i in range(8)], 100)
    noise = np.where(np.isin(owners, ["p4", "p5"]), 0.05, 0.6)[
        :, None
    ]  # some patients are read well, others not
    features = shares[:, [3]] + noise * rng.normal(size=(800, 1))
    fit = TokenTable(shares[:400, [3]], shares[:400], owners[:400])
    test = TokenTable(features[400:], shares[400:], owners[400:])
    found = linear_probe(fit, test, [3], draws=500)
    assert min(found.resampled) < 0.5 < found.correlation < 0.9 < max(found.resampled)
    # the draw that takes every patient once is the value itself
    ones = [r for r in found.resampled if abs(r - found.correlation) < 1e-6]
    assert ones


def test_place_errors_of_an_oracle_of_chance_and_of_positions(store):
    points = anatomical_points(store, store.names)
    assert set(points) == set(store.names) and len({p.shape for p in points.values()}) == 1
    crop, patch = (32, 32, 16), (8, 8, 8)
    starts = []

    def read(name, start):
        starts.append((name, start))
        return torch.zeros(1, *crop)

    def world(crops):  # each token's own place, relative to its scan's first point
        rows = []
        for name, start in starts[-len(crops) :]:
            cells = np.stack(
                np.meshgrid(*[np.arange(c // p) for c, p in zip(crop, patch, strict=True)], indexing="ij"), -1
            )
            voxels = start + (cells.reshape(-1, 3) + 0.5) * np.array(patch) - 0.5
            place = voxels * store.spacing + store.affine(name)[:3, 3] - points[name][0]
            near = np.exp(-((place[:, None] - LATTICE[None]) ** 2).sum(-1) / (2 * 15.0**2))
            rows.append(torch.from_numpy(near).float())
        return torch.stack(rows)

    oracle = place_error(world, store, points, crop, patch, read)
    torch.manual_seed(0)
    count = (crop[0] // 8) * (crop[1] // 8) * (crop[2] // 8)
    blind = place_error(lambda c: torch.randn(len(c), count, 16), store, points, crop, patch, read)
    position = torch.randn(1, count, 16)
    index = place_error(lambda c: position.expand(len(c), -1, -1), store, points, crop, patch, read)
    assert oracle.mm < 0.5 * oracle.chance_mm and oracle.least_mm <= oracle.mm
    assert blind.mm == pytest.approx(blind.chance_mm, rel=0.15)
    assert (
        index.mm > 0.6 * index.chance_mm
    )  # the crops' offsets differ, so a position in the crop does not answer
    assert set(oracle.by_patient) == {store.patient(n) for n in store.names}


LATTICE = np.array(
    [[x, y, z] for x in range(-60, 61, 20) for y in range(-60, 61, 20) for z in range(-60, 61, 20)]
)


def test_aligners_are_measured_on_the_same_points(store):
    points = anatomical_points(store, store.names)
    near, far = (aligner_error(kind(store), store, points) for kind in (CoordinateAligner, RandomAligner))
    assert np.mean(list(near.values())) < 0.5 * np.mean(list(far.values()))


def test_one_patient_is_too_few(store):
    assert encoder_probe(store, store.names[:1], crop_size=CROP, window_hu=WINDOW) is None
    assert encoder_probe(store, [], crop_size=CROP, window_hu=WINDOW) is None
    assert isinstance(encoder_probe(store, store.names[:2], crop_size=CROP, window_hu=WINDOW), EncoderProbe)
