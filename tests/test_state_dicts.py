"""Weights as people save them: what a file holds is told as it is, with the command that makes it fit."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from monai.networks.nets import UNETR
from safetensors.torch import save_file
from seg_bundles import BUNDLES, TINY, parser_of

from custom.bundles.network import load_whole
from custom.transfer.encoder_weights import WeightsError, load_encoder


@pytest.mark.parametrize("file", ["pickled.py", "published.py", "state_dicts.py"])
@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_carry_the_same_rule(name, file):
    copy = REPO / "bundles" / name / f"scripts_{name}" / file
    assert copy.read_bytes() == (REPO / "custom" / "transfer" / file).read_bytes()


def before(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state):
    return {name.replace("vit.", "net.", 1): tensor for name, tensor in state.items()}


WRAPPED = {
    "DataParallel": (lambda s: before("module.", s), "every name starts with module., as DataParallel saves them"),
    "torch.compile": (lambda s: before("_orig_mod.", s), "every name starts with _orig_mod., as torch.compile saves them"),
    "both": (lambda s: before("module._orig_mod.", s), "every name starts with module._orig_mod."),
    "Lightning": (lambda s: {"epoch": 3, "state_dict": before("net.", s)},
                  "lie under 'state_dict', and every name starts with net."),
    "net": (lambda s: {"net": s, "optimizer": {"lr": 1.0}}, "lie under 'net'"),
    "network_weights": (lambda s: {"network_weights": before("module.", s)}, "lie under 'network_weights', and every name"),
    "student": (lambda s: {"teacher": renamed(s), "student": before("backbone.", s)}, "lie under 'student', and every name"),
    "nested": (lambda s: {"checkpoint": {"model": s}}, "lie under 'checkpoint' / 'model'"),
    "model, parallel": (lambda s: {"model": before("module.", s)}, "lie under 'model', and every name starts with module."),
    "with a head": (lambda s: before("net.", s) | {"head.weight": torch.rand(3)}, "with net. before their names"),
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return parser_of("inference", **TINY).get_parsed_content("network_def")


def follow(told, folder):
    """Run the command that a message gives."""
    command = re.search(r"python -c \"[^\"]*\"", told)[0]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, cwd=folder)


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_refused_with_the_command_that_makes_them_fit(tmp_path, network, kind):
    wrap, told = WRAPPED[kind]
    path = str(tmp_path / "m.pt")
    state = network.state_dict()
    torch.save(wrap(state), path)
    weights = parser_of("inference").get_parsed_content("scripts").weights
    (problem,) = weights.checkpoint_problems(network, path)
    assert (
        f"{path} does not fit the network: " in problem
        and told in problem
        and "Then it fits: python -c" in problem
    )
    with pytest.raises(WeightsError) as refused:
        load_whole(network, path)
    assert told in str(refused.value)
    follow(problem, tmp_path)
    assert weights.checkpoint_problems(network, str(tmp_path / "m_plain.pt")) == []
    made = load_whole(network, tmp_path / "m_plain.pt")
    assert made.keys() == state.keys() and all(torch.equal(made[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "kind", ["DataParallel", "torch.compile", "Lightning", "nested", "with a head", "whole network"]
)
def test_an_encoder_is_read_from_other_files(tmp_path, network, kind):
    wrap = (
        WRAPPED[kind][0] if kind in WRAPPED else lambda s: before("vit.", s) | {"out.weight": torch.rand(2)}
    )
    path, state = str(tmp_path / "e.pt"), network.vit.state_dict()
    torch.save(wrap(state), path)
    weights = parser_of("train").get_parsed_content("scripts").weights
    assert weights.encoder_problems(network.vit, path, TINY["roi_size"]) == []
    for fill in (lambda net: weights.with_encoder(net, net.vit, path), lambda net: load_encoder(net, path)):
        other = parser_of("inference", **TINY).get_parsed_content("network_def")
        fill(other)
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.vit.state_dict().items())


def test_safetensors_have_a_command_of_their_own(tmp_path, network):
    save_file(before("module.", network.state_dict()), tmp_path / "m.safetensors")
    weights = parser_of("inference").get_parsed_content("scripts").weights
    (problem,) = weights.checkpoint_problems(network, str(tmp_path / "m.safetensors"))
    follow(problem, tmp_path)
    assert weights.checkpoint_problems(network, str(tmp_path / "m_plain.pt")) == []


@pytest.mark.parametrize("content, told", [
    ({"epoch": 1, "args": "x"}, "it holds no state dict, but epoch, args"),
    ([1, 2], "it holds no state dict, but a list"),
    ({}, "it is empty"),
    ({"model": {"a": torch.zeros(1)}}, "is missing, not"),  # another network: names, not a wrapper
    ("encoder", "it holds vit alone, "),
    ("pickled", "it holds more than tensors"),
])  # fmt: skip
def test_what_fits_nowhere_is_told_as_it_is(tmp_path, network, content, told):
    if content == "encoder":
        content = network.vit.state_dict()
    elif content == "pickled":
        content = {"net": UNETR}
    torch.save(content, tmp_path / "m.pt")
    weights = parser_of("inference").get_parsed_content("scripts").weights
    (problem,) = weights.checkpoint_problems(network, str(tmp_path / "m.pt"))
    assert told in problem and "Then it fits" not in problem
