"""Before a run: is every override a key that exists? And: errors of ours said in one line."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import logging
import re
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
_ENTRIES = {"imports", "initialize", "run", "finalize", "bundle_root", "dataset_dir", "device", "network_def"}
_REFERENCE = re.compile(r"[@%](\w+)")


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
    options = command_line(arguments)
    if options.pop("traceback", "false").lower() != "true":
        speak_plainly()
    if "config_file" not in options:
        return
    allowed = RUN_OPTIONS | (TRACKING_OPTIONS if "tracking" in options else set())
    given = {k: v for k, v in options.items() if k not in allowed}
    complete = check_files(_as_list(options["config_file"]), given)
    if "args_file" in options:
        in_file = ConfigParser.load_config_file(options["args_file"])
        check_keys(complete, {k: v for k, v in in_file.items() if k not in allowed}, options["args_file"])


def check_files(files: Sequence[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Check that every key of an override file, and every override, is one of the config it changes.

    Args:
        files: the complete config, then files that change some of its keys.
        overrides: keys and values of the command line, or of a caller.

    Returns:
        The config with all files applied.

    Raises:
        ConfigKeyError: naming the key, where it stands, and the key that was probably meant; or a setting that nothing
            uses, since a file replaced the object that did.
    """
    complete = ConfigParser.load_config_file(files[0])
    for file in files[1:]:
        changes = ConfigParser.load_config_file(file)
        check_keys(complete, changes, file)
        _override(complete, changes)  # what one file replaces, the next one refers to
    check_keys(complete, overrides, "the command line")
    used = _used_keys(complete)
    for key in overrides:
        name = _parts(key)[0]
        if used and name not in used | _ENTRIES:
            raise ConfigKeyError(
                f"the command line: {key!r} acts on nothing in this run; {files[-1]} replaced what used it."
            )
    return complete


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
        parts = _parts(key)
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
                elsewhere = _places_of(complete, part) if len(parts) == 1 else []
                raise ConfigKeyError(_unknown(key, part, node, origin, elsewhere))


def _override(complete: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set every key as MONAI will."""
    for key, value in overrides.items():
        *folders, last = _parts(key)
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


def _unknown(key: str, part: str, node: Any, origin: str, elsewhere: Sequence[str] = ()) -> str:
    known = (
        list(node)
        if isinstance(node, dict)
        else [str(i) for i in range(len(node))]
        if isinstance(node, list)
        else []
    )
    meant = elsewhere[:1] or difflib.get_close_matches(part, known, n=1)
    hint = f"Did you mean {meant[0]!r}?" if meant else f"Known here: {', '.join(sorted(known)) or 'nothing'}."
    return f"{origin}: {key!r} is no setting of this config. {hint}"


def _parts(key: str) -> list[str]:
    return [p for p in key.lstrip("+").replace("#", "::").split("::") if p]


def _places_of(node: Any, name: str, path: str = "") -> list[str]:
    """Where in a config a setting of this name stands, or is an argument that an object takes."""
    if isinstance(node, list):
        return []
    found = []
    if isinstance(node, dict):
        takes = name in node or ("_target_" in node and name in _arguments(str(node["_target_"])))
        found = [f"{path}{name}"] if path and takes else []
        for key, value in node.items():
            found += _places_of(value, name, f"{path}{key}::")
    return found


def _arguments(target: str) -> list[str]:
    try:
        return list(inspect.signature(locate(target)).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []


def _used_keys(complete: dict[str, Any]) -> set[str]:
    """Keys that a run reaches from what it executes; empty for a config that executes nothing."""
    waiting = [k for k in ("imports", "initialize", "run", "finalize") if k in complete]
    used: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in used and name in complete:
            used.add(name)
            waiting += _REFERENCE.findall(json.dumps(complete[name], default=str))
    return used if "run" in used else set()


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
