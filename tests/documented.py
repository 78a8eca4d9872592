"""The commands that the documentation shows: read from the Markdown, and each compared with the program that it calls."""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.bundle
from conftest import REPO
from fire.parser import DefaultParseValue, SeparateFlagArgs

from custom.bundles.preflight import check_files
from custom.bundles.settings import configs_in, unknown_key
from custom.cli import main as cli
from custom.cli.arguments import check_names

PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    *sorted(REPO.glob("bundles/*/docs/README.md")),
    *sorted(REPO.glob("bundles/*/models/README.md")),
    *sorted(REPO.glob("docs/**/*.md")),
]
# programs of others that do not come with this project
FOREIGN = {"cd", "cp", "sha256sum", "monailabel", ".", ".venv/bin/pre-commit"}
PROGRAMS = {"alice", "make", "pip", "python", "torchrun", *FOREIGN}
_ASSIGNED = re.compile(r"([A-Za-z_]+)=(\S*)$")


class Wrong(AssertionError):
    """A command that cannot work as it is shown."""


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Args:
        page: relative to the repository.
        line: where its block begins.
        words: what a shell makes of it; variables of the block are put in.
        whole: it stands in a block. One inside a sentence may leave arguments out.
    """

    page: str
    line: int
    words: tuple[str, ...]
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words)[:60]}"

    @property
    def folder(self) -> Path:
        """Where it is run: in the bundle for a bundle's page, else in the repository."""
        parts = Path(self.page).parts
        return REPO.joinpath(*parts[:2]) if parts[0] == "bundles" else REPO


def fences(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and content of every fenced block."""
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        yield text.count("\n", 0, found.start()) + 1, found[2], found[3]


def commands_of(page: str, text: str) -> list[Command]:
    """The commands in the shell blocks of a page, and those inside its sentences."""
    made = []
    for line, language, content in fences(text):
        if language == "bash":
            made += [Command(page, line, words) for words in _words_of(content)]
    prose = re.sub(r"^( *)```.*?^\1```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    for found in re.finditer(r"`([^`\n]+)`", prose):
        first = found[1].split()[0] if found[1].split() else ""
        if first in PROGRAMS - FOREIGN and " " in found[1]:
            line = prose.count("\n", 0, found.start()) + 1
            made += [Command(page, line, words, whole=False) for words in _words_of(found[1])]
    return made


def _words_of(content: str) -> Iterator[tuple[str, ...]]:
    variables: dict[str, str] = {}
    for line in content.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
                continue
            while command and (found := _ASSIGNED.match(command[0])):
                variables[found[1]] = found[2]
                command.pop(0)
            if command:
                yield tuple(command)
            command = []


def all_commands() -> list[Command]:
    """Every command of every page."""
    return [
        command
        for page in PAGES
        for command in commands_of(page.relative_to(REPO).as_posix(), page.read_text(encoding="utf-8"))
    ]


def check(command: Command) -> None:
    """Compare a command with the program that it calls, without running it.

    Raises:
        Wrong: if the program, its sub-command, an option, a value's kind or a file of this project does not exist.
        AliceError: what ``alice`` or a bundle's check of its settings says.
    """
    program, *words = command.words
    if program not in PROGRAMS:
        raise Wrong(f"{command}: no program of this project, or of those it names.")
    if program in FOREIGN:
        return
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words)
        program, words = "python", ["-m", parsed.training_script, *parsed.training_script_args]
    {"alice": _check_alice, "make": _check_make, "pip": _check_pip, "python": _check_python}[program](
        command, words
    )


def _check_alice(command: Command, words: list[str]) -> None:
    if not words or words[0] not in cli.COMMANDS:
        raise Wrong(f"{command}: there is no such command of alice.")
    name, *rest = words
    function = cli.command(name)
    parameters = inspect.signature(function).parameters
    check_names(function, name, rest)
    needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    given = len(list(itertools.takewhile(lambda word: not word.startswith("-"), rest)))
    given += sum(word[2:] in needed for word in rest)
    if not command.whole and (given < len(needed) or not rest or rest[-1].startswith("--")):
        return
    calls: list[dict[str, Any]] = []

    @functools.wraps(function)
    def record(*positional: Any, **named: Any) -> None:
        bound = inspect.signature(function).bind(*positional, **named)
        bound.apply_defaults()
        calls.append(bound.arguments)

    try:
        cli._call(record, name, rest)
    except SystemExit as ended:
        raise Wrong(f"{command}: alice cannot read these arguments.") from ended
    if name in ("estimate", "profile") and calls[0]["config"] != "CONFIG":
        files = calls[0]["config"]
        _check_config(command, [files] if isinstance(files, str) else files, calls[0]["overrides"])
    if str(calls[0].get("weights", "")).startswith("bundles/"):  # a file of ours that is there by default
        _exists(command, calls[0]["weights"])


def _check_make(command: Command, words: list[str]) -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        known = f"$({name})" in makefile or f"$(if $({name})" in makefile if equals else None
        if not (known if equals else re.search(rf"^{re.escape(name)}:", makefile, re.M)):
            raise Wrong(f"{command}: the Makefile has no {name}.")


def _check_pip(command: Command, words: list[str]) -> None:
    if words[0] != "install":
        raise Wrong(f"{command}: is no installation.")
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    for i, word in enumerate(words):
        if words[i - 1] == "-c":
            _exists(command, word)
        if found := re.fullmatch(r"\.\[(.+)\]", word):
            for extra in found[1].split(","):
                if not re.search(rf"^{extra} = \[", project, re.M):
                    raise Wrong(f"{command}: the project has no extra {extra}.")


def _check_python(command: Command, words: list[str]) -> None:
    if words[0] == "-m":
        module, *rest = words[1:]
        if module == "monai.bundle":
            _check_bundle(command, rest)
        elif module.startswith("custom"):
            _exists(command, module.replace(".", "/") + ".py")
        elif module not in ("venv", "zipfile", "pip"):
            raise Wrong(f"{command}: a module that no page should need.")
        return
    _exists(command, words[0])
    if words[0].startswith("benchmarks/") and (command.whole or len(words) > 1):
        _check_script(command, REPO / words[0], words[1:])


class _Parsed(Exception):
    """A script has read its arguments."""


def _check_script(command: Command, script: Path, words: list[str]) -> None:
    """Run a script up to where it has read its arguments."""
    parse, before = argparse.ArgumentParser.parse_args, (sys.argv, list(sys.path))

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise _Parsed

    argparse.ArgumentParser.parse_args = stop  # type: ignore[assignment, method-assign]
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except _Parsed:
        return
    except SystemExit as ended:
        raise Wrong(f"{command}: the script does not take these arguments.") from ended
    finally:
        argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]
        sys.argv, sys.path[:] = before
    raise Wrong(f"{command}: the script reads no arguments.")


def _check_bundle(command: Command, words: list[str]) -> None:
    if not words or not hasattr(monai.bundle, words[0].replace("-", "_")):
        raise Wrong(f"{command}: there is no such command of monai.bundle.")
    function = getattr(monai.bundle, words[0])
    given = _options(command, words[1:])
    taken = inspect.signature(function).parameters
    settings = {k: v for k, v in given.items() if k not in taken}
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()) and settings:
        raise Wrong(f"{command}: monai.bundle {words[0]} has no {', '.join(settings)}.")
    if "config_file" in given:
        files = given["config_file"]
        _check_config(command, files if isinstance(files, list) else [files], settings)


def _options(command: Command, words: list[str]) -> dict[str, Any]:
    """``--key value`` as fire reads it."""
    made, words = {}, SeparateFlagArgs(words)[0]
    words = [w for w in words if w != "..."]
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--"):
            raise Wrong(f"{command}: {key!r} follows no option.")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "True"
        made[key[2:]] = DefaultParseValue(value)
    return made


def _check_config(command: Command, files: list[str], settings: dict[str, Any]) -> None:
    paths = [command.folder / file for file in files]
    for file, path in zip(files, paths, strict=True):
        if not path.is_file() and file not in NEW_FILES:
            raise Wrong(f"{command}: there is no {file}.")
    known = [str(path) for path in paths if path.is_file()]
    if (root := settings.get("bundle_root")) is not None:
        _exists(command, str(root))
    check_files(known, settings)


# files that the reader of a page makes first, and options: of the method of docs/add_a_method.md, and of monailabel
NEW_FILES = {"bundles/alice_pretrain/configs/deblur.yaml"}
OTHERS = {"method::kernel", "conf", "host"}


def _exists(command: Command, path: str) -> None:
    if not (command.folder / path).exists():
        raise Wrong(f"{command}: there is no {path}.")


def options_of(text: str) -> list[str]:
    """Options that stand alone inside a sentence, such as ``--clip 3``."""
    return [m[1] for m in re.finditer(r"`--([A-Za-z_][\w:-]*)[^`\n]*`", text)]


def option_exists(name: str) -> bool:
    """Whether something of this project, or a command of ``monai.bundle``, takes an option."""
    bundle = (
        monai.bundle.run,
        monai.bundle.download,
        monai.bundle.ckpt_export,
        monai.bundle.verify_net_in_out,
    )
    functions = [*map(cli.command, cli.COMMANDS), *bundle]
    if name in ("traceback", *OTHERS) or any(name in inspect.signature(f).parameters for f in functions):
        return True
    scripts = (path.read_text(encoding="utf-8") for path in REPO.glob("benchmarks/*.py"))
    if any(f'"--{name}"' in text for text in scripts):
        return True
    contents = [c for f in REPO.glob("bundles/*/configs") for c in configs_in(f).values()]
    return any(unknown_key(content, name, "") is None for content in contents)
