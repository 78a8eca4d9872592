import math
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_report import EVIL, Elements, pixels

from custom.cli.scores import compare as compare_command
from custom.evaluation.compare.comparison import compare_runs
from custom.evaluation.compare.overlays import Overlay
from custom.evaluation.compare.page import comparison_page
from custom.evaluation.compare.run_files import read_run
from custom.evaluation.compare.worst_cases import Pictures, worst_overlays
from custom.evaluation.scores.csv_rows import write_rows
from custom.evaluation.scores.metrics import case_rows
from custom.evaluation.scores.rules import plain_rule
from custom.evaluation.scores.score_folder import score_folder
from custom.evaluation.statistics.per_organ import compare

TWO = plain_rule(("liver", "spleen"), 2.0)


def row(case, organ="liver", dsc=0.5, status="ok", **more):
    nothing = {"nsd": dsc, "hd95": math.nan, "reference_ml": 1.0, "prediction_ml": 1.0}
    return (
        {
            "case": case,
            "protocol": "plain",
            "organ": organ,
            "label": 1,
            "status": status,
            "dsc": dsc,
        }
        | nothing
        | more
    )


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    return path


# -- files --------------------------------------------------------------------------------------------


def test_five_folds_are_one_run(tmp_path):
    for fold in (10, 2, 3, 1, 0):
        rows_file(tmp_path / f"fold{fold}" / "rows.csv", [row(f"c{fold}a"), row(f"c{fold}b", dsc=0.7)])
    (tmp_path / "fold1" / "metrics.csv").write_text("filename,mean\nx,0.5\n")  # MONAI's own summary
    rows = read_run(tmp_path)
    assert [(r["case"], r["fold"]) for r in rows[::2]] == [(f"c{n}a", n) for n in (0, 1, 2, 3, 10)]
    assert len(rows) == 10


def test_seeds_and_folds_come_from_the_paths_unless_the_rows_say(tmp_path):
    for seed in (0, 1):
        for fold in (0, 1):
            rows_file(tmp_path / f"run_seed{seed}" / f"fold_{fold}.csv", [row(f"c{fold}")])
    assert sorted((r["seed"], r["fold"], r["case"]) for r in read_run(tmp_path)) == [
        (0, 0, "c0"),
        (0, 1, "c1"),
        (1, 0, "c0"),
        (1, 1, "c1"),
    ]
    rows_file(tmp_path / "own" / "x.csv", [row("c0", fold=4)])
    rows_file(tmp_path / "own" / "y.csv", [row("c1", fold=3)])
    assert [(r["case"], r["fold"]) for r in read_run(tmp_path / "own")] == [("c0", 4), ("c1", 3)]


