"""The records of a store's volumes, kept as bytes that the workers of a loader share."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from custom.errors import AliceError


@dataclass
class VolumeRecord:
    """What the index says about one volume."""

    name: str
    patient: str
    shape: list[int]  # voxels along x, y, z
    affine: list[list[float]]  # voxel to world, RAS mm
    body_box: list[list[int]]  # first and one-past-last voxel of the body along x, y, z
    body_step: list[int]  # voxels per cell of the body mask
    source: str
    source_sha256: str
    voxels_sha256: str
    label_sha256: str | None = None
    labels: list[int] = field(default_factory=list)
    source_stamp: dict[str, int] = field(default_factory=dict)  # size and mtime_ns
    crop_start: list[int] = field(
        default_factory=lambda: [0, 0, 0]
    )  # first voxel of the volume in the uncut scan
    scaling: dict[str, float] = field(
        default_factory=dict
    )  # stored = (value - offset) * scale; of profiles but ct

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or len(self.affine) != 4:
            raise AliceError(f"volume {self.name!r} has shape {self.shape} and affine {self.affine}")


class Records(Mapping[str, VolumeRecord]):
    """Name -> record, in the order of names. A record is decoded when it is asked for; do not change it.

    A loader sends its dataset to every worker, and PyTorch sends tensors through shared memory. So a worker of a run over
    100,000 scans starts at once, and needs no memory for their records.

    Args:
        index: name -> fields of a :class:`VolumeRecord`.

    Raises:
        AliceError: if a record is not one of a volume.
        TypeError: if a record has other fields.
    """

    def __init__(self, index: Mapping[str, Mapping[str, Any]]) -> None:
        names, patients, content = sorted(index), [], []
        for name in names:
            record = VolumeRecord(**index[name])
            patients.append(record.patient)
            content.append(pickle.dumps(record))
        ends = np.cumsum([0, *map(len, content)])
        self.__setstate__(
            (pack(names), pack(patients), _as_tensor(b"".join(content)), torch.from_numpy(ends))
        )

    def __getstate__(self) -> tuple[Tensor, ...]:
        return self._state

    def __setstate__(self, state: tuple[Tensor, ...]) -> None:
        self._state = state
        self.names, self._patients = unpack(state[0]), unpack(state[1])
        self._place = {name: i for i, name in enumerate(self.names)}
        self._decode = functools.lru_cache(maxsize=64)(self._decoded)

    def __getitem__(self, name: str) -> VolumeRecord:
        return self._decode(self._place[name])

    def _decoded(self, i: int) -> VolumeRecord:
        content, ends = self._state[2].numpy(), self._state[3].numpy()  # they move when they are first shared
        record: VolumeRecord = pickle.loads(content[ends[i] : ends[i + 1]])  # our own bytes
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def patient(self, name: str) -> str:
        """The patient of a volume, without decoding its record."""
        return self._patients[self._place[name]]


def pack(texts: Sequence[str]) -> Tensor:
    """Texts as a tensor of bytes, which PyTorch sends to workers through shared memory.

    Keep the tensor: its memory must be there until the worker has begun.
    """
    return _as_tensor(json.dumps(list(texts)).encode())


def unpack(packed: Tensor) -> list[str]:
    """What :func:`pack` was given."""
    texts: list[str] = json.loads(packed.numpy().tobytes())
    return texts


def _as_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
