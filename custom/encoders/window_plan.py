"""Who attends to whom: window attention of MONAI's Swin over any set of visible boxes, as index arrays.

A *box* is a brick of tokens that is wholly visible: a mask unit, or the whole crop when nothing is hidden.
MONAI's blocks cut the token grid into windows, shift it, pad it with zeros up to whole windows, and forbid
attention between the regions that the shift brought together. All of this only decides which tokens share a
group: those of one sample, one window and one region. Here the groups are listed once for each mask, in
numpy. The network then needs one gather, one batched attention for each group length, and one gather back.

Two facts make the result exact. First, MONAI pads *after* the norm. So every padded token has the bias of
``qkv`` as its key and value, and real tokens do attend to it. The padded keys of a group differ only in their
position bias, so they act as ONE virtual key, whose bias is the logsumexp of theirs. Second, MONAI looks up
position biases by a token's *slot*, its number within the window, even if the window shrank to a small grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom.encoders.masking import visible_index
from custom.errors import AliceError

NUM_STAGES = 4  # MONAI's SwinTransformer always has four
MAX_LENGTHS = 6  # ours: 4 to 12 padded lengths take the same time, one takes 2.2 times as long
NUM_REGIONS = 27  # a shift leaves up to three regions along each axis

IntArray = NDArray[np.integer[Any]]


class Bucket(NamedTuple):
    """Groups that are padded to one length and attend in one batch."""

    num_groups: int
    length: int
    whole: bool  # every group holds every slot of its window, in order: one bias serves all


class Layout(NamedTuple):
    """The sizes of a :class:`WindowPlan`."""

    num_slots: int  # tokens in a window, n
    num_tokens: int  # T, over all samples of the plan
    num_patterns: int  # P, different sets of padded slots
    buckets: tuple[Bucket, ...]

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Lengths of gather, slots, restore and padded, in this order."""
        num_places = sum(bucket.num_groups * bucket.length for bucket in self.buckets)
        return num_places, num_places, self.num_tokens, self.num_patterns * self.num_slots


class WindowPlan(NamedTuple):
    """One kind of block (shifted or not) at one stage; every tensor is int32.

    Places are the rows of all buckets, one after the other: a bucket of G groups of length L has G * L.
    """

    layout: Layout
    gather: Tensor  # (places,) the token at each place; T stands for the virtual token
    slots: Tensor  # (places,) its slot; n + p: the virtual key of padding pattern p; n + P: a filler
    restore: Tensor  # (T,) the place of each token
    padded: Tensor  # (P, n) 1 where a slot is padding


