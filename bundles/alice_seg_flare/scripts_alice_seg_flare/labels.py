"""What the data call their label values: names that are not the bundle's, and values that are mapped to the bundle's."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from .files import read_json
from .layouts import dataset_jsons, misnamed, names_of_values, organ_of, suggested_map
from .refusals import name_of, refuse

LabelMap = Mapping[Any, Any]


def read_map(label_map: LabelMap | None, labels: Sequence[str]) -> dict[int, int]:
    """A setting ``label_map`` as numbers: value of the data -> value of the bundle.

    Args:
        label_map: from a value to a value (0 is background) or to one of ``labels``.
        labels: the bundle's organs in the order of their label values, from 1.

    Raises:
        ValueError: naming what is neither.
    """
    value_of = {"background": 0} | {organ_of(name): value for value, name in enumerate(labels, 1)}
    found = {}
    for key, to in dict(label_map or {}).items():
        number = int(to) if str(to).isdecimal() else value_of.get(organ_of(str(to)), -1)
        if not str(key).isdecimal() or not 0 <= number <= len(labels):
            raise ValueError(
                f"label_map: {key!r}: {to!r} maps no value of the data to 0 to {len(labels)} or to one of labels; write "
                '"{1: 3}" or "{1: \'spleen\'}".'
            )
        found[int(key)] = number
    return found


def label_problems(
    dataset_dir: str, files: Iterable[str], labels: Sequence[str], label_map: LabelMap | None
) -> list[str]:
    """Say which names of the data are not the bundle's, and how to go on.

    Args:
        dataset_dir: a folder, whose names stand in ``dataset.json`` (MSD, nnU-Net v1 and v2), or a datalist.
        files: images and labels of the folder; a ``dataset.json`` may lie beside their folders.
        labels: the bundle's organs in the order of their label values, from 1.
        label_map: as :func:`read_map` takes it.

    Returns:
        One sentence for each JSON.
    """
    try:
        numbers = read_map(label_map, labels)
    except ValueError as error:
        return [str(error)]
    if not os.path.exists(dataset_dir):
        return []
    told = []
    for path in dataset_jsons(Path(dataset_dir), map(Path, files)):
        names = names_of_values(read_json(path))
        wrong = misnamed(names, labels, numbers)
        if wrong:
            told.append(_told(path, wrong, names, labels, numbers))
    return told


def _told(
    path: Path,
    wrong: Sequence[tuple[int, str]],
    names: Sequence[tuple[int, str]],
    labels: Sequence[str],
    numbers: Mapping[int, int],
) -> str:
    known = ["background", *labels]
    here = [
        f"{known[v]!r} has {v}" if v < len(known) else f"no organ has {v}"
        for v, _ in ((numbers.get(value, value), name) for value, name in wrong[:5])
    ]
    said = ", ".join(f"{value} is {name!r}" for value, name in wrong[:5])
    own = [name for _, name in names if _ != 0]
    mapped = suggested_map(names, labels)
    ways = (
        [f"map the data's values to the bundle's (0: background), --label_map \"{mapped}\""]
        if any(mapped.values())
        else []
    )
    ways.append(f'train with the data\'s own, --labels "{own}"')
    return f"labels: {said} in {path}; in this bundle {', '.join(dict.fromkeys(here))}. Ways out: {'; '.join(ways)}."


class MapLabels(MapTransform):
    """Change the values of a label as a setting ``label_map`` says; without one nothing is changed.

    Args:
        keys: of the label (1, X, Y, Z).
        label_map: as :func:`read_map` takes it. It names every value but 0.
        labels: the bundle's organs in the order of their label values, from 1.

    Raises:
        ValueError: naming the label's file, for a value that is not in ``label_map``.
    """

    def __init__(self, keys: KeysCollection, label_map: LabelMap | None, labels: Sequence[str]) -> None:
        super().__init__(keys)
        self.numbers = read_map(label_map, labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        changed = dict(data)
        if not self.numbers:
            return changed
        for key in self.key_iterator(changed):
            label = changed[key]
            unknown = sorted(set(torch.unique(label).tolist()) - set(self.numbers) - {0})
            if unknown:
                raise refuse(
                    name_of(label),
                    f": label values {unknown[:5]} are not in label_map {self.numbers}; name each, 0 for background.",
                )
            mapped = torch.zeros_like(label)
            for value, number in self.numbers.items():
                mapped[label == value] = number
            changed[key] = mapped
        return changed
