"""Before a run: is every override a key that exists? And: errors of ours said in one line."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import sys
from collections.abc import Sequence
from pydoc import locate
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser

from custom.errors import AliceError, plain_message

logger = logging.getLogger(__name__)

# what `python -m monai.bundle run` takes itself, and what --tracking adds (monai.bundle.run)
RUN_OPTIONS = {
    "run_id",
    "init_id",
    "final_id",
    "meta_file",
    "config_file",
    "logging_file",
    "tracking",
    "args_file",
}
TRACKING_OPTIONS = {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "output_dir"}
_WRITTEN_BY_MONAI = {"_meta_"}


class ConfigKeyError(AliceError):
    """An override that names no key of the config."""


def preflight(arguments: Sequence[str]) -> None:
    """Check a bundle run's command line, and make our own errors readable from here on.

    MONAI takes any override in silence, so a misspelt one would simply not act.

    Args:
        arguments: ``sys.argv`` of ``python -m monai.bundle run``; of another program, nothing is checked.

    Raises:
        ConfigKeyError: naming the key, where it stands, and the key that was probably meant.
    """
    speak_plainly()
    options = command_line(arguments)
    if "config_file" not in options:
        return
    files = _as_list(options["config_file"])
    complete = ConfigParser.load_config_file(files[0])
    for file in files[1:]:
        overrides = ConfigParser.load_config_file(file)
        check_keys(complete, overrides, file)
        _override(complete, overrides)  # what one file replaces, the next one refers to
    allowed = RUN_OPTIONS | (TRACKING_OPTIONS if "tracking" in options else set())
    check_keys(complete, {k: v for k, v in options.items() if k not in allowed}, "the command line")
    if "args_file" in options:
        given = ConfigParser.load_config_file(options["args_file"])
        check_keys(complete, {k: v for k, v in given.items() if k not in allowed}, options["args_file"])


def command_line(arguments: Sequence[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` of a command line."""
    options: dict[str, str] = {}
    words = list(arguments)
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        follows = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
        options[key] = value if equals else follows
    return options


def check_keys(complete: dict[str, Any], overrides: dict[str, Any], origin: str) -> None:
    """Every override must name a key of the complete config, or an argument of an object in it.

    Raises:
        ConfigKeyError: naming the first that does not.
    """
    for key in overrides:
        if key in _WRITTEN_BY_MONAI:
            continue
        parts = [p for p in key.lstrip("+").replace("#", "::").split("::") if p]
        node: Any = complete
        for depth, part in enumerate(parts):
            if isinstance(node, list) and part.lstrip("-").isdigit() and -len(node) <= int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, dict) and "_target_" in node and depth == len(parts) - 1:
                _check_argument(key, part, node["_target_"], origin)
                break
            else:
                raise ConfigKeyError(_unknown(key, part, node, origin))


def _override(complete: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set every key as MONAI will."""
    for key, value in overrides.items():
        *folders, last = [p for p in key.lstrip("+").replace("#", "::").split("::") if p]
        node: Any = complete
        for part in folders:
            node = node[int(part)] if isinstance(node, list) else node[part]
        place: Any = int(last) if isinstance(node, list) else last
        if key.startswith("+") and isinstance(value, dict):
            node[place] = node[place] | value
        elif key.startswith("+") and isinstance(value, list):
            node[place] = node[place] + value
        else:
            node[place] = value


def _check_argument(key: str, argument: str, target: str, origin: str) -> None:
    """A new argument of an object must be one that its constructor takes."""
    found = locate(target)
    if found is None or argument.startswith("_"):  # a short MONAI name, or one of MONAI's own keys
        return
    taken = inspect.signature(found).parameters  # type: ignore[arg-type]
    if argument not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ConfigKeyError(_unknown(key, argument, dict.fromkeys(taken), origin))


def _unknown(key: str, part: str, node: Any, origin: str) -> str:
    known = (
        list(node)
        if isinstance(node, dict)
        else [str(i) for i in range(len(node))]
        if isinstance(node, list)
        else []
    )
    meant = difflib.get_close_matches(part, known, n=1)
    hint = f"Did you mean {meant[0]!r}?" if meant else f"Known here: {', '.join(sorted(known)) or 'nothing'}."
    return f"{origin}: {key!r} is no setting of this config. {hint}"


def _as_list(value: str) -> list[str]:
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return [value]
    return [str(v) for v in parsed] if isinstance(parsed, (list, tuple)) else [str(parsed)]


def speak_plainly() -> None:
    """From here on an uncaught error that this package raised ends the program with one line, no traceback."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = plain_message(error)
        if message is None:
            previous(kind, error, trace)
        else:
            print(f"alice: {message}", file=sys.stderr)

    if getattr(previous, "__module__", None) != __name__:
        sys.excepthook = hook