def test_runs_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no CSV with the columns case and organ"):
        read_run(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv: holds no rows of scores"):
        read_run(tmp_path / "other.csv")
    for name in ("one", "two"):
        rows_file(tmp_path / "twice" / f"{name}.csv", [row("c0")])
    with pytest.raises(ValueError, match="Case 'c0' is in fold 0 and in fold 1"):
        read_run(tmp_path / "twice")


# -- comparing ----------------------------------------------------------------------------------------


def test_runs_of_other_cases_are_refused_by_naming_them_unless_asked(tmp_path):
    a = rows_file(tmp_path / "a.csv", [row("c0", dsc=0.1), row("c1", dsc=0.2), row("left", dsc=0.3)])
    b = rows_file(tmp_path / "b.csv", [row("c0", dsc=0.2), row("c1", dsc=0.4), row("right", dsc=0.3)])
    with pytest.raises(ValueError, match="only in A: left; only in B: right.*--common"):
        compare_runs(a, b)
    text = compare_runs(a, b, common=True).markdown
    assert "| liver | 2 | 0.1500 | 0.3000 | +0.1500 |" in text
    assert "1 only in A, 1 only in B" in text
    assert "Left out, as only A scored them: left." in text and "only B scored them: right." in text


def test_runs_of_other_organs_are_refused_by_naming_them(tmp_path):
    a = rows_file(tmp_path / "a.csv", [row("c0"), row("c0", "spleen"), row("c1"), row("c1", "spleen")])
    b = rows_file(tmp_path / "b.csv", [row("c0"), row("c1")])
    with pytest.raises(ValueError, match="organs in one run only: spleen"):
        compare_runs(a, b)
    c = rows_file(tmp_path / "c.csv", [row("c0"), row("c0", "spleen"), row("c1")])
    with pytest.raises(ValueError, match="scored in one run only: spleen of c1"):
        compare_runs(a, c)


def test_a_failed_case_stays_in_the_mean_and_is_named(tmp_path):
    a = rows_file(tmp_path / "scratch" / "rows.csv", [row("c0", dsc=0.6), row("c1", dsc=0.8)])
    b = rows_file(tmp_path / "alice" / "rows.csv", [row("c0", dsc=0.9), row("c1", dsc=0.0, status="failed")])
    made = compare_runs(a, b, tmp_path / "out")
    assert "# alice against scratch" in made.markdown
    assert "| liver | 2 | 0.7000 | 0.4500 | -0.2500 |" in made.markdown
    assert "1 failed in B" in made.markdown
    assert "Without a prediction in B, counted as 0: c1." in made.markdown
    assert "HD95" not in made.markdown  # not measured
    page = Elements((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "Without a prediction in B, counted as 0: c1." in page.words
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == made.markdown


def test_metrics_that_are_not_there_are_refused(tmp_path):
    a = rows_file(tmp_path / "a.csv", [row("c0"), row("c1")])
    with pytest.raises(ValueError, match=r"a.csv: no numbers 'assd' in it"):
        compare_runs(a, a, metrics=["assd"])


# -- the page -----------------------------------------------------------------------------------------


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    """Three cases; B misses the spleen of case 2 and has no prediction for case 3."""
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])  # x towards Left, y Posterior
    for case in (1, 2, 3):
        labels = np.zeros((31, 29, 13), np.uint8)
        labels[2:12, 8:20, 2:11], labels[20:28, 14:22, 3:9] = 1, 2
        scan = np.where(labels > 0, 60, -900).astype(np.int16)
        write(tmp_path / "images" / f"p{case}_0000.nii.gz", scan, affine)
        write(tmp_path / "labels" / f"p{case}.nii.gz", labels, affine)
        write(tmp_path / "a" / f"p{case}" / f"p{case}_seg.nii.gz", np.roll(labels, case, 0), affine)
        if case < 3:
            found = np.where((labels == 2) & (case == 2), 0, labels).astype(np.uint8)
            write(tmp_path / "b" / f"p{case}_0000_seg.nii.gz", found, affine)
    for run in "ab":
        scored = score_folder(tmp_path / run, tmp_path / "labels", TWO)
        write_rows(tmp_path / f"{run}.csv", scored.rows)
    return tmp_path


def folders(root: Path) -> dict[str, str]:
    names = {"images": "images", "references": "labels", "predictions_a": "a", "predictions_b": "b"}
    return {argument: str(root / folder) for argument, folder in names.items()}


def test_worst_cases_come_turned_to_ras_with_their_failures(two_runs):
    rows_a, rows_b = read_run(two_runs / "a.csv"), read_run(two_runs / "b.csv")
    overlays = worst_overlays(rows_a, rows_b, Pictures(**folders(two_runs)), 2)
    assert [o.caption.split(":")[0] for o in overlays] == [
        "p3, liver",
        "p2, spleen",
    ]  # the larger failure first
    assert "0.000 (failed) in B" in overlays[0].caption and "0.000 (missed) in B" in overlays[1].caption
    failed = overlays[0]
    assert not np.any(failed.prediction_b)
    x, y, _ = np.nonzero(failed.reference)
    assert (x.min(), x.max(), y.min(), y.max()) == (31 - 12, 31 - 3, 29 - 20, 29 - 9)
    assert tuple(failed.spacing) == (2.0, 2.0, 3.0)
    volume, reference = np.asarray(failed.volume), np.asarray(failed.reference)
    assert volume[reference].min() == pytest.approx((60 + 175) / 425)
    assert volume[0, 0, 0] == 0.0


def test_the_command_prints_and_draws(two_runs, capsys):
    compare_command(
        str(two_runs / "a.csv"), str(two_runs / "b.csv"), o=str(two_runs / "out"), **folders(two_runs)
    )
    said = capsys.readouterr().out
    assert "| overall | 3 |" in said and str(two_runs / "out" / "index.html") in said
    page = Elements((two_runs / "out" / "index.html").read_text(encoding="utf-8"))
    pictures = [image for image in page.all("img") if image["src"].startswith("data:image/png")]
    assert len(pictures) == 3 * 2
    green = [
        np.isclose(pixels(p["src"])[..., :3], (0.30, 0.85, 0.45), atol=0.01).all(-1).any() for p in pictures
    ]
    assert all(green)
    assert "p3, liver" in page.words


def test_pictures_are_given_whole_or_not_at_all(two_runs):
    files = str(two_runs / "a.csv"), str(two_runs / "b.csv")
    with pytest.raises(ValueError, match="give --predictions_a, --predictions_b as well"):
        compare_command(*files, o="out", images="x", references="y")
    with pytest.raises(ValueError, match="give a folder with -o"):
        compare_command(*files, **folders(two_runs))
    (two_runs / "images" / "p3_0000.nii.gz").unlink()
    with pytest.raises(ValueError, match="no scan of case 'p3'"):
        compare_command(*files, o=str(two_runs / "out"), **folders(two_runs))
    assert not (two_runs / "out").exists()
    write(two_runs / "images" / "p3_0000.nii.gz", np.zeros((31, 29, 12), np.int16), np.eye(4))
    with pytest.raises(ValueError, match=r"p3_0000.nii.gz has shape \(31, 29, 12\)"):
        compare_command(*files, o=str(two_runs / "out"), **folders(two_runs))


def rows_of_two_runs():
    rule = plain_rule(("liver", "spleen"), 2)
    rng = np.random.default_rng(0)
    rows_a, rows_b = [], []
    for case in range(4):
        reference = np.kron(rng.integers(0, 3, (3, 4, 2)), np.ones((4, 3, 3), int))
        spacing = (1.0, 1.2, 2.0)
        rows_a += case_rows(np.roll(reference, 1, 0), reference, spacing, rule, case=f"case {case}")
        rows_b += case_rows(
            np.where(reference == 2, 0, reference), reference, spacing, rule, case=f"case {case}"
        )
    return rows_a, rows_b, reference, spacing


def test_comparison_page_has_figures_tables_and_worst_cases(tmp_path):
    rows_a, rows_b, reference, spacing = rows_of_two_runs()
    tables = {metric: compare(rows_a, rows_b, metric, draws=200) for metric in ("dsc", "hd95")}
    volume = np.random.default_rng(0).random(reference.shape)
    overlay = Overlay(EVIL, volume, reference == 1, np.roll(reference, 1, 0) == 1, reference == 1, spacing)
    page = comparison_page(tables, rows_a, rows_b, name_a=EVIL, name_b="alice $x$", overlays=[overlay])
    elements = Elements(page.html())
    assert len(elements.all("table")) == 2
    assert len(elements.all("img")) == 2 * 2 + 2
    assert all(image["alt"] for image in elements.all("img"))
    assert page.sections == ["DSC", "HD95 in mm", "Worst cases", "How these numbers were computed"]
    assert "4 missed in B" in elements.words
    assert re.search(r"protocol\s*plain", elements.words)
