"""Look at every case before a run begins: read and check it as the run will. So a bad one is known at once, with the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from monai.transforms import Compose

from .cases import leave_out_option
from .checks import CheckFile, CheckLabel, CheckScan
from .layouts import case_name
from .refusals import Refusal, refusal_in

Record = dict[str, Any]


class Examined:
    """The cases of a run, and which of them cannot be used.

    Args:
        records: ``image``, and ``label`` where the run reads one.
        transform: what the run does with each. Its transforms up to the last check are tried.
    """

    def __init__(self, records: Sequence[Record], transform: Any) -> None:
        self.records, self.transform = list(records), transform

    @cached_property
    def refusals(self) -> list[Refusal | None]:
        """Of each case, what is wrong with it; None for those that can be used."""
        steps = list(_flat(self.transform))
        checks = [at for at, step in enumerate(steps) if isinstance(step, (CheckFile, CheckScan, CheckLabel))]
        check = Compose(steps[: max(checks, default=-1) + 1])
        return [_refusal_of(record, check) for record in self.records]

    @cached_property
    def usable(self) -> list[Record]:
        """The cases that can be used."""
        return [r for r, refusal in zip(self.records, self.refusals, strict=True) if refusal is None]

    @property
    def refused(self) -> list[Refusal]:
        """What is wrong with the others."""
        return [refusal for refusal in self.refusals if refusal is not None]

    @property
    def table(self) -> str:
        """A line for each case that cannot be used; the file's name is its end."""
        return "\n".join(f"  {refusal.why}: {refusal.path}" for refusal in self.refused)

    def problems(self) -> list[str]:
        """For a run that needs all of its cases: what is wrong, and how to go on without."""
        if not self.refused:
            return []
        bad = [r["image"] for r, refusal in zip(self.records, self.refusals, strict=True) if refusal]
        return [
            f"dataset_dir: {len(bad)} of {len(self.records)} cases cannot be used. Mend them, or go on without: "
            f"{leave_out_option(map(case_name, bad))}\n{self.table}"
        ]

    def begin(self) -> None:
        """For a run that does without: say which cases it leaves out. The program ends if none is left."""
        if not self.usable:
            sys.exit(f"alice_seg: dataset_dir: none of {len(self.records)} scans can be used:\n{self.table}")
        if self.refused:
            print(
                f"alice_seg: {len(self.usable)} of {len(self.records)} scans follow; left out:\n{self.table}"
            )
            sys.stdout.flush()

    def finish(self) -> None:
        """End the program, not in good order, if cases were left out."""
        if self.refused:
            sys.stdout.flush()
            told = (
                f"{len(self.usable)} of {len(self.records)} scans are done; left out, as they cannot be used:"
            )
            sys.exit(f"alice_seg: {told}\n{self.table}")


def _flat(transform: Any) -> Iterator[Any]:
    """The transforms of nested Composes, in order."""
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from _flat(step)
    else:
        yield transform


def _refusal_of(record: Record, check: Compose) -> Refusal | None:
    try:
        check(dict(record))
    except Exception as error:  # a damaged file makes readers raise almost anything
        return refusal_in(error, str(record["image"]))
    return None
