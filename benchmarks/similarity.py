"""Which similarity helps? Short pre-trainings at equal budget, judged by region retrieval and a linear probe.

    python benchmarks/similarity.py STORE --out results.jsonl --variants main --seeds 0 1 2

STORE is a labelled store (``alice build``). Patients whose name starts with ``--test`` are only measured on; of
the others, ``--fit`` patients are what the linear probe is fitted on (all of them are trained on, without labels).
Results are appended, one line a run, and runs already there are skipped. ``--table`` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from custom.data.store.volume_store import VolumeStore
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import token_encoder
from custom.engine.loader import pair_loader
from custom.engine.monitors import Monitors
from custom.engine.schedules import decay_groups
from custom.engine.trainer import AliceTrainer, Schedule
from custom.evaluation.probe import EncoderProbe
from custom.landmarks.aligners.make import make_aligner
from custom.landmarks.aligners.match import Match
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss
from custom.methods.pairs import PairDataset
from custom.methods.views import MaskedBatch, Masking, TargetView

CROP, PATCH, WINDOW = (48, 32, 48), 8, (-175.0, 250.0)


@dataclass(frozen=True)
class Variant:
    """What one run changes; the rest is the same for all."""

    similarity: str = "cosine"
    predictor: bool = True
    alignment: str = "casa"
    casa_teacher: str = "shared"
    weight: float = 1.0  # of l_dv and l_st
    dv: float = 1.0
    st: float = 1.0
    r: float = 1.0
    start: float = 0.0  # share of the run before the similarity counts
    ramp: float = 0.0
    ema: float = 0.99
    view: float = 1.0  # strength of the target view
    aligner: str = "labels"
    temperature: float | None = None
    pooled_from: str = "decoder"
    train: bool = True


MAIN = {
    "untrained": Variant(train=False),
    "l_r alone": Variant(weight=0.0),
    "cosine + predictor": Variant(),
    "cosine, literal": Variant(predictor=False),
    "dino": Variant("dino", predictor=False, casa_teacher="ema"),
    "infonce": Variant("infonce", casa_teacher="ema"),
}
SEARCH = {
    "infonce within": Variant("infonce", casa_teacher="ema"),
    "infonce within encoder pooled": Variant("infonce", casa_teacher="ema", pooled_from="encoder"),
    "infonce within encoder pooled random": Variant(
        "infonce", casa_teacher="ema", pooled_from="encoder", aligner="random"
    ),
    "infonce encoder pooled, dv only": Variant("infonce", casa_teacher="ema", pooled_from="encoder", st=0.0),
    "infonce encoder pooled, dv 0.3 only": Variant(
        "infonce", casa_teacher="ema", pooled_from="encoder", st=0.0, weight=0.3
    ),
    "cosine decoder_target": Variant(alignment="decoder_target"),
    "infonce decoder_target": Variant("infonce", alignment="decoder_target", pooled_from="encoder"),
    "cosine direct random pairs": Variant(alignment="direct", aligner="random"),
    "cosine direct encoder pooled": Variant(alignment="direct", pooled_from="encoder"),
    "cosine direct, st only": Variant(alignment="direct", dv=0.0),
    "cosine random pairs": Variant(aligner="random"),
    "infonce w0.1": Variant("infonce", casa_teacher="ema", weight=0.1),
    "infonce w0.1 late": Variant("infonce", casa_teacher="ema", weight=0.1, start=0.3, ramp=0.2),
    "infonce random pairs": Variant("infonce", casa_teacher="ema", aligner="random"),
    "infonce dv only": Variant("infonce", casa_teacher="ema", st=0.0),
    "infonce st only": Variant("infonce", casa_teacher="ema", dv=0.0),
    "infonce encoder pooled": Variant("infonce", casa_teacher="ema", pooled_from="encoder"),
    "cosine late": Variant(start=0.3, ramp=0.2),
    "cosine w0.1": Variant(weight=0.1),
    "cosine direct": Variant(alignment="direct"),
    "cosine strong view": Variant(view=2.0),
    "cosine ema 0.996": Variant(ema=0.996),
}


class LabelAligner:
    """An oracle for this experiment: moves a point with the mean centroid of the labels both scans have."""

    name, threshold = "labels", -1.0

    def __init__(self, store: VolumeStore) -> None:
        self.centroids = {n: _centroids(store, n) for n in store.names}

    def align(self, scan_q: str, point_mm: np.ndarray, scan_k: str, rng: np.random.Generator) -> Match:
        q, k = self.centroids[scan_q], self.centroids[scan_k]
        common = sorted(set(q) & set(k))
        if not common:
            return Match(point_mm, -2.0)
        weights = np.array([1 / (20.0 + np.linalg.norm(q[v] - point_mm)) for v in common])
        moves = np.array([k[v] - q[v] for v in common])
        return Match(point_mm + weights @ moves / weights.sum(), 1.0)


def _centroids(store: VolumeStore, name: str) -> dict[int, np.ndarray]:
    label = store.read_label_crop(name, (0, 0, 0), store.shape(name))
    affine = store.affine(name)
    return {
        int(v): affine[:3, :3] @ np.argwhere(label == v).mean(axis=0) + affine[:3, 3]
        for v in np.unique(label)
        if v
    }


@dataclass
class Bench:
    """Everything that runs share."""

    store: VolumeStore
    test: str
    fit_patients: int
    steps: int
    pairs: int
    aligners: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.train_names = [n for n in self.store.names if not n.startswith(self.test)]
        self.test_names = [n for n in self.store.names if n.startswith(self.test)]
        self.probe = EncoderProbe(
            self.store,
            self.test_names,
            CROP,
            WINDOW,
            fit_names=self.train_names[: self.fit_patients],
            crops_per_scan=12,
        )

    def aligner(self, name: str) -> Any:
        if name not in self.aligners:
            self.aligners[name] = (
                LabelAligner(self.store) if name == "labels" else make_aligner(name, self.store)
            )
        return self.aligners[name]

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train one variant and measure it."""
        torch.manual_seed(seed)
        network = MaskedViT(
            1, CROP, PATCH, hidden_size=192, mlp_dim=768, num_layers=4, num_heads=6, pos_embed_type="sincos"
        )
        student = StudentBranch(
            token_encoder(network), decoder_width=96, decoder_depth=2, decoder_heads=4, head_width=512, bottleneck=128,
            prototypes=256 if variant.similarity == "dino" else None, predictor=variant.predictor,
            alignment=variant.alignment, casa_teacher=variant.casa_teacher, pooled_from=variant.pooled_from,
        )  # fmt: skip
        started = time.process_time()
        result: dict[str, Any] = {}
        if variant.train:
            dataset = PairDataset(
                self.store,
                self.aligner(variant.aligner),
                CROP,
                WINDOW,
                seed=seed,
                names=self.train_names,
                max_redraws=10,
            )
            strength = variant.view
            with tempfile.TemporaryDirectory() as folder:
                trainer = AliceTrainer(
                    device="cpu", student=student, teacher=student.make_teacher(),
                    loss=AliceLoss(
                        (PATCH,) * 3, variant.similarity, variant.r, variant.weight * variant.dv, variant.weight * variant.st,
                        temperature=variant.temperature, width=student.head.out_width,
                    ),
                    optimizer=torch.optim.AdamW(decay_groups(student, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True),
                    loader=pair_loader(
                        dataset, self.pairs, self.steps, collate=MaskedBatch(Masking(0.75), student.encoder.units(CROP))
                    ),
                    schedule=Schedule(
                        self.steps, 5e-4, self.steps // 10, momentum=variant.ema,
                        similarity_start=int(variant.start * self.steps), similarity_ramp=int(variant.ramp * self.steps),
                    ),
                    view=TargetView(self.store.spacing, 15 * strength, 0.1 * strength, (0, 0, 0), 0.1 * strength, 0.1 * strength, 0.05 * strength),
                    run_dir=folder, checkpoint_every=0, seed=seed, train_handlers=[Monitors(every=max(self.steps // 4, 1))],
                )  # fmt: skip
                trainer.run()
                result = {
                    k: round(float(v), 4) for k, v in (trainer.state.output | trainer.state.metrics).items()
                }
        student.eval()
        result |= {k: round(v, 4) for k, v in self.probe(student.encoder).items()}
        return result | {"cpu_s": round(time.process_time() - started, 1)}


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    rows = [
        "| variant | seeds | region retrieval | linear probe r | spread | rank |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == name]

        def cell(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [line[key] for line in own if key in line]
            return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "-"

        keys = ("retrieval", "linear", "monitor/std_teacher", "monitor/rank_teacher")
        rows.append(f"| {name} | {len(own)} | " + " | ".join(cell(k) for k in keys) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path("similarity.jsonl"))
    parser.add_argument("--test", default="validation_")
    parser.add_argument("--fit", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=["main"], help="main, search, or names of variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.table:
        print(table(done))
        return
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    everything = MAIN | SEARCH
    names = [n for v in args.variants for n in ({"main": MAIN, "search": SEARCH}.get(v, [v]))]
    bench = Bench(VolumeStore(args.store), args.test, args.fit, args.steps, args.pairs)
    known = {(line["variant"], line["seed"], line["steps"]) for line in done}
    for seed in args.seeds:
        for name in names:
            if (name, seed, args.steps) in known:
                continue
            result = {"variant": name, "seed": seed, "steps": args.steps, **bench.run(everything[name], seed)}
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{name} seed {seed}: retrieval {result['retrieval']}, linear {result['linear']}, {result['cpu_s']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
