"""What one training step holds and computes, on the meta device: no memory is needed, whatever the crop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from custom.engine.cost import PeakLiveBytes

META = torch.device("meta")


@dataclass(frozen=True)
class StepModel:
    """Bytes and FLOPs of one process.

    Attributes:
        weights: of the student, its buffers, and the loss.
        teacher: of the EMA copy.
        moments: of the optimizer.
        transient: most that a step holds besides: crops, views, activations and gradients.
        gradients: the part of ``transient`` that the gradients are.
        flops: of one optimizer step (2 per multiply-add).
    """

    weights: int
    teacher: int
    moments: int
    transient: int
    gradients: int
    flops: int

    @property
    def total(self) -> int:
        """Most bytes held at once."""
        return self.weights + self.teacher + self.moments + self.transient

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, teacher and moments."""
        return self.weights + self.teacher + self.moments


@dataclass
class StepParts:
    """The objects of a step, on the meta device.

    Attributes:
        student, teacher, loss: as the trainer gets them.
        make_optimizer: makes the optimizer over the student's parameters.
        view: the teacher's augmentation, None for none.
        masking: draws masks from seeds and a grid of units.
        crop_size: voxels along x, y, z.
        pairs: a step and process.
        accumulate: a step is worked on in this many parts.
        bf16: autocast to bfloat16.
    """

    student: Any
    teacher: Any
    loss: Any
    make_optimizer: Callable[[], torch.optim.Optimizer]
    view: Any
    masking: Callable[[Tensor, Sequence[int]], Tensor]
    crop_size: tuple[int, int, int]
    pairs: int
    accumulate: int = 1
    bf16: bool = False


def model_step(parts: StepParts) -> StepModel:
    """Meter one and two pairs, and go on in a straight line to a part of the batch.

    What a kernel needs inside itself, and what an allocator keeps in reserve, is not seen; on a GPU add some per cent.
    """
    part = max(1, parts.pairs // parts.accumulate)
    one_peak, one_flops = _meter(parts, 1)
    peak, flops = one_peak, one_flops
    if part > 1:
        two_peak, two_flops = _meter(parts, 2)
        peak += (part - 1) * (two_peak - one_peak)
        flops += (part - 1) * (two_flops - one_flops)
    trained = [p for p in parts.student.parameters() if p.requires_grad]
    gradients = _bytes(p.grad for p in trained if p.grad is not None)
    optimizer = parts.make_optimizer()
    optimizer.step()
    moments = _bytes(
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()
    )
    parts.student.zero_grad(set_to_none=True)
    if parts.accumulate > 1:  # the first part's gradients are there while the second is worked on
        peak += gradients
    weights = _bytes([*parts.student.state_dict().values(), *parts.loss.state_dict().values()])
    return StepModel(
        weights,
        _bytes(parts.teacher.state_dict().values()),
        moments,
        peak,
        gradients,
        flops * parts.accumulate,
    )


def _meter(parts: StepParts, pairs: int) -> tuple[int, int]:
    """Peak live bytes and FLOPs of forward and backward on some pairs."""
    seeds = torch.arange(2 * pairs)
    hidden = parts.masking(seeds, parts.student.encoder.units(parts.crop_size))
    view = None
    if parts.view is not None:
        view = _on_meta(parts.view)
    parts.student.zero_grad(set_to_none=True)
    fused = Fused(parts.bf16)
    with FlopCounterMode(display=False) as counter, PeakLiveBytes() as meter:
        halves = [torch.empty(pairs, 1, *parts.crop_size, device=META) for _ in range(2)]
        crop = torch.cat(halves)
        with torch.no_grad():
            intact = crop if view is None else view(crop, seeds)
        with fused:
            target = parts.teacher(intact)
            output = parts.student(crop, hidden, target, parts.teacher.casa)
        terms = parts.loss(output, crop, hidden, 0, 1.0)
        terms["total"].backward()
    return meter.peak, counter.get_total_flops() + fused.flops


def _on_meta(view: Any) -> Any:
    """A view whose noise needs no generator, of which the meta device has none."""
    twin = copy.copy(view)
    twin._noise = lambda seed, like: torch.empty_like(like)
    return twin


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


# -- what devices do otherwise than the meta device -----------------------------------------------------------

_LOW = {
    F.linear,
    F.conv3d,
    F.conv_transpose3d,
    torch.conv3d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.einsum,
}
_HIGH = {
    F.layer_norm,
    torch.layer_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.log_softmax,
    F.cosine_similarity,
    F.normalize,
    F.mse_loss,
}


class Fused(TorchFunctionMode):
    """Attention in one kernel, as CPUs and GPUs compute it; with ``bf16`` also what autocast casts.

    Attributes:
        flops: of the attention that was seen, backward included.
    """

    def __init__(self, bf16: bool = False) -> None:
        super().__init__()
        self.bf16, self.flops = bf16, 0
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.bf16 and func in _LOW:
            return func(*(self._cast(a) for a in args), **{k: self._cast(v) for k, v in kwargs.items()})
        if self.bf16 and func in _HIGH:
            return func(*(_raise(a) for a in args), **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if self.bf16:
            query, key, value = self._cast(query), self._cast(key), self._cast(value)
        # 2 products forward; backward computes the scores again, then 4 more (flash attention)
        times = 3.5 if query.requires_grad else 1
        self.flops += int(times * 4 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1])
        if attn_mask is not None and attn_mask.requires_grad:  # a bias that learns needs the whole matrix
            scores = query @ key.transpose(-1, -2) + attn_mask.to(query.dtype)
            return torch.softmax(scores, -1) @ value
        return _Attention.apply(query, key, value)

    def _cast(self, value: Any) -> Any:
        """To bfloat16; a weight is cast once and kept, as autocast keeps it."""
        if not isinstance(value, Tensor) or value.dtype is not torch.float32 or value.device != META:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(torch.bfloat16)
        return self._copies[id(value)]

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: it keeps its inputs and its output, never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
