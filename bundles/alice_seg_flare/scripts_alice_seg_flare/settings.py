"""The settings of a run, checked before anything else: does each name exist, and is each value of its kind?

MONAI takes every override in silence. So a misspelt name would not act, and ``--resume false``, which is
text, would resume. This file needs MONAI alone. The segmentation bundles hold the same file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from pydoc import locate
from types import FrameType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, merge_kv

from .setting_keys import (
    MISSING,
    KeyPath,
    arguments_of,
    configs_in,
    is_list_of_objects,
    no_setting,
    parts_of,
    places_of,
    same,
    unknown_key,
    used_paths,
    value_at,
)
from .setting_kinds import ANYTHING, Kind, WrongKind, kind_of, read_as, union

# what MONAI's tools look for in a config, whether a run uses it or not
_ENTRIES = {"imports", "initialize", "run", "finalize", "bundle_root", "dataset_dir", "device", "network_def"}


def read_settings(
    may_be_null: Mapping[str, str] | None = None, extra: Mapping[str, str] | None = None
) -> list[str]:
    """Check the settings of the running workflow and read each as the kind of value that it is.

    The workflow is found on the call stack. So this works for ``python -m monai.bundle run``, with
    ``torchrun``, and for ``ConfigWorkflow`` in Python. It has to be the first expression of ``run``: MONAI
    puts the bundle's folder on Python's path just before, and what was made earlier keeps the old values.

    Args:
        may_be_null: setting -> what it is when it is not null: ``switch``, ``whole``, ``number``, ``text``.
        extra: setting that the config does not hold -> its kind.

    Returns:
        One sentence for each setting that is wrong.
    """
    workflow, files = running_workflow()
    if workflow is None:
        return []
    parser = workflow.parser
    roots = [workflow.init_id, workflow.run_id, workflow.final_id]
    if files:
        found = Settings.of_files(files, parser.locator)
    else:
        found = Settings(configs_in(Path(workflow.config_root_path)).values(), locator=parser.locator)
    problems = found.check(parser.get(), may_be_null or {}, extra or {}, roots)
    for path, value in found.corrections.items():
        parser["::".join(path)] = value
    if found.corrections:
        parser.parse(reset=True)
    return problems


def running_workflow() -> tuple[ConfigWorkflow | None, list[str]]:
    """The workflow whose ``run`` calls this, and its config files.

    Returns:
        The workflow, None without one; its files, known only where MONAI's own scripts made it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), ConfigWorkflow):
        frame = frame.f_back
    if frame is None:
        return None, []
    workflow = frame.f_locals["self"]
    while frame is not None and frame.f_locals.get("self") is workflow:
        frame = frame.f_back
    if frame is None or frame.f_globals.get("__name__") != "monai.bundle.scripts":
        return workflow, []
    given = frame.f_locals
    files = given.get("config_file") or given.get("kwargs", {}).get("config_file")
    if not files and given.get("args_file"):
        files = ConfigParser.load_config_file(str(given["args_file"])).get("config_file")
    return workflow, [str(f) for f in ([files] if isinstance(files, str | Path) else files or [])]


