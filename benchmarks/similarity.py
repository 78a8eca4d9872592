"""What teaches? Short pre-trainings at equal budget, judged on patients that were not trained on.

    python benchmarks/similarity.py STORE --out rows.jsonl --arms "l_r" "places" --rates 5e-4 1.5e-3 --steps 400
    python benchmarks/similarity.py STORE --out rows.jsonl --table

STORE is a labelled store (``alice build``). Patients whose names match ``--report`` are measured last, once, with
``--measure report``. Until then everything is chosen on ``--tune`` patients (``--measure tune``), who are then not trained
on. Rows are appended, one line a run; runs that are there are skipped. ``--seconds`` gives every arm the same CPU time
instead of the same steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from custom.data.store.volume_store import VolumeStore
from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.engine.loader import sample_loader
from custom.engine.monitors import Monitors
from custom.engine.schedules import decay_groups
from custom.engine.trainer import PretrainTrainer, Schedule
from custom.evaluation.probe import EncoderProbe
from custom.landmarks.aligners.make import make_aligner
from custom.landmarks.aligners.protocol import Match
from custom.methods.alice.branch import StudentBranch
from custom.methods.alice.losses import AliceLoss
from custom.methods.alice.method import Alice
from custom.methods.alice.places import PlaceLoss
from custom.methods.pairs import AlignedPair
from custom.methods.placed_pairs import PlacedPair
from custom.methods.views import MaskedBatch, Masking, TargetView

WINDOW = (-175.0, 250.0)


@dataclass(frozen=True)
class Arm:
    """What one run changes; the rest is the same for all."""

    dv: float = 0.5  # weight of l_dv
    st: float = 0.0
    r: float = 1.0
    inter_volume: str = "places"  # places | pooled
    crops: str = "placed"  # placed: offsets of their own, moved into the volume; paired: one offset, redrawn
    similarity: str = "cosine"
    predictor: bool = True
    alignment: str = "none"
    pooled_from: str = "decoder"
    reconstruction: str = "masked"
    sigma: float = 1.0  # times half of a token's side
    temperature: float = 0.1
    ema: float = 0.99
    turn: float = 0.0  # degrees of the teacher's view
    zoom: float = 0.0
    intensity: float = 1.0  # strength of the teacher's view
    offset: float = 0.5
    aligner: str = "coordinate"
    train: bool = True


PLACES, L_R = Arm(), Arm(dv=0.0, inter_volume="pooled")
ARMS = {
    "untrained": Arm(train=False),
    "l_r": L_R,
    "places": PLACES,
    "before": Arm(1.0, 1.0, inter_volume="pooled", crops="paired", alignment="direct", turn=15.0, zoom=0.1),
    "paper": Arm(
        1.0,
        1.0,
        inter_volume="pooled",
        crops="paired",
        alignment="casa",
        predictor=False,
        turn=15.0,
        zoom=0.1,
    ),
    "l_r, redrawn crops": replace(L_R, crops="paired"),
    "l_r raw": replace(L_R, reconstruction="raw"),
    "places raw": replace(PLACES, reconstruction="raw"),
    "places alone": replace(PLACES, r=0.0),
    "places x2": replace(PLACES, dv=1.0),
    "places x0.5": replace(PLACES, dv=0.25),
    "places x0.2": replace(PLACES, dv=0.1),
    "places sigma 2": replace(PLACES, sigma=2.0),
    "places tau 0.05": replace(PLACES, temperature=0.05),
    "places tau 0.2": replace(PLACES, temperature=0.2),
    "places ema 0.97": replace(PLACES, ema=0.97),
    "places ema 0.996": replace(PLACES, ema=0.996),
    "places turned": replace(PLACES, turn=15.0, zoom=0.1),
    "places plain view": replace(PLACES, intensity=0.0),
    "places strong view": replace(PLACES, intensity=2.0),
    "places offset 1": replace(PLACES, offset=1.0),
    "places offset 0": replace(PLACES, offset=0.0),
    "places + direct": replace(PLACES, st=0.2, alignment="direct"),
    "places + casa": replace(PLACES, st=0.2, alignment="casa"),
    "places, random pairs": replace(PLACES, aligner="random"),
    "places, labels": replace(PLACES, aligner="labels"),
    "places, sam": replace(PLACES, aligner="sam"),
    "places, affine": replace(PLACES, aligner="affine"),
}


class LabelAligner:
    """An oracle, for a control only: moves a point with the mean centroid of the labels both scans have."""

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
    measured: str  # regular expression on names
    left_out: str
    network: str
    crop: tuple[int, int, int]
    pairs: int
    embeddings: str | None
    threshold: float | None
    fit_patients: int = 20
    crops_per_scan: int = 12
    aligners: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.store.names
        self.test_names = [n for n in names if re.search(self.measured, n)]
        out = set(self.test_names) | {n for n in names if re.search(self.left_out, n)}
        self.train_names = [n for n in names if n not in out]
        labelled = [n for n in self.train_names if self.store.has_label(n)]
        self.probe = EncoderProbe(
            self.store,
            self.test_names,
            self.crop,
            WINDOW,
            fit_names=labelled[: self.fit_patients],
            crops_per_scan=self.crops_per_scan,
        )

    def aligner(self, name: str) -> Any:
        if name not in self.aligners:
            options: dict[str, Any] = (
                {"embeddings": self.embeddings, "threshold": self.threshold} if name == "sam" else {}
            )
            made = LabelAligner(self.store) if name == "labels" else make_aligner(name, self.store, **options)
            self.aligners[name] = made
        return self.aligners[name]

    def encoder(self) -> TokenEncoder:
        if self.network == "swin":
            return token_encoder(
                MaskedSwin(1, 24, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), downsample="merging")
            )
        patch = int(self.network.removeprefix("vit"))
        return token_encoder(
            MaskedViT(
                1,
                self.crop,
                patch,
                hidden_size=192,
                mlp_dim=768,
                num_layers=4,
                num_heads=6,
                pos_embed_type="sincos",
            )
        )

    def trainer(self, arm: Arm, rate: float, seed: int, steps: int, folder: str) -> PretrainTrainer:
        torch.manual_seed(seed)
        encoder = self.encoder()
        student = StudentBranch(
            encoder,
            decoder_width=96,
            decoder_depth=2,
            decoder_heads=4,
            head_width=512,
            bottleneck=128,
            predictor=arm.predictor,
            alignment=arm.alignment,
            pooled_from=arm.pooled_from,
            inter_volume=arm.inter_volume,
        )
        pitch = [p * s for p, s in zip(encoder.patch, self.store.spacing, strict=True)]
        places = None
        if arm.inter_volume == "places":
            places = PlaceLoss(pitch, arm.sigma * sum(pitch) / 6, arm.temperature)
        loss = AliceLoss(
            encoder.patch,
            arm.similarity,
            arm.r,
            arm.dv,
            arm.st,
            arm.reconstruction,
            width=student.head.out_width,
            places=places,
        )
        options: dict[str, Any] = {
            "window_hu": WINDOW,
            "seed": seed,
            "names": self.train_names,
            "max_redraws": 10,
        }
        kind: Any = AlignedPair if arm.crops == "paired" else PlacedPair
        if arm.crops == "placed":
            options["patch"] = encoder.patch
        draws = kind(self.store, self.aligner(arm.aligner), self.crop, max_offset=arm.offset, **options)
        strength = 0.1 * arm.intensity
        view = TargetView(self.store.spacing, arm.turn, arm.zoom, (0, 0, 0), strength, strength, strength / 2)
        masked = MaskedBatch(Masking(0.75), encoder.units(self.crop), draws.crop_keys, encoder.planner())
        return PretrainTrainer(
            device="cpu",
            method=Alice(student, loss, view),
            optimizer=torch.optim.AdamW(decay_groups(student, 0.05), lr=rate, betas=(0.9, 0.95), fused=True),
            loader=sample_loader(draws, self.pairs, steps, collate=masked),
            schedule=Schedule(steps, rate, max(steps // 10, 1), momentum=arm.ema),
            run_dir=folder,
            checkpoint_every=0,
            seed=seed,
            train_handlers=[Monitors(every=max(steps // 4, 1))],
        )

    def run(
        self, arm: Arm, rate: float, seed: int, steps: int, seconds: float | None, keep: Path | None
    ) -> dict[str, Any]:
        """Train one arm and measure it."""
        result: dict[str, Any] = {}
        if arm.train and seconds is not None:
            with tempfile.TemporaryDirectory() as folder:
                trial = self.trainer(arm, rate, seed, 24, folder)
                trial.saved_at = 24
                trial.run()  # the first steps fill caches
                started = time.process_time()
                trial = self.trainer(arm, rate, seed + 1000, 24, folder)
                trial.resume, trial.saved_at = False, 24
                trial.run()
            steps = max(10, round(seconds / ((time.process_time() - started) / 24)))
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(arm, rate, seed, max(steps, 1), folder)
            if arm.train:
                trainer.run()
                found = trainer.state.output[0] | trainer.state.metrics
                result = {k: round(float(v), 4) for k, v in found.items()}
            trained = time.process_time() - started
        student = trainer.online.eval()
        if keep is not None:
            torch.save(student.encoder.encoder.state_dict(), keep)  # type: ignore[union-attr]
        result |= {k: round(v, 4) for k, v in self.probe(student.encoder).items()}  # type: ignore[arg-type]
        return result | {"cpu_s": round(trained, 1), "steps": steps}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and each seed's value, as Markdown; the best rate of an arm by its mean linear probe."""
    lines = [
        "| arm | rate | seeds | retrieval | place, mm | linear probe r | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rate in dict.fromkeys((row["arm"], row["rate"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["rate"]) == (name, rate)]

        def cell(key: str, digits: int = 3, own: list[dict[str, Any]] = own) -> str:
            values = [row[key] for row in own if row.get(key) is not None]
            if not values:
                return "-"
            each = " ".join(f"{v:.{digits}f}" for v in values) if len(values) > 1 else ""
            return f"**{np.mean(values):.{digits}f}** {each}".strip()

        cells = [cell("retrieval"), cell("place_mm", 1), cell("linear"), cell("cpu_s", 0)]
        lines.append(f"| {name} | {rate:g} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path("similarity.jsonl"))
    parser.add_argument("--report", default="validation_", help="names of patients to report on")
    parser.add_argument(
        "--tune", default=r"train_pt_(17[27]|18\d|19\d|200)(\D|$)", help="names of patients to choose on"
    )
    parser.add_argument("--measure", choices=("tune", "report"), default="tune")
    parser.add_argument("--arms", nargs="+", default=["untrained", "l_r", "places"], help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--seconds", type=float, default=None, help="CPU seconds of training instead of steps"
    )
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--network", default="vit8", help="vit8, vit16 or swin")
    parser.add_argument("--crop", type=int, nargs=3, default=[48, 32, 48])
    parser.add_argument("--embeddings", default=None, help="of alice embed, for sam")
    parser.add_argument("--threshold", type=float, default=None, help="of sam")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the encoders' weights")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.table:
        print(table(done))
        return
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown:
        raise SystemExit(f"No arm {', '.join(unknown)}; there are {', '.join(ARMS)}.")
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    measured, left_out = (args.tune, args.report) if args.measure == "tune" else (args.report, "^$")
    bench = Bench(
        VolumeStore(args.store),
        measured,
        left_out,
        args.network,
        tuple(args.crop),
        args.pairs,
        args.embeddings,
        args.threshold,
    )
    keys = ("arm", "rate", "seed", "budget", "measured", "network", "pairs", "crop")
    known = {json.dumps([row.get(k) for k in keys]) for row in done}
    budget = f"{args.seconds:g} s" if args.seconds else f"{args.steps} steps"
    for seed in args.seeds:
        for name in args.arms:
            for rate in args.rates if ARMS[name].train else args.rates[:1]:
                about = dict(
                    zip(
                        keys,
                        (name, rate, seed, budget, args.measure, args.network, args.pairs, args.crop),
                        strict=True,
                    )
                )
                if json.dumps([about[k] for k in keys]) in known:
                    continue
                keep = (
                    None
                    if args.keep is None
                    else args.keep / f"{name}_{rate:g}_{seed}_{budget}.pt".replace(" ", "_")
                )
                found = bench.run(ARMS[name], rate, seed, args.steps, args.seconds, keep)
                row = {**about, "settings": asdict(ARMS[name]), **found}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                said = ", ".join(
                    f"{k} {row[k]}" for k in ("retrieval", "place_mm", "linear", "cpu_s") if k in row
                )
                print(f"{name}, rate {rate:g}, seed {seed}, {budget}: {said}", flush=True)


if __name__ == "__main__":
    main()
