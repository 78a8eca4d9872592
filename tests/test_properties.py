"""Parts and wholes: encoders that know the answer, one that knows nothing, and numbers that stay the same."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_VIT

from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.errors import AliceError
from custom.evaluation.properties import PartsProbe

CROP = (32, 48, 16)


class Cubes:
    """Scans of four patients, each filled with an intensity of its own: a stand-in for a store."""

    def __init__(self, number=8):
        self.names = [f"s{i}" for i in range(number)]

    def patient(self, name):
        return f"p{int(name[1:]) % 4}"

    def body_voxels(self, name):
        return np.argwhere(np.ones((8, 8, 8))) + 28

    def read_crop(self, name, start, size, fill=0):
        return np.full(size, 10 * (int(name[1:]) + 1), np.int16)  # another intensity for every scan


def probe(volumes, batch=8, **options):
    return PartsProbe(volumes, volumes.names, CROP, (0, 100), **({"boxes": batch} | options), batch=batch)


def classes(crops):
    """Frequencies of ten intensities but air, as one token: (B, 1, 10)."""
    found = (crops[:, 0, ..., None] - torch.arange(0.1, 1.01, 0.1)).abs() < 0.01
    return found.float().mean(dim=(1, 2, 3))[:, None]


def test_an_encoder_that_counts_classes_knows_all_parts():
    found = probe(Cubes(), boxes=16).measure(classes)
    assert found["composition"].value == pytest.approx(1) and found["mismatched"].value == pytest.approx(0)
    assert found["decomposition"].value == found["retrieval"].value == 1
    assert found["chance"].value == 1 / 8 and found["composition"].low == pytest.approx(1)


def test_an_encoder_that_knows_nothing_is_at_chance():
    found = probe(Cubes()).measure(lambda crops: torch.ones(len(crops), 2, 3))
    assert found["decomposition"].value == found["retrieval"].value == 1 / 8
    assert found["composition"].value == pytest.approx(1)  # why the mismatched score stands beside it
    assert found["mismatched"].value == pytest.approx(1)


def test_octants_and_boxes_are_those_of_the_crop(store):
    probed = PartsProbe(store, store.names, CROP, (-175, 250), boxes=4, batch=4)
    shown = probed.cut(range(4))
    assert shown.parts.shape == (4, 8, 1, *CROP) and shown.box.shape == shown.whole.shape == (4, 1, *CROP)
    assert set(shown.patients) == {store.patient(name) for name in store.names[:4]}
    for i in range(4):
        for axis in range(3):  # enlarged twofold, so that the mean of an octant stays
            order = (
                shown.parts[i]
                .mean(dim=(1, 2, 3, 4))
                .view(2, 2, 2)
                .mean(dim=[a for a in range(3) if a != axis])
            )
            halves = torch.stack([h.mean() for h in shown.whole[i, 0].chunk(2, dim=axis)])
            torch.testing.assert_close(order, halves)
        gone = shown.whole[i] != shown.without[i]
        assert not shown.without[i][gone].any() and gone.any() and not gone.all()


def test_two_calls_give_the_same_numbers_and_the_encoder_its_mode_back(store):
    torch.manual_seed(0)
    encoder = token_encoder(MaskedViT(**TINY_VIT, dropout_rate=0.5)).train()
    probed = PartsProbe(store, store.names, CROP, (-175, 250), boxes=8, batch=4)
    first, second = probed.measure(encoder), probed.measure(encoder)
    assert first == second and encoder.training
    assert not any(math.isnan(first[key].value) for key in first)
    assert first["mismatched"].value < first["composition"].value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boxes": 9}, "boxes must be a multiple of batch"),
        ({"boxes": 1, "batch": 1}, "batch 2 or more; got 1 and 1"),
        ({"crop_size": (33, 32, 16)}, "crop_size must be even"),
        ({"names": ["s0", "s4"]}, "need scans of two patients"),
        ({"names": []}, "No scan: parts and wholes need"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    volumes = Cubes()
    made = {"names": volumes.names, "crop_size": CROP, "boxes": 8, "batch": 8} | options
    with pytest.raises(AliceError, match=message):
        PartsProbe(volumes, window_hu=(0, 100), **made)
