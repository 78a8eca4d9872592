"""Quarantine: damaged scans that a run meets are set aside, counted over all workers, and reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

from custom.data.errors import DamagedScan, StoreError
from custom.data.store.records import pack, unpack
from custom.errors import AliceError, shown
from custom.files import read_json, write_text
from custom.processes import names_of_all, rank

logger = logging.getLogger(__name__)


class Quarantine:
    """The damaged scans of a run, in memory that the workers of a loader share.

    The worker that first needs a scan verifies all of it. So a scan is damaged for every pair or for none, and what is
    drawn in its place depends only on the store.

    Args:
        names: of the run's scans.
        allowed: number of scans that may be damaged; one more stops the run.
    """

    def __init__(self, names: Sequence[str], allowed: int = 0) -> None:
        if allowed < 0:
            raise AliceError(f"bad_scans_allowed must be at least 0, got {allowed}.")
        self._packed = pack(sorted(set(names)))
        self._index = {name: i for i, name in enumerate(unpack(self._packed))}
        self.allowed = allowed
        self._damaged = torch.zeros(len(self._index), dtype=torch.bool).share_memory_()
        self._whole = torch.zeros(len(self._index), dtype=torch.bool).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = {name: i for i, name in enumerate(unpack(self._packed))}

    @property
    def names(self) -> list[str]:
        """The damaged scans that this process or one of its workers has met."""
        flags = self._damaged.tolist()
        return [name for name, i in self._index.items() if flags[i]]

    def examine(self, name: str, verify: Callable[[str], None]) -> None:
        """Refuse a scan that is damaged anywhere.

        Args:
            name: of the scan.
            verify: reads all of it and raises ``DamagedScan``. A scan that passed is not verified again.

        Raises:
            DamagedScan: if the scan is damaged, or was found damaged before.
        """
        i = self._index[name]
        if self._damaged[i]:
            raise DamagedScan(f"{name} was set aside as damaged.", name)
        if not self._whole[i]:
            verify(name)
            self._whole[i] = True

    def add(self, error: DamagedScan) -> None:
        """Set a scan aside.

        Raises:
            StoreError: if more scans are damaged than allowed.
        """
        if error.scan not in self._index:
            raise error
        known = bool(self._damaged[self._index[error.scan]])
        self._damaged[self._index[error.scan]] = True
        if not known:
            logger.warning("Quarantined %s: %s", shown(error.scan), shown(error))
        refuse_more(self.names, self.allowed, str(error))


def refuse_more(names: Sequence[str], allowed: int, latest: str = "") -> None:
    """Stop a run that has more damaged scans than allowed.

    Raises:
        StoreError: naming the scans.
    """
    if len(names) > allowed:
        raise StoreError(
            f"{len(names)} damaged scan(s) ({', '.join(names[:5])}), {allowed} allowed: {latest} Delete the damaged "
            f"files and build the store again (alice build --check STORE names them all), or set bad_scans_allowed "
            f"to {len(names)}."
        )


class QuarantineLog:
    """Report the damaged scans of all processes in ``quarantine.json`` in the run's folder, and their number in its log.

    Args:
        quarantine: of the run's dataset.
        folder: of the run.
        every: number of steps between two reports.
    """

    def __init__(self, quarantine: Quarantine, folder: str | Path, every: int = 100) -> None:
        self.quarantine, self.path, self.every = quarantine, Path(folder) / "quarantine.json", max(every, 1)
        self._told: list[str] = []

    def attach(self, engine: Any) -> None:
        """Add the handlers to a trainer. All processes report at the same steps."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._look)
        engine.add_event_handler(Events.COMPLETED, self._look)

    def _start(self, engine: Any) -> None:
        if self.path.is_file():  # this run continues an earlier one
            self._told = list(read_json(self.path, advice="Delete it to go on.")["scans"])

    def _look(self, engine: Any) -> None:
        met = names_of_all(self.quarantine.names)
        found = sorted({*met, *self._told})
        if found != self._told:
            self._told = found
            if rank() == 0:
                content = {"scans": found, "step": engine.state.iteration, "allowed": self.quarantine.allowed}
                write_text(self.path, json.dumps(content, indent=1))
                logger.warning("%d damaged scan(s) set aside, see %s", len(found), self.path)
        if hasattr(engine, "report") and found:
            engine.report({"quarantined": float(len(found))})
        refuse_more(met, self.quarantine.allowed)
