"""Read the arguments of a command as its function declares them.

``--hash_ids false`` is False; ``--workers many`` is refused.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from custom.bundles.setting_kinds import WrongKind, kind_of_parameter, read_as
from custom.errors import AliceError


def quoted(words: Sequence[str]) -> list[str]:
    """Words of a command line as text for fire, which would read ``2024_01`` as the number 202401."""
    made: list[str] = []
    for i, word in enumerate(words):
        if word == "--":  # what follows is fire's
            return [*made, *words[i:]]
        option = word[:1] == "-" and not word[1:2].isdigit()
        key, equals, value = word.partition("=") if option else ("", "", word)
        made.append(f"{key}{equals}{value!r}" if equals or not option else word)
    return made


def typed(function: Callable[..., None], name: str) -> Callable[..., None]:
    """A command's function that takes text, and reads it as its annotations say.

    Args:
        function: of the command.
        name: of the command.

    Raises:
        AliceError: (the function that is returned) for a value that an option does not take.
    """
    taken = inspect.signature(function).parameters

    @functools.wraps(function)
    def run(*positional: Any, **named: Any) -> None:
        arguments: dict[str, Any] = dict(zip(taken, positional, strict=False)) | named
        for key, value in arguments.items():
            arguments[key] = _read(name, key, value, taken.get(key))
        function(**arguments)

    return run


def _read(name: str, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    if parameter is None:  # a setting of a config, which is read with the config
        from fire.parser import DefaultParseValue

        return DefaultParseValue(value) if isinstance(value, str) else value
    kind = kind_of_parameter(parameter)
    option = f"-{key}" if len(key) == 1 else f"--{key}"
    if value is True and kind.names and "switch" not in kind.names:
        raise AliceError(f"{name} {option}: takes {kind}, and nothing follows it.")
    try:
        return read_as(value, kind, expressions=False)
    except WrongKind as wrong:
        raise AliceError(f"{name} {option} {value}: {option} {wrong}.") from None


def check_names(function: Callable[..., None], name: str, words: Sequence[str]) -> None:
    """Refuse an option that a command lacks. fire would run the command first and complain afterwards.

    Raises:
        AliceError: naming the option and what was probably meant.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    taken = list(parameters)
    for word in words:
        if word == "--":  # what follows is fire's
            return
        if not word.startswith("--"):
            continue
        key = word[2:].partition("=")[0].replace("-", "_")
        if key in taken or key in ("help", "h") or len(key) == 1 or (key[:2] == "no" and key[2:] in taken):
            continue
        meant = difflib.get_close_matches(key, taken, n=1)
        hint = f"Did you mean --{meant[0]}?" if meant else f"alice {name} --help lists all options."
        raise AliceError(f"{name}: there is no option --{key}. {hint}")
