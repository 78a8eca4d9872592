"""Keys of a config: where a setting stands, what an object takes, what a run reaches.

The segmentation bundles hold the same file.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigParser

from .setting_kinds import Kind, kind_of_parameter

KeyPath = tuple[str, ...]
_REFERENCE = re.compile(r"[@%](\w+(?:(?:::|#)\w+)*)")
MISSING = object()


def value_at(node: Any, path: KeyPath, missing: Any = None) -> Any:
    """What stands at a path of a config; ``missing`` if nothing does."""
    for part in path:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return missing
    return node


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type: True is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or (isinstance(one, str | int | float) and one == other)


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict) for v in value)


def configs_in(folder: Path) -> dict[Path, dict[str, Any]]:
    """The configs of a folder and what they hold."""
    files = [file for file in sorted(folder.glob("*.*")) if file.suffix in (".yaml", ".yml", ".json")]
    return {file: _expanded(file) for file in files if file.name not in ("metadata.json", "folds.json")}


def _expanded(file: Path) -> dict[str, Any]:
    """The content of a file, ``a::b: 1`` as ``{a: {b: 1}}``."""
    made: dict[str, Any] = {}
    for key, value in ConfigParser.load_config_file(str(file)).items():
        *folders, last = parts_of(key)
        node = made
        for part in folders:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = value
    return made


def arguments_of(found: Any) -> dict[str, Kind] | None:
    """The arguments that a class or function takes, and their kinds; None if it takes any."""
    try:
        taken = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return None
    return {name: kind_of_parameter(p) for name, p in taken.items()}


def used_paths(config: dict[str, Any], roots: Sequence[str]) -> set[KeyPath]:
    """Paths that a run reaches from what it executes; empty for a config that executes nothing."""
    imports = [key for key, value in config.items() if _imports(value)]
    waiting: list[KeyPath] = [(key,) for key in (*imports, *roots) if key in config]
    used: set[KeyPath] = set()
    while waiting:
        path = waiting.pop()
        node = value_at(config, path, MISSING)
        if path not in used and node is not MISSING:
            used.add(path)
            text = json.dumps(node, default=str)
            waiting += [tuple(re.split("::|#", found)) for found in _REFERENCE.findall(text)]
    return used if len(roots) > 1 and (roots[1],) in used else set()


def _imports(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(v, str) and v.startswith(("$import ", "$from ")) for v in value
    )  # fmt: skip


def parts_of(key: str) -> list[str]:
    """``+a::b#c`` as ``[a, b, c]``."""
    return [p for p in key.lstrip("+").replace("#", "::").split("::") if p]


def unknown_key(config: dict[str, Any], key: str, origin: str) -> str | None:
    """Say what is wrong with a key that names nothing in a config, and no argument of an object in it.

    Args:
        config: the config.
        key: ``a::b`` of an override.
        origin: where the override stands.

    Returns:
        A sentence that names the key and what was probably meant; None if there is such a key.
    """
    parts = parts_of(key)
    node: Any = config
    for depth, part in enumerate(parts):
        if isinstance(node, list) and part.lstrip("-").isdigit() and -len(node) <= int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, dict) and "_target_" in node and depth == len(parts) - 1:
            taken = arguments_of(locate(str(node["_target_"])))
            known = taken is None or part.startswith("_") or part in taken
            return None if known else no_setting(parts, part, list(taken or ()), origin)
        else:
            options = list(node) if isinstance(node, dict) else []
            if isinstance(node, list):
                options = [str(i) for i in range(len(node))]
            places = places_of(config, part) if len(parts) == 1 else []
            return no_setting(parts, part, options, origin, places)
    return None


def no_setting(
    path: Sequence[str], part: str, options: Sequence[str], origin: str = "", places: Sequence[str] = ()
) -> str:
    meant = places[:1] or difflib.get_close_matches(part, options, n=1)
    known = ", ".join(sorted(set(options))) or "nothing"
    hint = f"Did you mean {meant[0]!r}?" if meant else f"Known here: {known}."
    return f"{f'{origin}: ' if origin else ''}{'::'.join(path)!r} is no setting of this config. {hint}"


def places_of(node: Any, name: str, path: str = "") -> list[str]:
    """Where in a config a setting of this name stands, or is an argument that an object takes."""
    found: list[str] = []
    if isinstance(node, dict):
        target = node.get("_target_")
        takes = isinstance(target, str) and name in (arguments_of(locate(target)) or {})
        found = [f"{path}{name}"] if path and (name in node or takes) else []
        for key, value in node.items():
            found += places_of(value, name, f"{path}{key}::")
    return found
