"""Does a frozen encoder know parts and wholes? Composition, decomposition and retrieval of boxes (ACE's protocols, in 3D)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.errors import AliceError
from custom.evaluation.probe import Features, Figure, Volumes, crop_of
from custom.evaluation.statistics.significance import bootstrap_interval

BATCH = 32  # boxes among which the right one is looked for (ACE)


class Boxes(NamedTuple):
    """What is shown to an encoder: n crops, and a box in each. All are (n, 1, X, Y, Z) in [0, 1]."""

    whole: Tensor
    parts: Tensor  # (n, 8, 1, X, Y, Z): the crop's eight octants, each enlarged to the crop's size
    without: Tensor  # the crop with air in its box
    box: Tensor  # the box, enlarged to the crop's size
    patients: list[str]


class PartsProbe:
    """How well parts and wholes fit together in the mean tokens of an encoder.

    Composition: the cosine of a crop's mean token with the mean of those of its eight octants. A high cosine proves little, so
    the mean cosine with the octants of other patients' crops stands beside it. Decomposition: what a crop's mean token
    loses when a box in it is made air must be most like the box's own mean token, among the boxes of a batch.
    Retrieval: the crop's mean token itself must be so.

    Args:
        store: where scans are read.
        names: scans of at least two patients; crops are taken from them in turn.
        crop_size, window_hu: as in training; sides must be even.
        boxes: how many crops; a multiple of ``batch``.
        batch: boxes among which the right one is looked for.
        seed: of the places.
        device: where the encoder runs.

    Raises:
        AliceError: for settings out of range, or scans of one patient alone.
    """

    def __init__(
        self,
        store: Volumes,
        names: Sequence[str],
        crop_size: Sequence[int],
        window_hu: Sequence[float],
        boxes: int = 64,
        batch: int = BATCH,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 2 or boxes < batch or boxes % batch:
            raise AliceError(
                f"boxes must be a multiple of batch, and batch 2 or more; got {boxes} and {batch}."
            )
        if any(side % 2 for side in crop_size):
            raise AliceError(
                f"crop_size must be even along all axes to be split in eight, got {list(crop_size)}."
            )
        if len({store.patient(name) for name in names}) < 2:
            raise AliceError(f"{list(names) or 'No scan'}: parts and wholes need scans of two patients.")
        self.store, self.names, self.crop_size, self.window_hu = (
            store,
            list(names),
            list(crop_size),
            window_hu,
        )
        self.boxes, self.batch, self.seed, self.device = boxes, batch, seed, device

    @torch.no_grad()
    def measure(self, encoder: nn.Module | Features, intervals: bool = True) -> dict[str, Figure]:
        """Numbers of an encoder, a module that gives ``tokens`` or a function of crops.

        Returns:
            ``composition``, ``mismatched``, ``decomposition``, ``retrieval``, with 95 % intervals over patients; ``chance``
            of the last two.
        """
        training = isinstance(encoder, nn.Module) and encoder.training
        if isinstance(encoder, nn.Module):
            encoder.eval()
        found = [self._batch(encoder, first) for first in range(0, self.boxes, self.batch)]
        if isinstance(encoder, nn.Module):
            encoder.train(training)
        patients = list(itertools.chain.from_iterable(owners for _, owners in found))
        figures = {
            name: _figure(torch.cat([values[name] for values, _ in found]), patients, intervals)
            for name in found[0][0]
        }
        return figures | {"chance": Figure(1 / self.batch)}

    def _batch(self, encoder: nn.Module | Features, first: int) -> tuple[dict[str, Tensor], list[str]]:
        """Values of each box of a batch."""
        shown = self.cut(range(first, first + self.batch))

        def mean_token(crops: Tensor) -> Tensor:
            found = encoder(crops.to(self.device))
            return getattr(found, "tokens", found).mean(dim=1).float().cpu()

        whole, without, box = (mean_token(crops) for crops in (shown.whole, shown.without, shown.box))
        parts = torch.stack([mean_token(shown.parts[:, i]) for i in range(8)]).mean(dim=0)
        right = torch.arange(self.batch)
        boxes, codes = (
            F.normalize(box, dim=-1),
            torch.tensor([sorted(set(shown.patients)).index(p) for p in shown.patients]),
        )
        cosines = F.normalize(whole, dim=-1) @ F.normalize(parts, dim=-1).T
        others = (codes[:, None] != codes).float()
        values = {
            "composition": cosines.diagonal(),
            "mismatched": (cosines * others).sum(dim=1)
            / others.sum(dim=1),  # nan: this batch shows one patient alone
            "decomposition": (F.normalize(whole - without, dim=-1) @ boxes.T).argmax(dim=1) == right,
            "retrieval": (F.normalize(whole, dim=-1) @ boxes.T).argmax(dim=1) == right,
        }
        return {name: value.float() for name, value in values.items()}, shown.patients

    def cut(self, numbers: Sequence[int]) -> Boxes:
        """The crops and boxes of these numbers; each is a function of its number and the seed."""
        whole, parts, without, box, patients = [], [], [], [], []
        half = [side // 2 for side in self.crop_size]
        for number in numbers:
            rng = np.random.default_rng([self.seed, number])
            name = self.names[number % len(self.names)]
            voxels = self.store.body_voxels(name)
            start = voxels[rng.integers(len(voxels))] - np.array(half)
            crop = crop_of(self.store, name, start, self.crop_size, self.window_hu)
            octants = itertools.product(*((slice(0, h), slice(h, None)) for h in half))
            sides = [max(1, round(float(rng.uniform(0.3, 0.8)) * side)) for side in self.crop_size]
            corner = [
                int(rng.integers(side - own + 1)) for side, own in zip(self.crop_size, sides, strict=True)
            ]
            place = (slice(None), *(slice(c, c + own) for c, own in zip(corner, sides, strict=True)))
            hole = crop.clone()
            hole[place] = 0.0
            whole.append(crop)
            parts.append(torch.stack([self._enlarged(crop[(slice(None), *octant)]) for octant in octants]))
            without.append(hole)
            box.append(self._enlarged(crop[place]))
            patients.append(self.store.patient(name))
        return Boxes(torch.stack(whole), torch.stack(parts), torch.stack(without), torch.stack(box), patients)

    def _enlarged(self, part: Tensor) -> Tensor:
        """A part (1, x, y, z) at the crop's size."""
        return F.interpolate(part[None], size=self.crop_size, mode="trilinear", align_corners=False)[0]


def _figure(values: Tensor, patients: Sequence[str], intervals: bool) -> Figure:
    """Mean over boxes; the interval is that of the patients' means."""
    mean = float(values.nanmean())
    if not intervals:
        return Figure(mean)
    owners = np.array(patients)
    each = [float(np.nanmean(values.numpy()[owners == who])) for who in sorted(set(patients))]
    found = bootstrap_interval(each)
    return Figure(mean, found.low, found.high)
