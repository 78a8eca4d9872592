"""Seeded folds and few-shot subsets; the scans of a patient always stay together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from custom.errors import AliceError

Record = TypeVar("Record", bound=Mapping[str, Any])


def split_folds(records: Sequence[Record], folds: int = 5, seed: int = 0) -> list[list[Record]]:
    """Deal the patients into folds: each is held back once, with all of its scans.

    Which fold a patient lands in depends on the patients' names and the seed alone, not on the order of
    the list, the machine or the version of any library.

    Args:
        records: dicts with a ``patient`` key; several records may belong to one patient.
        folds: number of folds, at least 2 and at most one per patient.
        seed: chooses another deal.

    Returns:
        ``folds`` lists of records, sorted by patient; their numbers of patients differ by at most one.

    Raises:
        AliceError: if a record has no patient, or there are fewer patients than folds.
    """
    patients = _shuffled_patients(records, f"folds {seed}")
    if not 2 <= folds <= len(patients):
        raise AliceError(
            f"Cannot deal {len(patients)} patient(s) into {folds} folds; take 2 to one per patient."
        )
    return [_records_of(patients[fold::folds], records) for fold in range(folds)]


def few_shot(records: Sequence[Record], amount: int | float, seed: int = 0) -> list[Record]:
    """Keep a few patients, nested: with one seed, a smaller subset is part of every larger one.

    Args:
        records: dicts with a ``patient`` key.
        amount: an int is a number of patients; a float is a share of them in (0, 1], rounded to the nearest
            number and at least one. So ``1`` is one patient and ``1.0`` is everybody.
        seed: chooses another subset; independent of the deal of :func:`split_folds`.

    Returns:
        The records of the chosen patients, sorted by patient.

    Raises:
        AliceError: if the amount is out of range, or a record has no patient.
    """
    patients = few_shot_order(records, seed)
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise AliceError(f"The amount must be a number of patients or a share of them, got {amount!r}.")
    if isinstance(amount, float):
        if not 0.0 < amount <= 1.0:
            raise AliceError(
                f"A share of patients must be in (0, 1], got {amount}; 10 % is 0.1, ten patients are 10."
            )
        amount = max(1, int(amount * len(patients) + 0.5))
    if not 1 <= amount <= len(patients):
        raise AliceError(f"Cannot choose {amount} of {len(patients)} patient(s); take 1 to {len(patients)}.")
    return _records_of(patients[:amount], records)


def few_shot_order(records: Sequence[Record], seed: int = 0) -> list[str]:
    """The patients in the order in which :func:`few_shot` takes them."""
    return _shuffled_patients(records, f"few-shot {seed}")


def _shuffled_patients(records: Sequence[Mapping[str, Any]], salt: str) -> list[str]:
    """Each patient once, sorted by sha256 of salt and name, so that nothing else decides the order."""
    patients = {_patient(record, index) for index, record in enumerate(records)}
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{salt}\0{patient}".encode()).digest())


def _records_of(patients: Sequence[str], records: Sequence[Record]) -> list[Record]:
    """The records of these patients; sorted, so that the order of the list does not matter."""
    chosen = set(patients)
    kept = [record for index, record in enumerate(records) if _patient(record, index) in chosen]
    return sorted(
        kept,
        key=lambda record: (str(record["patient"]), json.dumps(dict(record), sort_keys=True, default=str)),
    )


def _patient(record: Mapping[str, Any], index: int) -> str:
    patient = record.get("patient")
    if patient is None or str(patient) == "":
        raise AliceError(
            f"Record {index} names no patient ({dict(record)}); give every record a 'patient', "
            "or two scans of one person may end up on both sides of a split."
        )
    return str(patient)
