"""The page of ``alice report``: what a run has learnt so far, its curves beside what they should look like, and its alarms."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from custom.data.store.volume_store import VolumeStore
from custom.engine.checkpoint import CheckpointError
from custom.engine.run_log import read_log
from custom.errors import AliceError
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.pairs import AlignedPair
from custom.methods.picture import predicts_raw, run_picture
from custom.methods.run_folder import Run, load_run
from custom.methods.views import MASKINGS, Masking
from custom.report import COLOUR_A, COLOUR_B, Page

# names of curves -> what they should look like; the first that exist are drawn
CURVES = {
    "Loss": (
        ("total",),
        "It falls fast at first, then slowly. A loss near 0 within a few steps is a constant answer, not a success.",
    ),
    "Reconstruction, l_r": (
        ("l_r",),
        "Of normalised patches, each patch's own mean scores 1 for every crop that is filled in (Alice fills in two). It falls below "
        "that slowly, and flattens.",
    ),
    "Place matching, l_dv": (
        ("l_dv",),
        "It starts near the logarithm of the number of tokens, and falls while hits rise.",
    ),
    "Hits of place matching": (
        ("place/hits", "place/chance"),
        "The share of tokens that find their place in the other patient rises above chance. Near 1 while retrieval falls, "
        "tokens tell their number in the crop instead of the anatomy.",
    ),
    "Error of place matching, mm": (("place/mm",), "It falls towards the distance of two tokens."),
    "Hits of composition and decomposition": (
        ("l_comp/hits", "l_decomp/hits"),
        "They rise above one in the number of merged, and of split, tokens.",
    ),
    "Divergence from the teacher": (
        ("l_global/kl", "l_d/kl", "l_cls/kl"),
        "It falls. Near 0 while the teacher's answers are uniform, it says nothing.",
    ),
    "Gradient": (("grad_norm",), "Steady after the warm-up. Jumps say that the learning rate is too high."),
    "Learning rate": (("learning_rate",), "It rises in the warm-up, then falls as a cosine."),
    "Spread of pooled vectors": (
        ("monitor/std_student", "monitor/std_teacher"),
        "1 is healthy; near 0 all crops look alike to the network.",
    ),
    "Rank of the teacher's vectors": (("monitor/rank_teacher",), "Well above 1."),
    "Samples a second": (("samples_per_second",), "Steady. Dips are probes, checkpoints, or other work on the machine."),
}  # fmt: skip
PROBE = {
    "retrieval": "How often the same region of another held-back patient is the nearest one.",
    "place_mm": "How far the most similar token of another patient lies from the right place, mm. Lower is better.",
    "linear": "How well organs are read off single tokens (mean r).",
}
COLOURS = (COLOUR_A, COLOUR_B, "#5f9e6e", "#a5678e")


class Shown(NamedTuple):
    """A run as the page shows it."""

    name: str
    folder: Path
    log: list[dict[str, Any]]
    run: Run | None  # None before the first checkpoint


def read_run(folder: str | Path) -> Shown:
    """A run that has ended, or that is still being written.

    Raises:
        AliceError: if the folder holds no log of a run.
    """
    folder = Path(folder)
    log = read_log(folder)
    if not log:
        raise AliceError(f"{folder}: no log of a run here (looked for {folder / 'log.jsonl'}).")
    try:
        run = load_run(folder)
    except CheckpointError:
        run = None
    return Shown(folder.resolve().name, folder, log, run)


def ended(folder: str | Path) -> bool:
    """Whether a run has all its steps."""
    one = read_run(folder)
    return one.run is not None and one.run.iteration >= one.run.summary["iterations"]


def run_page(folders: Sequence[str | Path], refresh: int | None = None) -> Page:
    """One page of one run, or of two side by side.

    Args:
        folders: ``output_dir`` of each run.
        refresh: seconds after which a browser loads the page again.

    Raises:
        AliceError: if a folder holds no log, or there are more than two runs.
    """
    if not 1 <= len(folders) <= 2:
        raise AliceError(f"A report shows one run or two, got {len(folders)}.")
    shown = [read_run(folder) for folder in folders]
    if len({one.name for one in shown}) < len(shown):
        shared = os.path.commonpath([one.folder.resolve() for one in shown])
        shown = [one._replace(name=one.folder.resolve().relative_to(shared).as_posix()) for one in shown]
    titles = " and ".join(one.name for one in shown)
    page = Page(f"Pre-training: {titles}", _lead(shown), footer="Made by alice report.", refresh=refresh)
    for one in shown:
        if len(shown) > 1:
            page.text(one.name)
        page.facts(_facts(one))
    _alarms(page, shown)
    _probe(page, shown)
    page.section("Curves")
    for title, (keys, meaning) in CURVES.items():
        if figure := _curves(shown, keys):
            page.figure(figure, f"{title}. {meaning}")
    _other_terms(page, shown)
    page.section("What it sees")
    for one in shown:
        _picture(page, one)
    _settings(page, shown)
    return page


def _lead(shown: Sequence[Shown]) -> str:
    parts = []
    for one in shown:
        step = one.log[-1]["step"]
        of = f" of {one.run.summary['iterations']}" if one.run and "iterations" in one.run.summary else ""
        method = f" ({one.run.summary['method']})" if one.run else ""
        parts.append(f"{one.name}{method}: {step}{of} steps.")
    return " ".join(parts)


def _facts(one: Shown) -> dict[str, Any]:
    last = one.log[-1]
    facts: dict[str, Any] = {"steps": last["step"]}
    speeds = [line["samples_per_second"] for line in one.log if line.get("samples_per_second")]
    if speeds:
        facts["samples a second"] = sorted(speeds)[len(speeds) // 2]
    if one.run:
        facts |= {"scans": one.run.summary["scans"], "held back": len(one.run.summary["held_back"])}
        total = one.run.summary.get("iterations", last["step"])
        if last["step"] < total and speeds and "samples_per_step" in one.run.summary:
            left = (total - last["step"]) * one.run.summary["samples_per_step"] / facts["samples a second"]
            facts["hours left"] = left / 3600
    facts["alarms"] = sum(len(line.get("alarms", [])) for line in one.log)
    return facts


def _alarms(page: Page, shown: Sequence[Shown]) -> None:
    """Each alarm once, with its latest words; its numbers change from step to step."""
    rows: dict[tuple[str, str], tuple[list[int], str]] = {}
    for one in shown:
        for line in one.log:
            for text in line.get("alarms", []):
                steps, _ = rows.get((one.name, text[:30]), ([], ""))
                rows[one.name, text[:30]] = ([*steps, line["step"]], text)
    page.section("Alarms")
    if not rows:
        page.text("None.")
        return
    cells = [
        (name, f"{steps[0]} to {steps[-1]}", len(steps), text) for (name, _), (steps, text) in rows.items()
    ]
    page.table(("run", "steps", "times", "what"), cells)


def _probe(page: Page, shown: Sequence[Shown]) -> None:
    rows = []
    for one in shown:
        found = [line for line in one.log if line.get("probe/retrieval") is not None]
        for state, line in (("first", found[0]), ("last", found[-1])) if found else ():
            name = "untrained" if line["step"] == 0 else f"step {line['step']}"
            if state == "first" or line is not found[0]:
                rows.append((one.name, name, *(line.get(f"probe/{key}") for key in PROBE)))
    page.section("Probe of the held-back scans")
    if not rows:
        page.text(
            "No probe so far: it needs held-back scans of two patients (held_back_patients), and comes every probe_every steps."
        )
        return
    page.table(
        ("run", "encoder", "retrieval", "place, mm", "linear"),
        rows,
        "alice probe RUN adds raw intensities and intervals.",
    )
    for key, meaning in PROBE.items():
        chance = {"retrieval": "probe/chance", "place_mm": "probe/place_chance_mm"}.get(key)
        if figure := _curves(shown, (f"probe/{key}", *([chance] if chance else [])), points=True):
            page.figure(figure, f"{key}. {meaning}")


def _curves(shown: Sequence[Shown], keys: Sequence[str], points: bool = False) -> Figure | None:
    """Values over steps; the first run is drawn in one colour, the second in another. None if nobody has any."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    styles = ("-", "--", ":")
    for number, one in enumerate(shown):
        for style, key in zip(styles, keys, strict=False):
            known = [(line["step"], line[key]) for line in one.log if line.get(key) is not None]
            if known:
                label = " ".join([one.name] * (len(shown) > 1) + [key.split("/")[-1]] * (len(keys) > 1))
                marker = "." if points or len(known) < 30 else None
                axes.plot(*zip(*known, strict=True), style, color=COLOURS[number], label=label, marker=marker)
    if not axes.lines:
        return None
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    if any(label and not label.startswith("_") for label in (str(line.get_label()) for line in axes.lines)):
        axes.legend(frameon=False, fontsize=8)
    return figure


