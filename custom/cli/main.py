"""The ``alice`` command: chores that are no bundle workflow."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from custom.errors import ShownFormatter, plain_message

# command -> module and function; a module is imported when its command runs
COMMANDS = {
    "phantom": "custom.cli.data:phantom",
    "scan": "custom.cli.data:scan",
    "build": "custom.cli.data:build",
    "embed": "custom.cli.landmarks:embed",
    "calibrate": "custom.cli.landmarks:calibrate",
    "check-alignment": "custom.cli.landmarks:check_alignment",
    "estimate": "custom.cli.runs:estimate",
    "profile": "custom.cli.runs:profile",
    "probe": "custom.cli.runs:probe",
    "properties": "custom.cli.runs:properties",
    "picture": "custom.cli.runs:picture",
    "report": "custom.cli.runs:report",
    "export": "custom.cli.weights:export",
    "convert": "custom.cli.weights:convert",
    "bundle": "custom.cli.bundles:bundle",
    "datalist": "custom.cli.scores:datalist",
    "score": "custom.cli.scores:score",
    "compare": "custom.cli.scores:compare",
    "compare-methods": "custom.cli.study:compare_methods",
}


def command(name: str) -> Callable[..., None]:
    """The function of a command."""
    module, _, function = COMMANDS[name].partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def overview() -> str:
    """Every command with the first sentence of its help."""
    lines = ["alice COMMAND ...; alice COMMAND --help says more", ""]
    for name in COMMANDS:
        lines.append(f"  {name:<17}{(inspect.getdoc(command(name)) or '').splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. What a user can mend is said in one line; a bug, or any error with --traceback, keeps its traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return
    if words[0] not in COMMANDS:
        print(f"alice: there is no command {words[0]!r}.\n\n{overview()}", file=sys.stderr)
        sys.exit(2)
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # it tells its threads to everybody
    try:
        _call(command(words[0]), words[0], words[1:])
    except Exception as error:
        message = plain_message(error)
        if message is None or traceback:
            raise
        print(f"alice: {message}", file=sys.stderr)
        sys.exit(1)


def _call(function: Callable[..., None], name: str, words: Sequence[str]) -> Any:
    import fire  # it takes a fifth of a second

    from custom.cli.arguments import check_names, quoted, typed

    before_fires_own = words[: words.index("--")] if "--" in words else words
    if {"--help", "-h"} & set(before_fires_own):
        print(_help(function, name))
        return None
    check_names(function, name, words)
    return fire.Fire(typed(function, name), command=quoted(words), name=f"alice {name}")


def _help(function: Callable[..., None], name: str) -> str:
    """What fire would show; fire itself writes it to stderr, behind a line of its log."""
    from fire import helptext
    from fire.trace import FireTrace

    text: str = helptext.HelpText(function, FireTrace(function, name=f"alice {name}"))
    return text.replace(f"'alice {name}'", f"alice {name}")


if __name__ == "__main__":
    main()
