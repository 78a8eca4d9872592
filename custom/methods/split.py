"""Which patients a run trains on, and which it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from custom.data.store.volume_store import VolumeStore


def hold_back(store: VolumeStore, patients: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split volumes by patient: names to train on, names to measure on.

    Scans with labels are held back first, since they measure more. At least two patients stay for training.
    """
    everyone = sorted({store.patient(name) for name in store.names})
    labelled = {store.patient(name) for name in store.names if store.has_label(name)}
    order = np.random.default_rng([seed, 7]).permutation(len(everyone))
    ranked = sorted((everyone[i] for i in order), key=lambda patient: patient not in labelled)
    held = set(ranked[: max(0, min(patients, len(everyone) - 2))])
    train = [name for name in store.names if store.patient(name) not in held]
    return train, [name for name in store.names if store.patient(name) in held]


def digest_of_names(names: Sequence[str]) -> str:
    """A sha256 that stands for a set of scans without naming them."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
