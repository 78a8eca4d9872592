"""Sliding windows of the bundles: their overlap and blend, as the published recipes have them."""

import pytest
from conftest import REPO
from monai.bundle import ConfigParser

GAUSSIAN_HALF = {
    "alice_seg_flare": ("inference.yaml", "train.yaml"),
    "alice_seg_btcv": ("inference.yaml", "train.yaml"),
}


@pytest.mark.parametrize("bundle, file", [(b, f) for b, files in GAUSSIAN_HALF.items() for f in files])
def test_windows_overlap_by_half_and_count_less_towards_their_edge(bundle, file):
    """A network sees little context at a window's edge: equal weights leave seams, less overlap leaves gaps."""
    parser = ConfigParser()
    parser.read_config(str(REPO / "bundles" / bundle / "configs" / file))
    inferer = parser.get_parsed_content("inferer" if file == "inference.yaml" else "validate::inferer")
    assert str(inferer.mode) == "gaussian"
    assert inferer.overlap == 0.5
