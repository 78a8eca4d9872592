import numpy as np
import pytest
import torch

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.evaluation.probe import EncoderProbe, encoder_probe, linear_probe, region_points, region_retrieval

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
    fit, test = (tokens[:400], shares[:400]), (tokens[400:], shares[400:])
    assert linear_probe(fit, test, [3, 5]).correlation > 0.98
    noise = rng.normal(size=(600, 8))
    assert (
        abs(linear_probe((noise[:400], shares[:400]), (noise[400:], shares[400:]), [3, 5]).correlation) < 0.2
    )
    with pytest.raises(ValueError, match="None of the labels"):
        linear_probe(fit, test, [9])


def test_the_probe_gives_both_numbers_and_repeats_itself(store):
    torch.manual_seed(0)
    encoder = token_encoder(
        MaskedViT(1, (32, 32, 32), 16, hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4)
    ).eval()
    probe = encoder_probe(store, store.names[:4], crop_size=(32, 32, 32), window_hu=WINDOW, crops_per_scan=2)
    first, second = probe(encoder), probe(encoder)
    assert first == second and {"retrieval", "chance", "linear"} == set(first)


def test_one_patient_is_too_few(store):
    assert encoder_probe(store, store.names[:1], crop_size=CROP, window_hu=WINDOW) is None
    assert encoder_probe(store, [], crop_size=CROP, window_hu=WINDOW) is None
    assert isinstance(encoder_probe(store, store.names[:2], crop_size=CROP, window_hu=WINDOW), EncoderProbe)
