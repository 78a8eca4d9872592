"""The teacher follows the student as an exponential moving average of every parameter they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from custom.errors import AliceError


class EMA:
    """``teacher <- momentum * teacher + (1 - momentum) * student``, for all parameters of the teacher.

    Pairs are made once: the teacher's modules are copies of the student's under the same names, and every
    tensor of the teacher must have its partner. Buffers are copied as they are.

    Args:
        teacher: the network that follows.
        student: the network that learns; not wrapped in DDP.

    Raises:
        AliceError: naming a tensor of the teacher that the student lacks, or that has another shape.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self.parameters = _pairs(dict(teacher.named_parameters()), dict(student.named_parameters()))
        self.buffers = _pairs(dict(teacher.named_buffers()), dict(student.named_buffers()))

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step; ``momentum`` in [0, 1]."""
        if not 0.0 <= momentum <= 1.0:
            raise AliceError(f"EMA momentum must be in [0, 1], got {momentum}.")
        ours, theirs = [t for t, _ in self.parameters], [s for _, s in self.parameters]
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
        for ours_, theirs_ in self.buffers:
            ours_.copy_(theirs_)

    @torch.no_grad()
    def drift(self) -> Tensor:
        """``|student - teacher| / |student|`` over all shared parameters, a scalar on their device."""
        ours, theirs = [t for t, _ in self.parameters], [s for _, s in self.parameters]
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(theirs, ours))).norm()
        return apart / torch.stack(torch._foreach_norm(theirs)).norm().clamp(min=1e-12)


def _pairs(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    missing = [name for name in ours if name not in theirs]
    if missing:
        raise AliceError(f"The student has no {', '.join(missing)}: teacher and student differ in structure.")
    unlike = [name for name, tensor in ours.items() if tensor.shape != theirs[name].shape]
    if unlike:
        raise AliceError(f"Teacher and student differ in the shape of {', '.join(unlike)}.")
    return [(tensor.detach(), theirs[name].detach()) for name, tensor in ours.items()]
