"""Before a run: check every setting by name and kind, and say errors of ours in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser

from custom.bundles.settings import Settings, read_settings, running_workflow, unknown_key
from custom.errors import AliceError, plain_message


class ConfigKeyError(AliceError):
    """A setting that does not exist, or that does not take its value."""


def preflight(may_be_null: Mapping[str, str] | None = None) -> None:
    """Check and read the settings of the run that calls this. From here on, say errors of ours in one line.

    Args:
        may_be_null: setting -> what it is when it is not null: ``switch``, ``whole``, ``number``, ``text``.

    Raises:
        ConfigKeyError: naming each setting that does not exist, or that does not take its value.
    """
    problems = read_settings(may_be_null, {"traceback": "switch"})
    workflow, _ = running_workflow()
    if workflow is None or workflow.parser.get("traceback") is not True:
        speak_plainly()
    if problems:
        raise ConfigKeyError(" ".join(problems))


def check_files(files: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Check that every key of an override file, and every override, is one of the config it changes.

    Args:
        files: the complete config, then files that change some of its keys.
        overrides: keys and values of a command line, or of a caller.

    Returns:
        The overrides, each read as the kind of value that its setting takes.

    Raises:
        ConfigKeyError: naming the key, where it stands, and the key that was probably meant; a setting that
            nothing uses, since a file replaced the object that did; or a value of a wrong kind.
    """
    found = Settings.of_files(files)
    complete = deepcopy(found.stages[-1])
    check_keys(complete, overrides)
    parser = ConfigParser(complete)
    for key, value in overrides.items():
        parser[key] = value
    declared = complete.get("preflight") or {}
    if problems := found.check(parser.get(), declared.get("may_be_null", {}), {}):
        raise ConfigKeyError(" ".join(problems))
    for path, value in found.corrections.items():
        parser["::".join(path)] = value
    return {key: parser[key] for key in overrides}


def check_keys(complete: dict[str, Any], overrides: Mapping[str, Any], origin: str = "") -> None:
    """Every override must name a key of the complete config, or an argument of an object in it.

    Args:
        complete: the config.
        overrides: key -> value.
        origin: where they stand.

    Raises:
        ConfigKeyError: naming the first that does not.
    """
    for key in overrides:
        if told := unknown_key(complete, key, origin):
            raise ConfigKeyError(told)


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
