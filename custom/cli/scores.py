"""Commands about segmentations: datalists, scores, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from custom.errors import AliceError


def datalist(
    source: str,
    o: str = "datalist.json",
    classes: str = "flare22",
    folds: int = 5,
    seed: int = 0,
    patient_pattern: str | None = None,
    allow_empty: bool = False,
    labelled_only: bool = False,
    leave_out: str | Sequence[str] | None = None,
) -> None:
    """Check a folder of images and labels, and write it as a datalist with folds; nothing, if a case is faulty.

    Args:
        source: folder (FLARE22, BTCV, MSD, CASE_seg beside CASE, ...), or a datalist without folds.
        o: the JSON to write; paths in it are relative to its folder.
        classes: flare22, btcv, or names in label order, "liver,spleen". A dataset.json that names others is refused.
        folds: the patients are dealt into so many; 0 deals none.
        seed: of the deal, and of the few-shot order.
        patient_pattern: regular expression on the path; its first group is the patient.
        allow_empty: let labels pass that hold no organ.
        labelled_only: leave out images that have no label.
        leave_out: cases to leave out, "case7,case9".
    """
    from custom.evaluation.scores.rules import BTCV_ORGANS, FLARE22_ORGANS
    from custom.evaluation.splits.datalists import make_datalist, write_datalist

    known = {"flare22": FLARE22_ORGANS, "btcv": BTCV_ORGANS}
    names = classes.split(",") if isinstance(classes, str) else list(classes)
    with tqdm(desc="cases") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = make_datalist(
            source,
            Path(o).parent,
            classes=known.get(str(classes), names),
            folds=folds,
            seed=seed,
            patient_pattern=patient_pattern,
            allow_empty=allow_empty,
            labelled_only=labelled_only,
            leave_out=leave_out.split(",") if isinstance(leave_out, str) else list(leave_out or []),
            progress=progress,
        )
    if made.problems:
        listed = "\n  ".join(made.problems)
        raise AliceError(
            f"{source}: {len(made.problems)} problem(s), so {o} is not written. Mend them, or leave cases out with "
            f"--leave_out:\n  {listed}"
        )
    write_datalist(o, made.content)
    if made.left_out:
        print(f"Left out: {len(made.left_out)} images without a label, {made.left_out[0]}, ...")
    patients = {record["patient"] for record in made.content["training"]}
    print(f"{o}: {made.content['numTraining']} cases of {len(patients)} patients in {folds} folds.")


def score(
    predictions: str,
    references: str,
    rules: str = "flare22",
    o: str = "rows.csv",
    names: str | Sequence[str] | None = None,
    tolerance: float | Sequence[float] | None = None,
    cases: str | Sequence[Any] | None = None,
    fold: int | None = None,
    split: str | None = None,
    seed: int | None = None,
    label_map: str | None = None,
) -> None:
    """Score label maps against references on the original grid, per case and organ; a missing one counts as 0.

    Args:
        predictions: folder of label maps named after their case (CASE.nii.gz, CASE_seg.nii.gz, ...).
        references: folder or datalist of label maps; decides which cases there are.
        rules: flare22, btcv or plain.
        o: the CSV to write.
        names: of plain: organs in label order, "liver,spleen", or a bundle's metadata.json.
        tolerance: of plain: mm of the NSD (2 by default), one for all or one per organ.
        cases: only these, "case1,case2", or a text file with one a line.
        fold: kept in the rows; with a split, or a datalist that has folds, only its cases are scored.
        split: a bundle's folds.json.
        seed: of the training, kept in the rows.
        label_map: for references that number organs otherwise, "{1: 3, 2: 'liver'}"; other values of theirs are background.
    """
    from custom.evaluation.scores.csv_rows import write_rows
    from custom.evaluation.scores.score_folder import make_rule, read_cases, score_folder, score_markdown

    rule = make_rule(rules, names, tolerance)
    mapped = None if label_map is None else _label_map(label_map, rule.organs)
    with tqdm(desc="cases") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        scored = score_folder(
            predictions,
            references,
            rule,
            cases=read_cases(cases),
            fold=fold,
            split=split,
            seed=seed,
            mapped=mapped,
            progress=progress,
        )
    write_rows(o, scored.rows)
    print(score_markdown(scored, rule))
    print(o)


def _label_map(text: str, organs: Sequence[str]) -> dict[int, int]:
    import yaml

    from custom.data.label_names import read_label_map

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict) or not content:
        raise AliceError(f'--label_map {text}: write "{{1: 3}}" or "{{1: \'liver\'}}".')
    return read_label_map(content, organs)


def compare(
    a: str,
    b: str,
    o: str | None = None,
    metrics: str | Sequence[str] | None = None,
    name_a: str | None = None,
    name_b: str | None = None,
    common: bool = False,
    images: str | None = None,
    references: str | None = None,
    predictions_a: str | None = None,
    predictions_b: str | None = None,
    worst: int = 6,
) -> None:
    """Compare run B with run A: paired differences with intervals and tests, per organ and overall.

    Args:
        a: rows.csv of alice score, or a folder holding one per fold (and seed).
        b: the same of the other run.
        o: folder to write, with comparison.md and index.html.
        metrics: among dsc, nsd, hd95; by default all that were measured.
        name_a: what run A is.
        name_b: what run B is.
        common: compare what both scored, where the runs differ in cases.
        images: folder of the scans; with the next three, the page shows the worst cases.
        references: folder of the label maps that are right.
        predictions_a: folder of the label maps of run A.
        predictions_b: folder of the label maps of run B.
        worst: how many of them.
    """
    from custom.evaluation.compare.comparison import compare_runs
    from custom.evaluation.compare.worst_cases import make_pictures

    made = compare_runs(
        a,
        b,
        o,
        metrics=metrics.split(",") if isinstance(metrics, str) else metrics,
        name_a=name_a,
        name_b=name_b,
        common=common,
        pictures=make_pictures(
            o,
            images=images,
            references=references,
            predictions_a=predictions_a,
            predictions_b=predictions_b,
        ),
        worst=worst,
    )
    print(made.markdown)
    for path in made.written:
        print(path)
    if o and not images:
        print(
            "The page shows the worst cases with --images, --references, --predictions_a and --predictions_b."
        )
