"""Every command of the documentation exists, with its options; test_commands_run.py runs them."""

import pytest
from conftest import REPO
from documented import (
    PAGES,
    Command,
    Wrong,
    all_commands,
    check,
    commands_of,
    fences,
    option_exists,
    options_of,
)

from custom.errors import AliceError

COMMANDS = all_commands()


def test_every_block_says_its_language():
    for page in PAGES:
        for line, language, _ in fences(page.read_text(encoding="utf-8")):
            assert language, f"{page}:{line}: write ```bash for commands, ```text for what is none"


def test_the_commands_are_found():
    assert len(COMMANDS) > 80
    assert {c.words[0] for c in COMMANDS} >= {"alice", "make", "pip", "python", "torchrun"}
    assert {c.page for c in COMMANDS} >= {
        "README.md",
        "docs/releases.md",
        "bundles/sam_landmarks/docs/README.md",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_exists_with_its_options(command):
    check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_an_option_in_a_sentence_exists(page):
    unknown = [name for name in options_of(page.read_text(encoding="utf-8")) if not option_exists(name)]
    assert not unknown
    assert not option_exists("predictor") and not option_exists("method::loss::wieght_dv")


@pytest.mark.parametrize(
    "line, message",
    [
        ("alise build ct.json", "no program"), ("alice bild ct.json -o store", "no such command"),
        ("alice build ct.json -o store --worker 8", "no option --worker"), ("alice build ct.json --workers many", "a whole number"),
        ("alice embed STORE", "cannot read these arguments"), ("make quikstart", "the Makefile has no quikstart"),
        ("make package RELEASE=x", "has no RELEASE"), ("pip install -e '.[gpu]'", "no extra gpu"),
        ("python -m monai.bundle runn --config_file configs/train.yaml", "no such command"),
        ("python -m monai.bundle run --config_file configs/tain.yaml", "there is no configs/tain.yaml"),
        ("python -m monai.bundle run --config_file configs/train.yaml --amp maybe", "amp = 'maybe'"),
        ("torchrun --nproc_per_node=2 -m monai.bundle run --config_file configs/train.yaml --predictor false", "'predictor' is no setting"),
        ("python benchmarks/none.py", "there is no benchmarks/none.py"), ("alice export RUN --to", "takes text, and nothing follows"),
        ("alice estimate configs/train.yaml --dataset_dr DIR", "'dataset_dr' is no setting"),
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_found(line, message):
    page = "bundles/alice_pretrain/docs/README.md"
    (command,) = commands_of(page, f"```bash\n{line}\n```\n")
    with pytest.raises((Wrong, AliceError), match=message):
        check(command)


def test_lines_variables_and_comments_are_read_as_a_shell_does():
    text = "Say `make docs`.\n\n```bash\nB=a/b  # here\nX=1 alice scan '$B c' \\\n  -o o && make fast\n```\n"
    assert commands_of("README.md", text) == [
        Command("README.md", 3, ("alice", "scan", "a/b c", "-o", "o")),
        Command("README.md", 3, ("make", "fast")),
        Command("README.md", 1, ("make", "docs"), whole=False),
    ]
