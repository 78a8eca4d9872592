"""Labelled cases: pairs of image and label, the fold that is held back, and few-shot subsets of the others."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from monai.data import load_decathlon_datalist

from .scans import damaged_files

Record = dict[str, Any]  # image, label; optionally patient, fold, order


class Cases:
    """The labelled cases of a folder or a datalist, split into those that train and those that are held back.

    A case's fold is the one in the datalist, if it has one. Else it is that of ``stored_folds``, if that file knows all
    cases and no fold stays empty. Else the patients are dealt out in the order of sha256(``folds`` seed NUL name).
    ``custom.evaluation.splits.folds`` deals in the same way.

    Args:
        dataset_dir: a folder with image and label folders at any depth, or a datalist JSON in the Decathlon's form.
        fold: the fold that is held back, counted from 0.
        labelled: share in (0, 1] of the other patients that train, or a number of them.
        folds: number of folds.
        fold_seed: of the folds, and of which patients a few-shot run sees.
        stored_folds: JSON file with the published folds: 5 of them, of seed 0.
        image_folders: names of folders that hold images.
        label_folders: names of folders that hold labels.
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
    ) -> None:
        self.dataset_dir, self.fold, self.labelled = str(dataset_dir), fold, labelled
        self.folds, self.fold_seed, self.stored_folds = folds, fold_seed, stored_folds
        self.image_folders, self.label_folders = image_folders, label_folders

    @property
    def is_datalist(self) -> bool:
        """Whether the cases come from a JSON."""
        return self.dataset_dir.endswith(".json")

    @cached_property
    def files(self) -> list[str]:
        """All NIfTI files below the folder."""
        return sorted(glob.glob(os.path.join(self.dataset_dir, "**", "*.nii*"), recursive=True))

    def _files_in(self, folders: Sequence[str]) -> list[str]:
        return [path for path in self.files if os.path.basename(os.path.dirname(path)) in folders]

    @cached_property
    def image_files(self) -> dict[str, str]:
        """Case -> image."""
        return {case_of(path): path for path in self._files_in(self.image_folders)}

    @cached_property
    def label_files(self) -> dict[str, str]:
        """Case -> label."""
        return {case_of(path): path for path in self._files_in(self.label_folders)}

    @cached_property
    def records(self) -> list[Record]:
        """All cases that have an image and a label."""
        if self.is_datalist:
            return load_decathlon_datalist(self.dataset_dir)
        both = sorted(self.image_files.keys() & self.label_files.keys())
        return [{"image": self.image_files[case], "label": self.label_files[case]} for case in both]

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
        return sorted(case_of(record["image"]) for part in parts for record in part)

    def problems(
        self, train_data: Sequence[Record], files_read: Iterable[Record], labels: Sequence[str]
    ) -> list[str]:
        """Say what is wrong with the settings and with the data as a whole.

        Args:
            train_data: the cases to train on; not :attr:`training` where a program put others in their place.
            files_read: the cases whose files will be read.
            labels: the bundle's organs in the order of their label values, from 1.

        Returns:
            One sentence for each problem.
        """
        told = []
        if not (type(self.fold) is int and 0 <= self.fold < self.folds):
            told.append(f"fold: there is no fold {self.fold!r}, they are counted 0 to {self.folds - 1}.")
        if not self._labelled_is_valid:
            told.append(
                f"labelled: {self.labelled!r} is neither a share in (0, 1] nor a number of patients; 10 % is 0.1."
            )
        if not train_data:
            told.append(
                f"dataset_dir: no case to train on in {self.dataset_dir}; it takes images/ beside labels/, or a JSON of "
                "alice datalist."
            )
        if self.records and not self.held_back:
            told.append(f"fold: no case of {self.dataset_dir} is in fold {self.fold!r}.")
        if self.records and self.num_labelled > len(self.candidates):
            told.append(
                f"labelled: {self.labelled!r} patients are asked for, fold {self.fold!r} trains on "
                f"{len(self.candidates)}."
            )
        if unpaired := sorted(self.image_files.keys() ^ self.label_files.keys()):
            told.append(
                f"dataset_dir: image without label, or label without image: {', '.join(unpaired[:5])}; alice datalist "
                "makes a JSON of the pairs."
            )
        if repeated := self._repeated():
            told.append(
                f"dataset_dir: several files of one case: {', '.join(repeated[:5])}; alice datalist tells them apart."
            )
        if misnamed := self._misnamed(labels):
            pairs = ", ".join(f"{value} is {name}" for value, name in misnamed[:5])
            told.append(
                f"labels: {pairs} in {self.dataset_dir}, of which this bundle has another order; give its labels."
            )
        if len({"fold" in record for record in self.records}) == 2:
            told.append("dataset_dir: only some cases of the datalist have a fold.")
        return told + damaged_files(str(path) for r in files_read for path in (r["image"], r["label"]))

    def _repeated(self) -> list[str]:
        """Cases with several images or several labels."""
        found: set[str] = set()
        for folders in (self.image_folders, self.label_folders):
            seen: set[str] = set()
            for case in map(case_of, self._files_in(folders)):
                (found if case in seen else seen).add(case)
        return sorted(found)

    def _misnamed(self, labels: Sequence[str]) -> list[tuple[str, str]]:
        """(value, name) of the datalist's organs that have another value in the bundle.

        The datalist says ``{value: name}``, as ``alice datalist`` and MSD write it, or ``{name: value}``.
        """
        if not self.is_datalist or not os.path.isfile(self.dataset_dir):
            return []
        with open(self.dataset_dir, encoding="utf-8") as file:
            told = json.load(file).get("labels")
        if not isinstance(told, dict):
            return []
        pairs = [(str(k), str(v)) if str(k).isdigit() else (str(v), str(k)) for k, v in told.items()]
        value_of = {name: str(value) for value, name in enumerate(labels, 1)}
        plain = [(value, name, name.lower().replace("_", " ")) for value, name in pairs]
        return [(value, name) for value, name, organ in plain if value_of.get(organ, value) != value]


def case_of(path: str) -> str:
    """Name of a case: FLARE22_Tr_0001_0000.nii.gz, img0001.nii.gz, DET01_avg_seg.nii.gz -> FLARE22_Tr_0001, 0001, DET01."""
    return re.sub(
        "^(img|label)(?=[0-9])|(_avg)?(_seg)?(_0000)?[.]nii([.]gz)?$", "", os.path.basename(str(path))
    )


def patient_of(record: Record) -> str:
    """A case's patient: its own entry, else the case's name."""
    return str(record.get("patient", case_of(record["image"])))
