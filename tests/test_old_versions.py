"""The lowest versions that are claimed: they are pinned for ``make test-oldest``, and shipped weights fill their networks."""

import re

import pytest
import torch
from conftest import REPO
from seg_bundles import BUNDLES, parser_of
from torch import nn

from custom.bundles.network import WeightsError, load_whole


def test_the_oldest_pins_are_the_low_ends_of_the_project():
    project = (
        (REPO / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[0]
    )
    pins = dict(
        re.findall(
            r"^([\w-]+)==([\d.]+)$", (REPO / "constraints-oldest.txt").read_text(encoding="utf-8"), re.M
        )
    )
    lows = dict(re.findall(r'^  "([\w-]+)>=([\d.]+)', project, re.M))
    assert len(lows) > 10 and pins.keys() == lows.keys()
    for name, low in lows.items():
        assert (pins[name] + ".0.0").startswith(low + ".") or pins[name] == low, name


def as_made_by(version, network, used=False):
    """A network of MONAI 1.5 has cross-attention in every block; one of 1.6 has none where it is not used."""
    for block in network.vit.blocks:
        for name in ("cross_attn", "norm_cross_attn"):
            if hasattr(block, name):
                delattr(block, name)
            if version == "1.5":
                setattr(block, name, nn.Linear(3, 3))
        block.with_cross_attention = used
    return network


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("made, filled", [("1.6", "1.5"), ("1.5", "1.6"), ("1.5", "1.5"), ("1.6", "1.6")])
def test_weights_fill_a_network_of_another_version(bundle, made, filled, tmp_path):
    parser = parser_of("inference", bundle=REPO / "bundles" / bundle)
    scripts = parser.get_parsed_content("scripts")
    source = as_made_by(made, parser.get_parsed_content("network_def"))
    for tensor in source.parameters():
        nn.init.normal_(tensor)
    torch.save(source.state_dict(), tmp_path / "net.pt")
    torch.save(source.vit.state_dict(), tmp_path / "encoder.pt")
    network = as_made_by(
        filled, parser_of("inference", bundle=REPO / "bundles" / bundle).get_parsed_content("network_def")
    )
    assert scripts.weights.checkpoint_problems(network, str(tmp_path / "net.pt")) == []
    assert scripts.weights.encoder_problems(network.vit, str(tmp_path / "encoder.pt"), [64, 64, 64]) == []
    shared = {k: v for k, v in source.state_dict().items() if "cross_attn." not in k}
    for fill in (
        lambda: scripts.weights.with_encoder(network, network.vit, str(tmp_path / "encoder.pt")),
        lambda: scripts.weights.LoadWeights(str(tmp_path / "net.pt"), network)(None),
    ):
        fill()
        assert torch.equal(network.vit.norm.weight, source.vit.norm.weight)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in shared.items())
    load_whole(network, tmp_path / "net.pt")


def test_cross_attention_that_is_used_must_be_there_and_so_must_all_else(tmp_path):
    parser = parser_of("inference")
    scripts = parser.get_parsed_content("scripts")
    network = as_made_by("1.5", parser.get_parsed_content("network_def"), used=True)
    state = {k: v for k, v in network.state_dict().items() if "cross_attn." not in k}
    torch.save(state, tmp_path / "net.pt")
    (told,) = scripts.weights.checkpoint_problems(network, str(tmp_path / "net.pt"))
    assert re.search(r"blocks\.0\.cross_attn\.weight is missing.* and 45 more", told)
    with pytest.raises(WeightsError, match="cross_attn"):
        load_whole(network, tmp_path / "net.pt")
    as_made_by("1.5", network)
    state.pop("vit.norm.weight")
    torch.save(state, tmp_path / "net.pt")
    (told,) = scripts.weights.checkpoint_problems(network, str(tmp_path / "net.pt"))
    assert re.search(r"vit\.norm\.weight is missing, not \[\d+\]\.$", told)
    with pytest.raises(WeightsError, match=r"vit\.norm\.weight"):
        load_whole(network, tmp_path / "net.pt")