def _other_terms(page: Page, shown: Sequence[Shown]) -> None:
    """Terms and meters of methods that the list above does not know."""
    known = {key for keys, _ in CURVES.values() for key in keys}
    terms = [term for one in shown if one.run for term in one.run.summary.get("terms", [])]
    for term in dict.fromkeys(terms):
        if term not in known and (figure := _curves(shown, (term,))):
            page.figure(figure, f"{term}, a term of the loss.")


def _picture(page: Page, one: Shown) -> None:
    if one.run is None:
        page.text(f"{one.name}: no checkpoint so far.")
        return
    try:
        figure, names = picture_of(one.run, one.log)
    except AliceError as error:  # the store may be on another machine
        page.text(f"{one.name}: no picture ({error}).")
        return
    page.figure(
        figure,
        f"{one.name} after {one.run.iteration} steps: {names}.",
        alt=f"Reconstruction and matched place of {one.name}",
    )


def picture_of(run: Run, log: list[dict[str, Any]]) -> tuple[Figure, str]:
    """The picture of a run, on two held-back patients at one place; and the names of their scans.

    Raises:
        AliceError: if the store is not there.
    """
    summary, store = run.summary, VolumeStore(run.summary["store_dir"])
    held = summary["held_back"]
    pairs = AlignedPair(
        store,
        CoordinateAligner(store),
        summary["crop_size"],
        window_hu=summary["window_hu"],
        names=held if len({store.patient(n) for n in held}) > 1 else store.names,
        max_offset=0.0,
    )
    pair = pairs[0]
    units = run.student.encoder.units(tuple(summary["crop_size"]))
    known = summary["masking"]["kind"] in MASKINGS  # other masks are of methods that fill nothing in
    hidden = Masking(**summary["masking"] if known else {})(torch.tensor([0]), units)
    crops = pair["crop_q"][None], pair["crop_k"][None]
    figure = run_picture(run.student, log, summary["terms"], *crops, hidden, predicts_raw(summary))
    return figure, f"{pair['scan_q']} and {pair['scan_k']}"


def _settings(page: Page, shown: Sequence[Shown]) -> None:
    flat = [_flat(one.run.summary) if one.run else {} for one in shown]
    names = list(dict.fromkeys(name for one in flat for name in one))
    page.section("Settings")
    if len(shown) > 1:
        names = [name for name in names if len({str(one.get(name)) for one in flat}) > 1]
        page.text("Those in which the runs differ." if names else "The runs have the same settings.")
    if names:
        page.table(
            ("setting", *(one.name for one in shown)),
            [(name, *(one.get(name) for one in flat)) for name in names],
        )


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("held_back", "trained_on", "store_dir"):
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key} ")
        else:
            found[f"{before}{key}"] = value if not isinstance(value, float) or math.isfinite(value) else None
    return found
