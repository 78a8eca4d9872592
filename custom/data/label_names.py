"""Refuse a data set that names its label values otherwise than they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.data.errors import ScanError
from custom.data.layouts import dataset_jsons, misnamed, names_of_values, organ_of
from custom.files import read_json


def read_label_map(label_map: Mapping[Any, Any], labels: Sequence[str]) -> dict[int, int]:
    """Numbers of a data set -> numbers it is read by; as ``label_map`` of the segmentation bundles.

    Args:
        label_map: from a value of the data to a value (0 is background) or to one of ``labels``.
        labels: names of the values 1, 2, ...

    Raises:
        ScanError: naming what is neither.
    """
    value_of = {"background": 0} | {organ_of(name): value for value, name in enumerate(labels, start=1)}
    found = {}
    for key, to in label_map.items():
        number = int(to) if str(to).isdecimal() else value_of.get(organ_of(str(to)), -1)
        if not str(key).isdecimal() or not 0 <= number <= len(labels):
            raise ScanError(
                f"label_map: {key!r}: {to!r} maps no value of the data to 0 to {len(labels)} or to one of {', '.join(labels)}."
            )
        found[int(key)] = number
    return found


def refuse_other_names(
    source: str | Path, files: Iterable[Path], labels: Sequence[str], way_out: str
) -> None:
    """Compare the names that a data set gives to its label values with those it is read by.

    Args:
        source: folder or datalist. A folder's names stand in its ``dataset.json`` (MSD, nnU-Net v1 and v2).
        files: images or labels of the folder; a ``dataset.json`` may lie beside their folders.
        labels: names of the values 1, 2, ...
        way_out: the end of the message; ``{names}`` stands for the data's own names, in order of their values.

    Raises:
        ScanError: naming the JSON, and each value whose name is another.
    """
    for path in dataset_jsons(Path(source).expanduser(), files):
        names = names_of_values(read_json(path, error=ScanError))
        if wrong := misnamed(names, labels):
            told = ", ".join(f"{value} is {name}" for value, name in wrong[:5])
            own = ",".join(name for value, name in names if value)
            raise ScanError(f"{path}: {told}; here {_expected(wrong, labels)}. {way_out.format(names=own)}")


def _expected(wrong: Sequence[tuple[int, str]], labels: Sequence[str]) -> str:
    known = ["background", *labels]
    parts = [f"{v} is {known[v]}" if 0 <= v < len(known) else f"there is no {v}" for v, _ in wrong[:5]]
    return ", ".join(dict.fromkeys(parts))
