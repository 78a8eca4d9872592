"""Meters that tell learning from collapse. The loss does not tell."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from torch import Tensor, nn

from custom.processes import rank, wait_for_all

logger = logging.getLogger(__name__)

ALARM_STD = 0.1  # of 1 / sqrt(d), the spread of vectors that are spread evenly (ours)


def embedding_std(vectors: Tensor) -> Tensor:
    """Mean standard deviation per dimension of unit vectors (n, d), times sqrt(d): healthy is 1, collapsed 0."""
    unit = F.normalize(vectors.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])


def effective_rank(vectors: Tensor) -> Tensor:
    """Exponential of the entropy of the centred vectors' singular values (n, d); 1 is a line."""
    singular = torch.linalg.svdvals((vectors - vectors.mean(dim=0)).float())
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())


def mean_cosine(vectors: Tensor, owners: list[str]) -> Tensor:
    """Mean cosine between vectors (n, d) of different patients; near 1 means that all look the same."""
    unit = F.normalize(vectors.float(), dim=-1)
    codes = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    code = torch.tensor([codes[owner] for owner in owners], device=unit.device)
    apart = code[:, None] != code[None]
    cosines = unit @ unit.T
    return cosines[apart].mean() if apart.any() else cosines.new_tensor(math.nan)


def gradient_norms(terms: dict[str, Tensor], network: nn.Module) -> dict[str, float]:
    """L2 norm of each term's gradient on a network's parameters."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        if name == "total" or not term.requires_grad:
            continue
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in gradients if g is not None]
        norms[f"grad/{name}"] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


class Monitors:
    """Every ``every`` steps: spread, rank and similarity of pooled vectors, EMA drift, gradient per term, how samples were drawn.

    A method without pooled vectors or without a teacher leaves out what it lacks. Vectors of the last ``window`` crops
    are kept, since one batch is too few for a rank. The values land in ``engine.state.metrics`` under ``monitor/...``;
    a collapse is logged as a warning.
    """

    def __init__(self, every: int = 100, window: int = 128) -> None:
        self.every = max(every, 1)
        self.student: deque[Tensor] = deque(maxlen=window)
        self.teacher: deque[Tensor] = deque(maxlen=window)
        self.owners: deque[str] = deque(maxlen=window)

    def attach(self, engine: Any) -> None:
        """Hook into a trainer."""
        engine.kept["monitors"] = self
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self.measure)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, so that its log is the uninterrupted run's."""
        return {"student": list(self.student), "teacher": list(self.teacher), "owners": list(self.owners)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the vectors of before."""
        self.student.extend(state["student"])
        self.teacher.extend(state["teacher"])
        self.owners.extend(state["owners"])

    def collect(self, engine: Any) -> None:
        """Keep this step's vectors, where they are."""
        for student, teacher, owners in engine.pooled:
            self.student.extend(student)
            self.teacher.extend(teacher)
            self.owners.extend(owners)

    def measure(self, engine: Any) -> None:
        """Judge what was collected, and each term's gradient on the first part of the batch."""
        values: dict[str, float] = {}
        if self.teacher:
            values |= self._spread()
        if engine.ema is not None:
            values["ema_drift"] = float(engine.ema.drift())
        if engine.counts:
            values |= engine.draws.rates(engine.counts)
        values |= self._gradients(engine)
        if engine.scores:
            ranked = sorted(engine.scores)
            places = {p: min(p * len(ranked) // 100, len(ranked) - 1) for p in (10, 50, 90)}
            values |= {f"score_p{p}": ranked[place] for p, place in places.items()}
            engine.report_distribution("monitor/scores", ranked)
        engine.report({f"monitor/{name}": value for name, value in values.items()})
        found = []
        if self.teacher and values["std_teacher"] < ALARM_STD and values["rank_teacher"] < 2:
            found.append(
                f"the teacher's vectors collapse (spread {values['std_teacher']:.3f} of a healthy 1, effective rank "
                f"{values['rank_teacher']:.1f}). Crops are told apart by little. Lower learning_rate, or raise the weight of a term "
                "that tells them apart."
            )
        latest = engine.state.metrics | engine.state.output[0]
        for alarm in [*found, *engine.method.alarms(latest, engine.untrained)]:
            logger.warning("Step %d: %s", engine.state.iteration, alarm)
            engine.alarms.append(alarm)

    def _spread(self) -> dict[str, float]:
        teacher, own = torch.stack(list(self.teacher)), torch.stack(list(self.student))
        return {
            "std_teacher": float(embedding_std(teacher)),
            "std_student": float(embedding_std(own)),
            "rank_teacher": float(effective_rank(teacher)),
            "cosine_between_patients": float(mean_cosine(teacher, list(self.owners))),
        }

    def _gradients(self, engine: Any) -> dict[str, float]:
        engine.loss.eval()  # running centres must not move
        batch = engine.part(engine.state.batch, 0)
        _, terms = engine.forward(batch, engine.state.iteration - 1, engine.online)
        found = {name: terms[name] for name in engine.method.terms}
        norms = gradient_norms(found, engine.online.get_submodule("encoder"))
        engine.loss.train()
        return norms


class ProbeHandler:
    """Every ``every`` steps: run a probe on the frozen online encoder, by the first process.

    Args:
        probe: takes the token encoder, gives named numbers; see ``custom.evaluation.probe``.
        every: steps between probes; the first is before training, as the untrained baseline.
    """

    def __init__(self, probe: Callable[[nn.Module], dict[str, float]] | None, every: int = 1000) -> None:
        self.probe, self.every = probe, max(every, 1)

    def attach(self, engine: Any) -> None:
        """Hook into a trainer."""
        if self.probe is not None:
            engine.add_event_handler(Events.STARTED, self.measure)
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self.measure)

    def measure(self, engine: Any) -> None:
        """Probe and store the numbers under ``probe/...``."""
        if rank() == 0 and self.probe is not None:
            encoder = engine.online.encoder
            training = encoder.training
            encoder.eval()
            values = self.probe(encoder)
            encoder.train(training)
            found = {f"probe/{name}": value for name, value in values.items()}
            engine.report(found)
            if engine.state.iteration == 0:
                engine.untrained = found
            logger.info(
                "Step %d: %s", engine.state.iteration, ", ".join(f"{k} {v:.3f}" for k, v in values.items())
            )
        wait_for_all()