class Settings:
    """What config files hold, and so what a config may hold.

    Args:
        stages: contents of the files; of a run whose files are known, the config after each of them.
        last: name of the last file, for messages.
        locator: finds the classes that MONAI knows by a short name.

    Attributes:
        corrections: path -> value, for values that are read as another kind than they came in.
    """

    def __init__(
        self,
        stages: Iterable[dict[str, Any]],
        last: str = "another file",
        locator: ComponentLocator | None = None,
    ) -> None:
        self.stages, self.last = list(stages), last
        self.corrections: dict[KeyPath, Any] = {}
        self._folder: Path | None = None
        self._unknown: list[tuple[KeyPath, str, Path | None]] = []
        self._locator = locator or ComponentLocator()
        self._known_arguments: dict[str, dict[str, Kind] | None] = {}

    @classmethod
    def of_files(cls, files: Sequence[str], locator: ComponentLocator | None = None) -> Settings:
        """The settings of a complete config and of files that change some of its keys, in this order."""
        made = cls([], files[-1], locator)
        made._folder = Path(files[0]).parent
        parser = ConfigParser(config={})
        for file in files:
            changes = ConfigParser.load_config_file(file)
            complete = not made.stages or "run" in changes  # such a file brings its own settings
            for key, value in changes.items():
                told = None if complete else unknown_key(parser.get(), key, file)
                if told is None:
                    merge_kv(parser, key, deepcopy(value))
                    continue
                path = tuple(parts_of(key))
                owner = value_at(parser.get(), path[:-1])
                made._unknown.append((path, told, Path(file) if "_target_" not in (owner or {}) else None))
                if isinstance(owner, dict):
                    owner[path[-1]] = deepcopy(value)
            made.stages.append(deepcopy(parser.get()))
        return made

    def check(
        self,
        config: dict[str, Any],
        may_be_null: Mapping[str, str],
        extra: Mapping[str, str],
        roots: Sequence[str] = ("initialize", "run", "finalize"),
    ) -> list[str]:
        """Compare a config with the files.

        Args:
            config: what runs: the files and the overrides.
            may_be_null: setting -> its kind when it is not null.
            extra: setting that no file holds -> its kind.
            roots: what is executed.

        Returns:
            One sentence for each problem.
        """
        self._declared = {key: Kind(frozenset({kind, "null"})) for key, kind in may_be_null.items()}
        self._extra = {key: Kind(frozenset({kind})) for key, kind in extra.items()}
        tracking = {key for settings in DEFAULT_EXP_MGMT_SETTINGS.values() for key in settings["configs"]}
        self._foreign = tracking | {"_meta_", "_mlflow_"}
        self._config, self._used = config, used_paths(config, roots)
        told = [message for path, message, file in self._unknown if not self._may_be_new(path, file)]
        self._copied: list[tuple[KeyPath, KeyPath]] = []
        told += self._walk(config, self.stages, ())
        for copy, original in self._copied:
            below = {k: v for k, v in self.corrections.items() if k[: len(original)] == original}
            self.corrections |= {(*copy, *k[len(original) :]): v for k, v in below.items()}
        return list(dict.fromkeys(told))

    def _may_be_new(self, path: KeyPath, file: Path | None) -> bool:
        """Whether a file may bring this new key: it acts, or the bundle's other configs know it."""
        if file is None or self._folder is None:
            return False
        others = (content for other, content in configs_in(self._folder).items() if other != file)
        return self._acts(path) or (len(path) == 1 and any(path[0] in content for content in others))

    def _walk(self, node: Any, known: list[Any], path: KeyPath) -> Iterator[str]:
        """Problems of a node of the config; ``known`` is what the files hold there."""
        if any(same(node, value) or self._is_copy(node, value, path) for value in known):
            return
        if isinstance(node, dict) and any(
            isinstance(value, str) and value.startswith("$") for value in known
        ):
            return  # an expression may give any object
        if isinstance(node, dict) and (not known or any(isinstance(value, dict) for value in known)):
            yield from self._walk_object(node, [v for v in known if isinstance(v, dict)], path)
        elif isinstance(node, list) and any(is_list_of_objects(value) for value in known):
            lists = [value for value in known if isinstance(value, list)]
            for i, value in enumerate(node):
                yield from self._walk(value, [v[i] for v in lists if i < len(v)], (*path, str(i)))
        elif path:
            yield from self._check(node, known, path)

    def _is_copy(self, node: Any, value: Any, path: KeyPath) -> bool:
        """Whether a file has ``%original`` here, and ``node`` is the copy that MONAI puts in."""
        if not isinstance(value, str) or not value.startswith("%"):
            return False
        original = tuple(parts_of(value[1:]))
        there = value_at(self._config, original, MISSING)
        if there is not MISSING and not same(node, there):
            return False
        self._copied.append((path, original))
        return True  # the value of another file's key is not looked at

    def _walk_object(self, node: dict[str, Any], known: list[dict[str, Any]], path: KeyPath) -> Iterator[str]:
        target = node.get("_target_")
        alike = [value for value in known if value.get("_target_") == target]
        if path and {} in known:  # free keys, such as names of scans
            return
        for key, value in node.items():
            below = [one[key] for one in alike if key in one]
            here = (*path, key)
            if not path and not below and key in self._foreign:
                continue
            if not below and key != "_target_":
                told = self._new(here, known, target)
                if told:
                    yield told
                    continue
            yield from self._walk(value, below, here)

    def _new(self, path: KeyPath, known: list[dict[str, Any]], target: Any) -> str | None:
        """What is wrong with a key that no file has there."""
        name = path[-1]
        if not path[:-1] and (name in self._extra or self._acts(path)):
            return None
        if target is None and path[:-1] and (not known or self._acts(path)):
            return None
        if target is not None:
            taken = self._arguments(target)
            if taken is None or name.startswith("_") or name in taken:
                return None
            return no_setting(path, name, list(taken))
        places = [place for stage in self.stages for place in places_of(stage, name)]
        options = [key for one in known for key in one]
        return no_setting(path, name, options, "", places if not path[:-1] else [])

    def _check(self, value: Any, known: list[Any], path: KeyPath) -> Iterator[str]:
        key = "::".join(path)
        if known and self._used and not self._acts(path) and path[0] not in _ENTRIES:
            yield f"{key!r} acts on nothing in this run; {self.last} replaced what used it."
            return
        try:
            read = read_as(value, self._kind(path, known))
        except WrongKind as wrong:
            yield f"{key} = {value!r}: this setting {wrong}."
            return
        if not same(read, value):
            self.corrections[path] = read

    def _kind(self, path: KeyPath, known: list[Any]) -> Kind:
        """What a setting takes, from the files, from what the config declares and from the object's class."""
        kind = union(kind_of(value, self._kind_at()) for value in known)
        kind = (
            kind | self._declared.get("::".join(path), ANYTHING) | self._extra.get("::".join(path), ANYTHING)
        )
        owner = value_at(self._config, path[:-1])
        if path[-1] == "_disabled_":
            return Kind(frozenset({"switch"}))
        if isinstance(owner, dict) and "_target_" in owner and path[-1] != "_target_":
            kind = kind | (self._arguments(owner["_target_"]) or {}).get(path[-1], ANYTHING)
        return kind

    def _kind_at(self, seen: frozenset[str] = frozenset()) -> Any:
        def kind_at(reference: str) -> Kind:
            if reference in seen:
                return ANYTHING
            path = tuple(reference.split("::"))
            values = [
                value for stage in self.stages if (value := value_at(stage, path, MISSING)) is not MISSING
            ]
            return union(kind_of(value, self._kind_at(seen | {reference})) for value in values)

        return kind_at

    def _arguments(self, target: Any) -> dict[str, Kind] | None:
        """Arguments of an object; None if they are not known, or if it takes any."""
        if not isinstance(target, str) or target.startswith("$"):
            return None
        if target not in self._known_arguments:
            component = ConfigComponent(config={"_target_": target}, locator=self._locator)
            self._known_arguments[target] = arguments_of(locate(str(component.resolve_module_name())))
        return self._known_arguments[target]

    def _acts(self, path: KeyPath) -> bool:
        """Whether a run reaches a setting, or something in it."""
        return any(path[: len(used)] == used or used[: len(path)] == path for used in self._used)
