"""Training: SIGTERM, clipping, and the learning rates of the overrides."""

from __future__ import annotations

import math
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

# blocks of MONAI's ViT, stages of SwinUNETR and nnFormer
_DEPTH = re.compile(r"[.](?:layers[.]?|norms[.]|blocks[.])([0-9]+)")


def end_at_sigterm(trainer: Any) -> None:
    """Let SIGTERM end the run after its iteration, so that the last checkpoint is written.

    Python allows that in the main thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: trainer.terminate())


def clip_gradients(trainer: Any, network: nn.Module, optimizer: Any, max_norm: float | None) -> None:
    """Cut the global norm of the gradients to ``max_norm`` in every iteration, unless it is None."""
    if not max_norm:
        return

    def clip() -> None:
        if trainer.scaler:
            trainer.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, clip)


def without_encoder(network: nn.Module, encoder: nn.Module) -> list[nn.Parameter]:
    """Keep the encoder as it is; the parameters of the rest, for the optimizer."""
    encoder.requires_grad_(False)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def layer_decay(network: nn.Module, encoder: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls towards the encoder's input.

    Args:
        network: all of it; what does not belong to the encoder learns at ``rate``.
        encoder: its last block or stage learns at ``rate * decay``, the one before at ``rate * decay**2``, ...
        rate: learning rate.
        decay: factor from one depth to the next.

    Returns:
        Groups for an optimizer; every parameter is in one of them.
    """
    name_of = {id(p): name for name, p in encoder.named_parameters()}
    top = max(map(_depth_of, name_of.values())) + 1
    depth = {key: top - 1 if name.startswith("norm.") else _depth_of(name) for key, name in name_of.items()}
    groups: dict[int, list[nn.Parameter]] = {}
    for p in network.parameters():
        groups.setdefault(depth.get(id(p), top), []).append(p)
    return [{"params": groups[d], "lr": rate * decay ** (top - d)} for d in sorted(groups)]


def _depth_of(name: str) -> int:
    """0 for what lies before all blocks, else one more than the block's number. ViT's ``norm`` lies after all blocks."""
    found = _DEPTH.search("." + name)
    return int(found[1]) + 1 if found else 0


def decoder_and_encoder(network: nn.Module, encoder: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: all but the encoder, and the encoder."""
    inside = set(map(id, encoder.parameters()))
    return [
        {"params": [p for p in network.parameters() if id(p) not in inside]},
        {"params": list(encoder.parameters())},
    ]


def sawtooth(total_steps: int, turn: int, groups: int = 2) -> list[Callable[[int], float]]:
    """Factors of the learning rate of decoder and encoder: two teeth, in the first of which the encoder rests.

    A tooth warms up for a twentieth of the run, then falls as a cosine to 0.

    Args:
        total_steps: of the run.
        turn: step at which the second tooth begins.
        groups: of the optimizer. The program ends if they are not decoder and encoder.
    """
    if groups != 2:
        sys.exit(
            f"alice_seg: sawtooth.yaml has 2 groups of parameters, not {groups}; layer_decay.yaml does not go with it."
        )
    warmup = max(1, total_steps // 20)

    def tooth(at: int, length: int) -> float:
        if at < warmup:
            return at / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (at - warmup) / max(1, length - warmup)))

    def second(step: int) -> float:
        return tooth(step - turn, total_steps - turn)

    return [
        lambda step: tooth(step, turn) if step < turn else second(step),
        lambda step: 0.0 if step < turn else second(step),
    ]


def polynomial(total_steps: int, power: float) -> Callable[[int], float]:
    """Factor of the learning rate that falls from 1 to 0 as a power of the remaining steps."""
    return lambda step: max(0.0, 1 - step / max(1, total_steps)) ** power


class AllHeads:
    """Inferer of training with deep supervision: the network's answers at every scale, in training only.

    Args:
        network: with an attribute ``deep_supervision``.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, image: Tensor, network: Callable[[Tensor], Any]) -> Any:
        self.network.deep_supervision = True
        answers = network(image)
        self.network.deep_supervision = False
        return answers
