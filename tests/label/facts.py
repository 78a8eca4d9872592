"""What is checked again and again: a fact and whether it holds, weights and the network they belong to."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.bundle import ConfigParser


class Facts:
    """What was found to hold, and what not."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, holds: bool, fact: str, found: object = "") -> bool:
        print(
            f"{'  ok  ' if holds else 'FAILED'} {fact}" + ("" if holds else f"; found: {found}"), flush=True
        )
        if not holds:
            self.failed.append(fact)
        return holds


def inference_config(bundle: Path) -> Path:
    """The one that MONAI Label reads: JSON before YAML."""
    return min((bundle / "configs").glob("inference.*"))


def check_weights(facts: Facts, bundle: Path, file: str) -> None:
    """MONAI Label serves random weights without a word to the viewer if names do not fit; so names must fit."""
    parser = ConfigParser()
    parser.read_config(inference_config(bundle))
    parser["bundle_root"] = str(bundle)
    state = torch.load(bundle / "models" / file, map_location="cpu", weights_only=True)
    state = state.get("model", state)
    wanted = parser.get_parsed_content("network_def").state_dict()
    unlike = [
        k
        for k in wanted.keys() | state
        if k not in wanted or k not in state or wanted[k].shape != state[k].shape
    ]
    facts(not unlike, f"{file} fits the network, tensor by tensor", sorted(unlike)[:4])
