"""What a computation costs in FLOPs and live bytes: repeatable, and without memory on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs (2 per multiply-add) of matrix products, convolutions and fused attention while ``fn`` runs.

    Whatever ``fn`` recomputes counts again. Works on every device, ``meta`` included.
    """
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def peak_live_bytes(fn: Callable[[], Any]) -> int:
    """Most bytes held at once by the tensors that ``fn`` makes; see :class:`PeakLiveBytes`."""
    with PeakLiveBytes() as meter:
        fn()
    return meter.peak


class PeakLiveBytes(TorchDispatchMode):
    """Follow the storages that are made inside the ``with`` block until they are freed.

    Views share a storage and count once; what existed before (weights, inputs) does not count; scratch
    memory inside one kernel is not seen. ``live`` and ``peak`` are in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, num_bytes)

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes
