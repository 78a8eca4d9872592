"""What the documentation and the citation say of the package is true; ``make docs`` checks links and navigation."""

import importlib
import re

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
