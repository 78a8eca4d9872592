"""A pre-training config taken apart for an estimate: resolved without its data, and run for a few dry steps."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from custom.bundles.estimate_data import MadeUpPairs
from custom.engine.cost import PeakLiveBytes

STEPS = 3  # timed, after one of warm-up and one that is metered


def parser_of(
    files: Sequence[str], overrides: dict[str, Any] | None, processes: int, **more: Any
) -> ConfigParser:
    """The config with its overrides, for one process of several, without DDP or a check of the command line."""
    parser = ConfigParser()
    parser.read_config(list(files))
    alone = {"world_size": processes, "rank": 0, "preflight": None}
    # no process group is opened for an estimate
    unwrapped = {"student": "$@student_def.to(@device)", "parameters::modules": "@student_def"}
    for key, value in {**(overrides or {}), **alone, **unwrapped, **more}.items():
        parser.set(value, key)
    if "get_node_local_rank" in str(parser.get("device")):
        parser.set("$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')", "device")
    return parser


def matmul_rate(device: torch.device, bf16: bool, side: int = 1024) -> float:
    """FLOPs a second of a matrix product on a device."""
    if device.type == "cuda":
        side *= 8
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def dry_run(files: Sequence[str], overrides: dict[str, Any] | None, processes: int = 1) -> tuple[float, int]:
    """Real steps of the real trainer on made-up pairs: seconds of one (median), and most bytes on the device.

    On CUDA the bytes are the allocator's; elsewhere those of live tensors, metered in a step of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        parser = parser_of(
            files,
            overrides,
            processes,
            output_dir=folder,
            iterations=STEPS + 2,
            warmup=0,
            checkpoint_every=0,
            resume=False,
            summary={},
            workers=0,
        )
        parser.set(
            {"_target_": f"{MadeUpPairs.__module__}.MadeUpPairs", "crop_size": "@crop_size"}, "train::dataset"
        )
        parser.set([], "train::handlers")
        trainer = parser.get_parsed_content("train::trainer")
        trainer._saved_at = STEPS + 2  # nothing to keep
        cuda = trainer.device.type == "cuda"
        times: list[float] = []
        meter = PeakLiveBytes()
        stack = contextlib.ExitStack()
        marks: list[float] = []

        def start() -> None:
            step = trainer.state.iteration
            if step == 2 and not cuda:
                trainer.optimizer.zero_grad(set_to_none=True)
                stack.enter_context(meter)
            if cuda:
                if step == 2:
                    torch.cuda.reset_peak_memory_stats(trainer.device)
                torch.cuda.synchronize(trainer.device)
            marks.append(time.perf_counter())

        def stop() -> None:
            if cuda:
                torch.cuda.synchronize(trainer.device)
            times.append(time.perf_counter() - marks[-1])
            if trainer.state.iteration == 2:
                stack.close()

        trainer.add_event_handler(Events.ITERATION_STARTED, start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with stack, _quiet():
            trainer.run()
        if cuda:
            peak = torch.cuda.max_memory_allocated(trainer.device)
        else:
            held = [*trainer.online.state_dict().values(), *trainer.teacher.state_dict().values()]
            held += [*trainer.loss.state_dict().values()]
            held += [
                v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)
            ]
            peak = meter.peak + sum(t.numel() * t.element_size() for t in held)
    return sorted(times[2:])[STEPS // 2], peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The trainer's own log lines are of no use here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
