"""Few labels on the token grid: does what an encoder learnt help to segment? One CPU minute a run.

    python benchmarks/few_shot_tokens.py STORE ENCODERS --arms scratch l_r places --out rows
    python benchmarks/few_shot_tokens.py --report rows

STORE is a labelled store; ENCODERS holds the weights that ``benchmarks/similarity.py --keep`` wrote, ``ARM_RATE_SEED_BUDGET.pt``.
A 3 x 3 x 3 convolution and a linear layer turn each token into the labels of its voxels. There is no skip connection, so that the
encoder decides. ``frozen`` trains the head alone, ``tuned`` the encoder as well. Scores are Dice on the store's grid, by case and organ,
as ``alice compare`` reads them; one CSV an arm, number of labelled patients, way and number of steps. Runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.data.grid.profiles import window
from custom.data.store.volume_store import VolumeStore
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.tokens import TokenEncoder, token_encoder
from custom.evaluation.scores.csv_rows import read_rows, write_rows
from custom.evaluation.statistics.per_organ import OVERALL, compare, summarise
from custom.evaluation.statistics.significance import holm
from custom.files import write_text

WINDOW, CROP, PATCH = (-175.0, 250.0), (48, 32, 48), 8
NOTE = """Written by `benchmarks/few_shot_tokens.py --report` from the rows beside it. DSC of four organs on the grid of 3 x 3 x 4 mm, mean over
patients held back, with the 95 % interval of a bootstrap over runs and patients. Differences are paired by run and patient; those whose interval
excludes 0 are bold. p: signed-rank test on patients, runs averaged; Holm: adjusted for all rows. A run is a seed of pre-training and a choice of
who is labelled; runs that an arm lacks are left out. The bootstrap takes runs for independent, although three of them share a pre-training, so intervals are rather too narrow."""
ORGANS = {1: "brainstem", 2: "spinal cord", 3: "right parotid", 4: "left parotid"}


class TokenSegmenter(nn.Module):
    """An encoder and the light head that reads voxels' labels off its tokens."""

    def __init__(self, encoder: TokenEncoder, classes: int, width: int = 128) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.mix = nn.Conv3d(encoder.width, width, 3, padding=1)
        self.read = nn.Conv3d(width, classes * math.prod(encoder.patch), 1)

    def forward(self, crop: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> logits (B, classes, X, Y, Z)."""
        found = self.encoder(crop)
        grid = found.tokens.transpose(1, 2).unflatten(2, found.grid)
        voxels = self.read(F.gelu(self.mix(grid)))
        px, py, pz = self.encoder.patch
        batch, _, gx, gy, gz = voxels.shape
        split = voxels.view(batch, self.classes, px, py, pz, gx, gy, gz).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return split.reshape(batch, self.classes, gx * px, gy * py, gz * pz)


def build_encoder() -> TokenEncoder:
    """That of ``benchmarks/similarity.py --network vit8``."""
    return token_encoder(
        MaskedViT(
            1, CROP, PATCH, hidden_size=192, mlp_dim=768, num_layers=4, num_heads=6, pos_embed_type="sincos"
        )
    )


def read_case(store: VolumeStore, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A whole scan in [0, 1] and its label, other organs than ``ORGANS`` as background."""
    shape = store.shape(name)
    image = window(store.read_crop(name, (0, 0, 0), shape), *WINDOW)
    label = store.read_label_crop(name, (0, 0, 0), shape)
    return image, np.where(np.isin(label, list(ORGANS)), label, 0).astype(np.int64)


def draw(cases: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A crop and its label: two in three around a labelled voxel, the others anywhere."""
    image, label = cases[int(rng.integers(len(cases)))]
    size, shape = np.array(CROP), np.array(image.shape)
    if rng.random() < 2 / 3:
        places = np.argwhere(label > 0)
        centre = places[rng.integers(len(places))] + rng.integers(-size // 4, size // 4 + 1)
    else:
        centre = rng.integers(0, shape)
    start = np.clip(centre - size // 2, 0, np.maximum(shape - size, 0))
    cut = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    short = [(0, max(0, n - have)) for n, have in zip(size, image[cut].shape, strict=True)]
    return torch.from_numpy(np.pad(image[cut], short))[None], torch.from_numpy(np.pad(label[cut], short))


def loss_of(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy plus the mean soft Dice loss over organs."""
    share = logits.softmax(1)[:, 1:]
    truth = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:].to(share.dtype)
    dims = (0, 2, 3, 4)
    dice = (2 * (share * truth).sum(dims) + 1) / (share.sum(dims) + truth.sum(dims) + 1)
    return F.cross_entropy(logits, label) + 1 - dice.mean()


@torch.no_grad()
def predict(network: TokenSegmenter, image: np.ndarray) -> np.ndarray:
    """Labels of a whole scan: windows that overlap by half, probabilities averaged."""
    size = np.array(CROP)
    padded = np.pad(image, [(0, max(0, n - s)) for n, s in zip(size, image.shape, strict=True)])
    total = torch.zeros(network.classes, *padded.shape)
    starts = []
    for n, s in zip(size, padded.shape, strict=True):
        starts.append(sorted({min(i, s - n) for i in range(0, s, n // 2) if i < s}))
    for place in itertools.product(*starts):
        cut = tuple(slice(p, p + n) for p, n in zip(place, size, strict=True))
        total[(slice(None), *cut)] += network(torch.from_numpy(padded[cut])[None, None])[0].softmax(0)
    inside = tuple(slice(0, s) for s in image.shape)
    return total.argmax(0).numpy()[inside]


def score(
    network: TokenSegmenter, cases: dict[str, tuple[np.ndarray, np.ndarray]], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Dice by case and organ; an organ that is not found counts as 0."""
    rows = []
    for name, (image, label) in cases.items():
        found = predict(network, image)
        for value, organ in ORGANS.items():
            truth, answer = label == value, found == value
            if truth.any():
                dsc = 2 * (truth & answer).sum() / (truth.sum() + answer.sum())
                rows.append(
                    {"case": name, **about, "organ": organ, "label": value, "status": "ok", "dsc": float(dsc)}
                )
    return rows


def run(
    encoder: TokenEncoder,
    train: Sequence[tuple[np.ndarray, np.ndarray]],
    test: dict[str, tuple[np.ndarray, np.ndarray]],
    looks: Sequence[int],
    frozen: bool,
    seed: int,
    head_rate: float,
    encoder_rate: float,
) -> dict[int, list[dict[str, Any]]]:
    """Train on a few patients, and score at the given steps; the rate is constant but for a warm-up."""
    torch.manual_seed(seed)
    network = TokenSegmenter(encoder, len(ORGANS) + 1)
    head = [*network.mix.parameters(), *network.read.parameters()]
    groups: list[dict[str, Any]] = [{"params": head, "lr": head_rate}]
    if frozen:
        encoder.requires_grad_(False)
    else:
        groups.append({"params": [p for p in encoder.parameters() if p.requires_grad], "lr": encoder_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rates = [group["lr"] for group in groups]
    rng = np.random.default_rng([seed, 3])
    scored = {}
    for step in range(1, max(looks) + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / 20)
        network.train()
        crops, labels = (
            torch.stack(part) for part in zip(*(draw(train, rng) for _ in range(4)), strict=True)
        )
        optimizer.zero_grad()
        loss_of(network(crops), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        if step in looks:
            network.eval()
            scored[step] = score(network, test, {"fold": 0, "seed": seed, "protocol": "store grid"})
    return scored


def report(folder: Path, arms: Sequence[str]) -> str:
    """Means of the arms, and paired differences with intervals, from the rows of a folder; also in its table.md."""
    names = sorted(
        {path.stem for path in folder.glob("*/*.csv")},
        key=lambda n: [n.split("_")[0], *map(int, re.findall(r"\d+", n))],
    )
    means, differences = [], []
    for name in names:
        rows = {
            arm: read_rows(folder / arm / f"{name}.csv")
            for arm in arms
            if (folder / arm / f"{name}.csv").is_file()
        }
        if len(rows) < len(arms):
            continue
        seeds = set.intersection(*({row["seed"] for row in found} for found in rows.values()))
        if len(seeds) < 3:
            continue
        rows = {arm: [row for row in found if row["seed"] in seeds] for arm, found in rows.items()}
        way, labelled, steps = re.match(r"(\w+)_labelled-(\d+)_steps-(\d+)", name).groups()  # type: ignore[union-attr]
        told = f"{way}, {labelled} labelled, {steps} steps"
        overall = {arm: summarise(found, "dsc")[-1] for arm, found in rows.items()}
        cells = [
            f"{one.mean:.3f} [{one.interval.low:.3f}, {one.interval.high:.3f}]" for one in overall.values()
        ]
        means.append([told, str(len(seeds)), *cells])
        for a, b in itertools.combinations(arms, 2):
            (line,) = (found for found in compare(rows[a], rows[b], "dsc") if found.organ == OVERALL)
            differences.append((told, a, b, line))
    adjusted = holm([line.p_value for *_, line in differences])
    lines = ["| | runs an arm | " + " | ".join(arms) + " |", "| --- " * (len(arms) + 2) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in means]
    lines += ["", "| | A | B | DSC, B - A | p | Holm |", "| --- | --- | --- | --- | --- | --- |"]
    for (told, a, b, line), p in zip(differences, adjusted, strict=True):
        text = f"{line.difference:+.3f} [{line.interval.low:+.3f}, {line.interval.high:+.3f}]"
        bold = "**" if line.interval.low > 0 or line.interval.high < 0 else ""
        lines.append(f"| {told} | {a} | {b} | {bold}{text}{bold} | {line.p_value:.3f} | {p:.3f} |")
    table = "\n".join(lines)
    write_text(folder / "table.md", f"# Few labels on the token grid\n\n{NOTE}\n\n{table}\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("encoders", type=Path, nargs="?")
    parser.add_argument("--report", type=Path, help="make table.md in this folder of rows, and run nothing")
    parser.add_argument("--out", type=Path, default=Path("few_shot_tokens"))
    parser.add_argument("--arms", nargs="+", default=["scratch", "l_r", "places"])
    parser.add_argument(
        "--budget", default="400 steps", help="of the pre-training, as in the encoders' names"
    )
    parser.add_argument("--rate", default="0.0005", help="of the pre-training, as in the encoders' names")
    parser.add_argument("--labelled", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pre-training")
    parser.add_argument("--label_seeds", type=int, nargs="+", default=[0, 1, 2], help="of who is labelled")
    parser.add_argument("--looks", type=int, nargs="+", default=[200, 500])
    parser.add_argument("--ways", nargs="+", default=["frozen", "tuned"])
    parser.add_argument("--tested", default="validation_", help="regular expression on names of scans")
    parser.add_argument("--head_rate", type=float, default=3e-3)
    parser.add_argument("--encoder_rate", type=float, default=3e-4)
    args = parser.parse_args()
    if args.report:
        print(report(args.report, args.arms))
        return
    if not args.store or not args.encoders:
        parser.error("name STORE and ENCODERS")
    torch.set_num_threads(1)
    store = VolumeStore(args.store)
    names = [n for n in store.names if store.has_label(n)]
    test = {n: read_case(store, n) for n in names if re.search(args.tested, n)}
    candidates = [n for n in names if n not in test]
    for count, seed, label_seed, arm, way in itertools.product(
        args.labelled, args.seeds, args.label_seeds, args.arms, args.ways
    ):
        run_seed = 10 * seed + label_seed  # scratch differs by it, too
        folder = args.out / arm
        paths = {look: folder / f"{way}_labelled-{count}_steps-{look}.csv" for look in args.looks}
        if all(p.is_file() and any(r["seed"] == run_seed for r in read_rows(p)) for p in paths.values()):
            continue
        torch.manual_seed(run_seed)
        encoder = build_encoder()
        if arm != "scratch":
            name = f"{arm}_{args.rate}_{seed}_{args.budget}.pt".replace(" ", "_")
            encoder.get_submodule("encoder").load_state_dict(
                torch.load(args.encoders / name, weights_only=True)
            )
        order = np.random.default_rng([label_seed, 5]).permutation(len(candidates))
        labelled = [read_case(store, candidates[i]) for i in order[:count]]
        started = time.process_time()
        scored = run(
            encoder, labelled, test, args.looks, way == "frozen", run_seed, args.head_rate, args.encoder_rate
        )
        for look, rows in scored.items():
            before = read_rows(paths[look]) if paths[look].is_file() else []
            write_rows(paths[look], [r for r in before if r["seed"] != run_seed] + rows)
        means = ", ".join(f"{look}: {np.mean([r['dsc'] for r in rows]):.3f}" for look, rows in scored.items())
        print(
            f"{arm}, {way}, {count} labelled, seed {seed}/{label_seed}: {means} ({time.process_time() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
