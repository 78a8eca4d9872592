"""How the processes of a run part."""

import time

import torch
import torch.distributed as dist

from custom import processes


def test_the_last_to_go_waits_for_gloo(tmp_path, monkeypatch):
    """Its threads need Python a moment longer than the exchange takes; without the wait some runs on busy CPUs abort."""
    slept = []
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append((seconds, dist.is_initialized())))
    processes.leave()
    assert not slept, "nobody to leave"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(2))
    processes.leave()
    assert not dist.is_initialized() and slept == [(processes.LEAVE_PAUSE_S, False)]
