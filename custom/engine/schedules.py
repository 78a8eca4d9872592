"""Schedules: functions of the step, so that a resumed run needs no state for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.data import DataLoader


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, final: float = 0.0) -> float:
    """Linear from 0 to ``peak`` over ``warmup`` steps, then a half cosine to ``final`` at ``steps``.

    Step 0 already takes ``peak / warmup``, so that no step is spent on a rate of 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_ramp(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``steps`` (the EMA rate, 0.996 to 1; weight decay)."""
    progress = min(step / max(steps, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_ramp(step: int, start: int, length: int) -> float:
    """0 before step ``start``, 1 from ``start + length`` on, linear between."""
    if step < start:
        return 0.0
    return 1.0 if length <= 0 else min((step - start + 1) / length, 1.0)


def scaled_rate(rate: float, loader: DataLoader, reference: int = 128) -> float:
    """A learning rate stated for ``reference`` crops a step (64 pairs), scaled linearly to those of a run.

    Args:
        rate: for ``reference`` crops a step.
        loader: of the run, on every process; its dataset may have ``crops``, crops a sample.
        reference: crops a step.
    """
    sampler: Any = loader.batch_sampler
    return rate * (sampler.batch_size * sampler.world_size * getattr(loader.dataset, "crops", 1)) / reference


def decay_groups(modules: nn.Module | Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices decay; norms, biases, positions and single tokens do not."""
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            plain = parameter.ndim >= 2 and not any(
                part in name for part in ("position", "pos_embed", "mask_token")
            )
            (decayed if plain else spared).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": spared, "weight_decay": 0.0, "decays": False},
    ]
