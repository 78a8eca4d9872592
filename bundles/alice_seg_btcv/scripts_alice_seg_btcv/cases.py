"""Labelled cases: pairs of image and label, the fold that is held back, and few-shot subsets of the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .files import files_below, is_dicom, read_json
from .labels import LabelMap, label_problems
from .layouts import (
    IMAGE_SUFFIXES,
    Pairs,
    case_name,
    entries_of,
    is_image_folder,
    is_label,
    pair,
    path_beside,
)

Record = dict[str, Any]  # image, label; optionally patient, fold, order


class Cases:
    """The labelled cases of a folder or a datalist, split into those that train and those that are held back.

    A case's fold is the one in the datalist, if it has one. Else it is that of ``stored_folds``, if that file knows all
    cases and no fold stays empty. Else the patients are dealt out in the order of sha256(``folds`` seed NUL name).
    ``custom.evaluation.splits.folds`` deals in the same way.

    Args:
        dataset_dir: a folder with image and label folders at any depth, or a datalist JSON in the form of the Decathlon or
            of nnU-Net.
        fold: the fold that is held back, counted from 0.
        labelled: share in (0, 1] of the other patients that train, or a number of them.
        folds: number of folds.
        fold_seed: of the folds, and of which patients a few-shot run sees.
        stored_folds: JSON file with the published folds: 5 of them, of seed 0.
        image_folders: more names of folders that hold images; see ``layouts.py``.
        label_folders: more names of folders that hold labels.
        leave_out: names of cases that are not used.
    """

    def __init__(
        self,
        dataset_dir: str,
        fold: int,
        labelled: float,
        folds: int,
        fold_seed: int,
        stored_folds: str,
        image_folders: Sequence[str],
        label_folders: Sequence[str],
        leave_out: Sequence[str] = (),
    ) -> None:
        self.dataset_dir, self.fold, self.labelled = str(dataset_dir), fold, labelled
        self.folds, self.fold_seed, self.stored_folds = folds, fold_seed, stored_folds
        self.image_folders, self.label_folders = image_folders, label_folders
        self.leave_out = {str(case) for case in leave_out}

    @cached_property
    def content(self) -> Any:
        """What a datalist holds; None for a folder, the error for what cannot be read."""
        if not self.dataset_dir.lower().endswith(".json"):
            return None
        try:
            return read_json(self.dataset_dir)
        except ValueError as error:
            return error

    @cached_property
    def entries(self) -> list[Record] | None:
        """The cases that a datalist lists; None for a folder, or for nnU-Net v2's ``dataset.json``, which lies in one."""
        content = self.content
        if content is None:
            return None
        if isinstance(content, ValueError):
            return []
        if isinstance(content, Mapping) and "training" in content:
            content = {"training": content["training"]}
        listed = entries_of(content)
        return None if not listed and "file_ending" in content else listed

    @cached_property
    def folder(self) -> Path:
        """The folder of the cases, or of the datalist."""
        return Path(self.dataset_dir if self.content is None else os.path.dirname(self.dataset_dir) or ".")

    @cached_property
    def pairs(self) -> Pairs:
        """Which image has which label; none of a datalist, which says that itself."""
        if self.entries is not None:
            return Pairs()
        files = [path for path in files_below(self.folder) if path.name.lower().endswith(IMAGE_SUFFIXES)]
        files = [path for path in files if case_name(path) not in self.leave_out]
        return pair(files, self.image_folders, self.label_folders)

    @cached_property
    def records(self) -> list[Record]:
        """All cases that have an image and a label."""
        if self.entries is None:
            both = [{"image": str(image), "label": str(label)} for image, label in self.pairs.pairs]
            return sorted(both, key=lambda record: case_name(record["image"]))
        places = [
            entry | {key: str(path_beside(self.folder, entry[key])) for key in ("image", "label")}
            for entry in self.entries
            if isinstance(entry.get("label"), str)
        ]
        return [record for record in places if case_name(record["image"]) not in self.leave_out]

    def _hashed(self, purpose: str, patient: str) -> bytes:
        """An order of the patients which their names, the purpose and the seed decide."""
        return hashlib.sha256(f"{purpose} {self.fold_seed}\0{patient}".encode()).digest()

    @cached_property
    def patients(self) -> list[str]:
        """All patients, in the order in which they are dealt out."""
        return sorted(
            {patient_of(r) for r in self.records}, key=lambda patient: self._hashed("folds", patient)
        )

    @cached_property
    def known_folds(self) -> dict[str, int]:
        """Patient -> fold, as published."""
        with open(self.stored_folds, encoding="utf-8") as file:
            published = json.load(file)["folds"]
        return {patient: k for k, fold in enumerate(published) for patient in fold}

    @cached_property
    def uses_stored_folds(self) -> bool:
        """Whether the published folds apply."""
        known = self.known_folds
        return (
            (self.folds, self.fold_seed) == (5, 0)
            and set(self.patients) <= set(known)
            and len({known[patient] for patient in self.patients}) == 5
        )

    @cached_property
    def dealt(self) -> dict[str, int]:
        """Patient -> fold."""
        if self.uses_stored_folds:
            return {patient: self.known_folds[patient] for patient in self.patients}
        return {patient: i % self.folds for i, patient in enumerate(self.patients)}

    def _fold_of(self, record: Record) -> int:
        return record.get("fold", self.dealt[patient_of(record)])

    @cached_property
    def held_back(self) -> list[Record]:
        """The cases of the fold that is validated on."""
        return [r for r in self.records if self._fold_of(r) == self.fold]

    @cached_property
    def others(self) -> list[Record]:
        """The cases of all other folds."""
        return [r for r in self.records if self._fold_of(r) != self.fold]

    @cached_property
    def candidates(self) -> list[str]:
        """Patients that may train, those a few-shot run takes first in front."""
        ranked = {
            (r.get("order", 0), self._hashed("few-shot", patient_of(r)), patient_of(r)) for r in self.others
        }
        return [patient for _, _, patient in sorted(ranked)]

    @property
    def _labelled_is_valid(self) -> bool:
        number = type(self.labelled) is int and self.labelled > 0
        return number or (type(self.labelled) is float and 0 < self.labelled <= 1)

    @property
    def num_labelled(self) -> int:
        """How many patients train; 0 if ``labelled`` makes no sense."""
        if not self._labelled_is_valid:
            return 0
        if isinstance(self.labelled, int):
            return self.labelled
        return max(1, int(self.labelled * len(self.candidates) + 0.5))

    @cached_property
    def training(self) -> list[Record]:
        """The cases that train."""
        chosen = set(self.candidates[: self.num_labelled])
        return [r for r in self.others if patient_of(r) in chosen]

    def names(self, *parts: Sequence[Record]) -> list[str]:
        """Names of the cases of one or several lists, such as those to train and to validate on."""
        return sorted(case_name(record["image"]) for part in parts for record in part)

    def problems(
        self, train_data: Sequence[Record], labels: Sequence[str], label_map: LabelMap | None = None
    ) -> list[str]:
        """Say what is wrong with the settings and with the data as a whole.

        Args:
            train_data: the cases to train on; not :attr:`training` where a program put others in their place.
            labels: the bundle's organs in the order of their label values, from 1.
            label_map: value of the data -> value of the bundle.

        Returns:
            One sentence for each problem.
        """
        told = [f"dataset_dir: {self.content}."] if isinstance(self.content, ValueError) else []
        if not (type(self.fold) is int and 0 <= self.fold < self.folds):
            told.append(f"fold: there is no fold {self.fold!r}, they are counted 0 to {self.folds - 1}.")
        if not self._labelled_is_valid:
            told.append(
                f"labelled: {self.labelled!r} is neither a share in (0, 1] nor a number of patients; 10 % is 0.1."
            )
        if not train_data and not told:
            told.append(self._no_case())
        if self.records and not self.held_back:
            told.append(f"fold: no case of {self.dataset_dir} is in fold {self.fold!r}.")
        if self.records and self.num_labelled > len(self.candidates):
            told.append(
                f"labelled: {self.labelled!r} patients are asked for, fold {self.fold!r} trains on "
                f"{len(self.candidates)}."
            )
        if unpaired := self._unpaired():
            told.append(
                f"dataset_dir: image without label, or label without image: {', '.join(unpaired[:5])}; alice datalist "
                f"makes a JSON of the pairs; or go on without: {leave_out_option(unpaired)}."
            )
        if repeated := self._repeated():
            told.append(
                f"dataset_dir: several files of one case: {', '.join(repeated[:5])}; alice datalist tells them apart."
            )
        if unknown := sorted(self.leave_out - self._known()):
            told.append(f"leave_out: no case is called {', '.join(unknown[:5])} in {self.dataset_dir}.")
        files = [record["image"] for record in self.records] if self.entries is None else []
        if not isinstance(self.content, ValueError):
            told += label_problems(self.dataset_dir, files, labels, label_map)
        if len({"fold" in record for record in self.records}) == 2:
            told.append("dataset_dir: only some cases of the datalist have a fold.")
        return told

    def _no_case(self) -> str:
        told = (
            f"dataset_dir: no case to train on in {self.dataset_dir}; it takes images/ beside labels/, or a JSON of alice "
            "datalist."
        )
        if self.entries is None and any(map(is_dicom, files_below(self.folder))):
            told += " It holds DICOM; dcm2niix -z y -o IMAGES FOLDER makes NIfTI of it."
        return told

    def _unpaired(self) -> list[str]:
        """Cases of images without label, and of labels without image."""
        if self.entries is not None:
            alone = [entry["image"] for entry in self.entries if not isinstance(entry.get("label"), str)]
            return sorted({case_name(name) for name in alone} - self.leave_out)
        images = [p for p in self.pairs.unlabelled if self._is_image_folder(p.parent.name)]
        labels = [p for p in self.pairs.alone if is_label(Path(p.parent.name, "a.nii"), self.label_folders)]
        return sorted({case_name(path) for path in images + labels})

    def _is_image_folder(self, name: str) -> bool:
        return is_image_folder(name) or name in self.image_folders

    def _repeated(self) -> list[str]:
        """Cases with several images or several labels."""
        images = Counter(case_name(image) for image, _ in self.pairs.pairs)
        images.update(case_name(p) for p in self.pairs.unlabelled if self._is_image_folder(p.parent.name))
        twice = {case for case, count in images.items() if count > 1}
        return sorted(twice | {case_name(other) for _, other in self.pairs.doubles})

    def _known(self) -> set[str]:
        """Names of all cases, those that are left out, too."""
        if self.entries is not None:
            return {case_name(entry["image"]) for entry in self.entries}
        return {case_name(path) for path in files_below(self.folder)}


def leave_out_option(cases: Iterable[str]) -> str:
    """How the command line leaves cases out."""
    return f'--leave_out "{sorted(set(cases))}"'


def patient_of(record: Record) -> str:
    """A case's patient: its own entry, else the case's name."""
    return str(record.get("patient", case_name(record["image"])))