@dataclass(frozen=True)
class SwinPlan:
    """All window attention of one forward pass. It pickles, so a loader's worker can make it.

    The integers of all its parts lie in one tensor, so that moving a plan is one copy.
    """

    index: Tensor  # int32, the units and then the parts of every window plan
    layouts: tuple[tuple[Layout, Layout], ...]  # per stage: not shifted, shifted
    grid: tuple[int, int, int]  # boxes along x, y, z
    num_samples: int  # 1 where one plan serves every sample, as when nothing is hidden
    num_visible: int  # boxes per sample

    @property
    def units(self) -> Tensor:
        """The visible boxes, int32 (B, num_visible), ascending in flattened grid order."""
        return self.index[: self.num_samples * self.num_visible].view(self.num_samples, self.num_visible)

    @property
    def stages(self) -> list[tuple[WindowPlan, WindowPlan]]:
        """Per stage, the plans of blocks that do not shift and of blocks that do (views, no copies)."""
        kinds = [layout for pair in self.layouts for layout in pair]
        sizes = [size for kind in kinds for size in kind.parts]
        parts = iter(self.index[self.units.numel() :].split(sizes))
        plans = [
            WindowPlan(kind, next(parts), next(parts), next(parts), next(parts).view(-1, kind.num_slots))
            for kind in kinds
        ]
        return list(zip(plans[0::2], plans[1::2], strict=True))

    def pin_memory(self) -> SwinPlan:
        """A copy in page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        return replace(self, index=self.index.pin_memory())

    def to(self, device: torch.device | str) -> SwinPlan:
        """Move to ``device`` in one copy that the host does not wait for."""
        device = torch.device(device)
        if self.index.device == device:
            return self
        from_host = device.type == "cuda" and self.index.device.type == "cpu"
        plan = self.pin_memory() if from_host and not self.index.is_pinned() else self
        return replace(self, index=plan.index.to(device, non_blocking=True))


@torch.compiler.disable  # numpy, and shapes that change with every mask
def plan_for(hidden: Tensor, settings: Mapping[str, Any]) -> SwinPlan:
    """Plan a pass over the visible units; meant for a loader's collate function.

    Args:
        hidden: bool (B, ux, uy, uz) over units of 16 patches (32 voxels for patch 2), on the CPU.
        settings: those of the encoder (``MaskedSwin.settings``); ``window_size`` and ``patch_size`` are read.

    Returns:
        A plan on the CPU, for ``MaskedSwin.forward(x, plan=plan)``.

    Raises:
        AliceError: if ``hidden`` is not bool (B, ux, uy, uz), if samples hide different numbers of units, or
            if a sample hides all of them.
    """
    if hidden.dtype != torch.bool or hidden.ndim != 4:
        raise AliceError(
            f"hidden must be bool (B, ux, uy, uz), got {hidden.dtype} {tuple(hidden.shape)}: "
            "draw it with hide_tokens(batch_size, grid_of_units, ratio)."
        )
    ux, uy, uz = hidden.shape[1:]
    units = visible_index(hidden.flatten(1)).numpy()
    side = 2**NUM_STAGES  # a unit is 16, 8, 4, 2 tokens wide at the four stages
    boxes = [(side >> stage,) * 3 for stage in range(NUM_STAGES)]
    return _plan(units, (ux, uy, uz), boxes, tuple(settings["window_size"]))


@functools.lru_cache(maxsize=16)
def dense_plan(sides: tuple[int, ...], patch_size: int, window_size: tuple[int, ...]) -> SwinPlan:
    """Plan a pass over a whole crop of ``sides`` voxels, of any size, as one box; cached."""
    boxes = [tuple(math.ceil(side / patch_size) for side in sides)]
    while len(boxes) < NUM_STAGES:
        boxes.append(tuple(math.ceil(side / 2) for side in boxes[-1]))  # MONAI pads odd grids before merging
    return _plan(np.zeros((1, 1), np.int64), (1, 1, 1), boxes, window_size)


@torch.compiler.disable
@functools.lru_cache(maxsize=16)
def dense_plan_on(
    device: torch.device, sides: tuple[int, ...], patch_size: int, window_size: tuple[int, ...]
) -> SwinPlan:
    """:func:`dense_plan`, kept on ``device``."""
    with torch.inference_mode(False):  # else a plan made for inference would be useless in training
        return dense_plan(sides, patch_size, window_size).to(device)


def _plan(
    units: IntArray, grid: tuple[int, int, int], boxes: Sequence[tuple[int, ...]], window: tuple[int, ...]
) -> SwinPlan:
    """Visible boxes ``units`` (B, V) of ``grid``, of ``boxes[stage]`` tokens each, as a :class:`SwinPlan`."""
    origins = np.stack(np.unravel_index(units, grid), axis=-1)  # (B, V, 3), in boxes
    parts: list[IntArray] = [units.reshape(-1)]
    layouts = []
    for box in boxes:
        dims = tuple(count * side for count, side in zip(grid, box, strict=True))
        coordinates = origins[:, :, None] * np.array(box) + _lattice(box)  # (B, V, tokens of a box, 3)
        pair = []
        for shifted in (False, True):
            axes = tuple(_axis(dim, size, shifted) for dim, size in zip(dims, window, strict=True))
            layout, arrays = _plan_windows(coordinates.reshape(len(units), -1, 3), axes)
            pair.append(layout)
            parts.extend(arrays)
        layouts.append((pair[0], pair[1]))
    with torch.inference_mode(False):  # a cached plan must work in training as well
        index = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
    return SwinPlan(index, tuple(layouts), grid, *units.shape)


class _Axis(NamedTuple):
    """How MONAI cuts one axis of the token grid (``get_window_size`` and the padding after it)."""

    dim: int  # tokens
    window: int  # tokens in a window, no more than there are
    shift: int
    padded: int  # tokens after padding to whole windows


def _axis(dim: int, window: int, shifted: bool) -> _Axis:
    if dim <= window:
        return _Axis(dim, dim, 0, dim)
    return _Axis(dim, window, window // 2 if shifted else 0, math.ceil(dim / window) * window)


def _lattice(dims: Sequence[int]) -> IntArray:
    """All coordinates of a brick, (product of dims, 3), in flattened order."""
    return np.stack(np.unravel_index(np.arange(math.prod(dims)), tuple(dims)), axis=-1)


def _place(coordinates: IntArray, axes: Sequence[_Axis]) -> tuple[IntArray, IntArray]:
    """Window and region as one number, and the slot, of each of ``coordinates`` (..., 3)."""
    window = region = slot = np.zeros(coordinates.shape[:-1], np.int64)
    for axis, (_, size, shift, padded) in enumerate(axes):
        position = (coordinates[..., axis] - shift) % padded  # torch.roll by -shift
        window = window * (padded // size) + position // size
        slot = slot * size + position % size
        region = region * 3
        if shift:  # the slices of MONAI's compute_mask
            region = region + (position >= padded - size) + (position >= padded - shift)
    return window * NUM_REGIONS + region, slot


@functools.lru_cache(maxsize=64)
def _padding(axes: tuple[_Axis, ...]) -> tuple[IntArray, IntArray]:
    """Padding of every group: its pattern or -1, and the patterns, int (P, n), 1 where a slot is padded."""
    num_slots = math.prod(axis.window for axis in axes)
    num_groups = math.prod(axis.padded // axis.window for axis in axes) * NUM_REGIONS
    lattice = _lattice([axis.padded for axis in axes])
    group, slot = _place(lattice[(lattice >= [axis.dim for axis in axes]).any(axis=1)], axes)
    groups, row = np.unique(group, return_inverse=True)
    padded = np.zeros((len(groups), num_slots), np.int64)
    padded[row, slot] = 1
    patterns, pattern = np.unique(padded, axis=0, return_inverse=True)
    pattern_of_group = np.full(num_groups, -1)
    pattern_of_group[groups] = pattern.reshape(-1)  # numpy 2.0 alone returns a column
    return pattern_of_group, patterns


def _plan_windows(coordinates: IntArray, axes: tuple[_Axis, ...]) -> tuple[Layout, list[IntArray]]:
    """Tokens at ``coordinates`` (B, N, 3) as the layout and the arrays of a :class:`WindowPlan`."""
    pattern_of_group, patterns = _padding(axes)
    num_slots, num_patterns = math.prod(axis.window for axis in axes), len(patterns)
    num_samples, num_tokens = coordinates.shape[0], coordinates.shape[0] * coordinates.shape[1]

    group, slot = _place(coordinates, axes)
    group = group + np.arange(num_samples)[:, None] * len(pattern_of_group)
    group, slot = group.reshape(-1), slot.reshape(-1)
    order = np.argsort(group * num_slots + slot)  # no two tokens share a slot, so the order is unique
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    counts = np.diff(starts, append=num_tokens)
    pattern = pattern_of_group[group[order][starts] % len(pattern_of_group)]
    lengths = counts + (pattern >= 0)  # the virtual key takes one place

    buckets, gathers, slot_lists, offset = [], [], [], 0
    restore = np.empty(num_tokens, np.int64)
    for chosen, length, whole in _sort_into_buckets(counts, lengths, num_slots):
        column = np.arange(length)
        count = counts[chosen][:, None]
        real = column < count  # (groups, length)
        token = order[starts[chosen][:, None] + np.minimum(column, count - 1)]
        gathers.append(np.where(real, token, num_tokens).reshape(-1))
        slots = np.where(real, slot[token], num_slots + num_patterns)
        has_padding = np.flatnonzero(pattern[chosen] >= 0)
        slots[has_padding, counts[chosen][has_padding]] = num_slots + pattern[chosen][has_padding]
        slot_lists.append(slots.reshape(-1))
        restore[token[real]] = offset + np.flatnonzero(real)
        offset += real.size
        buckets.append(Bucket(len(chosen), length, whole))

    arrays = [np.concatenate(gathers), np.concatenate(slot_lists), restore, patterns.reshape(-1)]
    return Layout(num_slots, num_tokens, num_patterns, tuple(buckets)), arrays


def _sort_into_buckets(
    counts: IntArray, lengths: IntArray, num_slots: int
) -> list[tuple[IntArray, int, bool]]:
    """Groups of each bucket, its length, and whether they are whole windows."""
    whole = (counts == num_slots) & (lengths == num_slots)
    buckets = [(np.flatnonzero(whole), num_slots, True)]
    shorter = 0
    for length in bucket_lengths(lengths[~whole], MAX_LENGTHS):
        chosen = ~whole & (lengths > shorter) & (lengths <= length)
        buckets.append((np.flatnonzero(chosen), length, False))
        shorter = length
    return [bucket for bucket in buckets if len(bucket[0])]


def bucket_lengths(lengths: IntArray, max_lengths: int) -> list[int]:
    """Pad ``lengths`` to at most ``max_lengths`` different values, with the smallest possible sum of squares.

    Returns:
        The padded lengths, ascending; each of ``lengths`` is padded to the first that is not smaller.
    """
    sizes, repeats = np.unique(lengths, return_counts=True)
    num_sizes = len(sizes)
    below = np.concatenate([[0], np.cumsum(repeats)])  # groups among the first j sizes
    # padded[i, j]: squares of a bucket of sizes i to j - 1, all padded to sizes[j - 1]
    padded = np.full((num_sizes + 1, num_sizes + 1), np.inf)
    for end in range(1, num_sizes + 1):
        padded[:end, end] = (below[end] - below[:end]) * float(sizes[end - 1]) ** 2

    cost = np.where(below == 0, 0.0, np.inf)  # of the first j sizes in no bucket at all
    choices: list[IntArray] = []
    for _ in range(min(max_lengths, num_sizes)):
        total = cost[:, None] + padded
        choices.append(total.argmin(axis=0))
        cost = total.min(axis=0)

    edges, end = [], num_sizes
    for choice in reversed(choices):
        edges.append(int(sizes[end - 1]))
        end = int(choice[end])
    return edges[::-1]
