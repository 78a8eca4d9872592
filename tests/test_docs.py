"""What the documentation and the citation say of the package is true; ``make docs`` checks links and navigation."""

import importlib
import math
import re

import torch
import yaml
from conftest import REPO

import custom


def test_every_name_on_the_api_page_exists():
    page = (REPO / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.+)\])?", page, re.M)
    assert len(found) == page.count(":::") > 20
    for path, members in found:
        names = members.split(", ") if members else [path.rpartition(".")[2]]
        module = importlib.import_module(path if members else path.rpartition(".")[0])
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"{module.__name__} has no {', '.join(missing)}"


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == custom.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2302.05615"


def test_the_readmes_network_takes_the_encoder_of_train_yaml():
    code = re.search(
        r"```python\n(.*?)load_encoder\(network", (REPO / "README.md").read_text(encoding="utf-8"), re.S
    )
    made = {}
    with torch.device("meta"):
        exec(code.group(1), made)
    config = yaml.safe_load((REPO / "bundles/alice_pretrain/configs/train.yaml").read_text(encoding="utf-8"))
    network = config["network_def"]
    tokens = math.prod(side // network["patch_size"] for side in config["crop_size"])
    encoder = made["network"].vit
    assert encoder.patch_embedding.position_embeddings.shape == (1, tokens, network["hidden_size"])
    assert encoder.blocks[0].mlp.linear1.out_features == network["mlp_dim"]
    assert encoder.blocks[0].attn.num_heads == network["num_heads"]
    assert len(encoder.blocks) == network["num_layers"]
