"""Quality of alignment: figures done by hand, warps that do not fold, and a table and page that are written."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPO

from custom.cli import landmarks as cli
from custom.data.phantom.cohort import write_cohort
from custom.data.store.build import build_store
from custom.data.store.volume_store import VolumeStore
from custom.landmarks.aligners.protocol import Match
from custom.landmarks.aligners.simple import CoordinateAligner, RandomAligner
from custom.landmarks.quality.alignment_errors import (
    Figures,
    errors_mm,
    known_warp,
    landmark_error,
    query_aligner,
    truth_error,
)
from custom.landmarks.quality.check_alignment import alignment_table, check_alignment, draw_pairs
from custom.landmarks.quality.ground_truth import phantom_truth, read_landmarks
from custom.landmarks.quality.known_warp import WARPED, deform, draw_warp, write_warped
from custom.landmarks.quality.label_transfer import (
    distance_to_structure,
    label_transfer,
)
from custom.landmarks.quality.page import planes
from custom.landmarks.sam.network import SAM
from custom.landmarks.sam.weights import save_sam
from custom.space import to_world

SHIPPED = REPO / "bundles" / "sam_landmarks" / "models" / "model.safetensors"


class Shift:
    """Answers with the point moved by ``by_mm``; refuses points left of ``refuse_below`` (x)."""

    name, threshold = "shift", 0.5

    def __init__(self, by_mm=(0.0, 0.0, 0.0), refuse_below: float = -1e9) -> None:
        self.by_mm, self.refuse_below = np.array(by_mm), refuse_below

    def align(self, scan_q, point_mm, scan_k, rng) -> Match:
        if point_mm[0] < self.refuse_below:
            return Match(np.full(3, np.nan), -1.0)
        return Match(point_mm + self.by_mm, 1.0)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """Two patients, the second's box of label 1 moved by 8 mm along x."""
    folder = tmp_path_factory.mktemp("shifted")
    for name, start in (("a", 10), ("b", 14)):
        volume, label = np.full((40, 31, 23), 30, np.int16), np.zeros((40, 31, 23), np.uint8)
        volume[:2], volume[start, 10, 8] = -1000, 31  # no two scans hold the same voxels
        label[start : start + 11, 10:17, 8:13] = 1
        affine = np.diag([2.0, 2.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"{name}_label.nii.gz")
    return build_store(folder, tmp_path_factory.mktemp("store"), spacing=(2.0, 2.0, 3.0), progress=False)


def test_label_transfer_by_hand(shifted):
    right = label_transfer(Shift((8.0, 0, 0)), shifted, [("a", "b")], num_points=40)
    assert right.inside[1].row("", "", "mean")["value"] == 1.0
    assert right.centroid_mm[1].by_pair[0][0] == pytest.approx(0.0, abs=1e-6)
    # unmoved, voxels 10 to 20 of 11 stay in 14 to 24 if they are 14 or more: 7 of 11 do, the others are 2 to 8 mm off
    still = label_transfer(Shift(), shifted, [("a", "b")], num_points=4000)
    assert still.inside[1].row("", "", "mean")["value"] == pytest.approx(7 / 11, abs=0.03)
    assert still.distance_mm[1].row("", "", "mean")["value"] == pytest.approx((2 + 4 + 6 + 8) / 11, abs=0.15)
    assert still.centroid_mm[1].by_pair[0][0] == pytest.approx(8.0, abs=1e-6)
    aside = label_transfer(Shift((8.0, 3.0, 0)), shifted, [("a", "b")])
    assert aside.centroid_mm[1].by_pair[0][0] == pytest.approx(3.0, abs=1e-6)


def test_distance_to_a_structure_by_hand():
    mask = np.zeros((9, 7, 5), bool)
    mask[4, 3, 2] = True
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    points = np.array([[8.9, 8.0, 9.9], [8.0, 9.0, 16.0], [0.0, 9.0, 8.0], [np.nan] * 3])
    np.testing.assert_allclose(distance_to_structure(mask, affine, points), [0.0, 8.0, 8.0, np.inf])


def test_a_point_without_an_answer_is_missed_and_infinitely_far(shifted):
    transfer = label_transfer(Shift(refuse_below=1e9), shifted, [("a", "b")], num_points=3)
    assert transfer.inside[1].row("", "", "mean")["value"] == 0.0
    assert np.isinf(transfer.distance_mm[1].by_pair[0]).all()
    answers = query_aligner(Shift(refuse_below=0.0), ("a", "b"), np.array([[-1.0, 0, 0], [1.0, 0, 0]]))
    assert answers.accepted.tolist() == [False, True]
    np.testing.assert_array_equal(errors_mm(answers, np.array([[0.0, 0, 0], [1.0, 3, 4]])), [np.inf, 5.0])
    assert np.isnan(errors_mm(answers, np.full((2, 3), np.nan))).all()


def test_figures_by_hand():
    figures = Figures([np.array([1.0, 2.0, np.nan]), np.array([30.0]), np.array([9.0])])
    row = figures.row("sam", "error", "mean")
    assert row["value"] == 10.5
    assert (row["pairs"], row["points"]) == (3, 4)
    assert row["low"] == 1.5
    assert row["high"] == 30.0
    assert figures.row("sam", "error", "within 10 mm")["value"] == pytest.approx(3 / 4)
    few = Figures(figures.by_pair[:2]).row("sam", "error", "mean")
    assert few["value"] == 11.0 and np.isnan(few["low"]), "two pairs are an interval's ends, not an interval"
    assert Figures([np.array([1.0, np.inf])]).row("sam", "error", "P90")["value"] == np.inf
    assert np.isnan(Figures([]).row("sam", "error", "mean")["value"])


@pytest.mark.parametrize("wave_mm", [8.0, 200.0])
def test_a_warp_never_folds(wave_mm):
    grid = np.stack(np.meshgrid(*[np.arange(-150.0, 150, 11)] * 3, indexing="ij"), -1)
    for seed in range(4):
        warp = draw_warp(np.random.default_rng(seed), np.zeros(3), wave_mm=wave_mm)
        slopes = [(warp(grid + 0.01 * step) - warp(grid)) / 0.01 for step in np.eye(3)]
        assert np.linalg.det(np.stack(slopes, -1)).min() > 0.05
        assert np.linalg.norm(warp(grid) - grid, axis=-1).mean() > 5


def test_a_deformed_scan_shows_what_lies_where_the_warp_leads():
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    grid = to_world(affine, np.stack(np.meshgrid(*map(np.arange, (31, 29, 23)), indexing="ij"), -1))
    hu = np.rint(grid @ [3.0, 5.0, 7.0]).astype(np.int16)  # linear, so that interpolation is exact
    warp = draw_warp(
        np.random.default_rng(0), np.array([30.0, 28, 33]), shift_mm=3.0, rotation_deg=3.0, wave_mm=2.0
    )
    deformed = deform(hu, affine, warp)[10:20, 10:20, 8:15]
    np.testing.assert_allclose(deformed, warp(grid[10:20, 10:20, 8:15]) @ [3.0, 5.0, 7.0], atol=1.1)


def test_the_true_warp_has_no_error_and_others_have(store, tmp_path):
    warped, warps = write_warped(store, store.names[:2], tmp_path)
    assert sorted(warped.names) == sorted([*store.names[:2], *(n + WARPED for n in store.names[:2])])

    class Oracle(Shift):
        def align(self, scan_q, point_mm, scan_k, rng) -> Match:
            return Match(warps[scan_q](point_mm[None])[0], 1.0)

    perfect, still = (known_warp(a, warped, warps, 15).row("", "", "mean") for a in (Oracle(), Shift()))
    assert perfect["value"] == pytest.approx(0, abs=1e-9)
    assert perfect["points"] > 10
    assert still["value"] > 5


def test_phantoms_have_a_true_correspondence(tmp_path):
    images = write_cohort(tmp_path / "phantoms", 2, seed=1, size="small")
    made = build_store(
        tmp_path / "phantoms" / "images", tmp_path / "store", spacing=(5.0, 5.0, 5.0), progress=False
    )
    assert len(images) == len(made.names) == 2
    folder = tmp_path / "phantoms"
    pairs, truth = draw_pairs(made, 9), phantom_truth(made, folder)
    points = to_world(made.affine(made.names[0]), made.body_voxels(made.names[0])[::997])
    own = truth(made.names[0], points, made.names[0])
    assert np.nanmax(np.linalg.norm(own - points, axis=1)) < 0.5

    class Oracle(Shift):
        def align(self, scan_q, point_mm, scan_k, rng) -> Match:
            return Match(truth(scan_q, point_mm[None], scan_k)[0], 1.0)

    assert truth_error(Oracle(), made, truth, pairs, 10).row("", "", "mean")["value"] < 0.5
    near, control = (
        truth_error(a, made, truth, pairs, 30).row("", "", "mean")["value"]
        for a in (CoordinateAligner(made), RandomAligner(made))
    )
    assert near < 40 < control
    with pytest.raises(ValueError, match="alice phantom"):
        truth_error(Oracle(), made, phantom_truth(made, tmp_path), pairs, 1)


def test_landmarks_are_read_and_measured(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text("scan,landmark,x,y,z\na,carina,1,2,3\nb,carina,1,5,7\na,hilum,0,0,0\n")
    marks = read_landmarks(path)
    figures = landmark_error(Shift(), marks, [("a", "b"), ("b", "a")])
    assert [values.tolist() for values in figures.by_pair] == [[5.0], [5.0]]
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode("utf-8-sig"))  # as Excel saves it
    assert str(read_landmarks(path)) == str(marks)
    path.write_text("scan,landmark,x,y,z\na,carina,1,,3\n")
    with pytest.raises(ValueError, match=r"marks\.csv, line 2"):
        read_landmarks(path)
    path.write_text("scan,x,y,z\n")
    with pytest.raises(ValueError, match=r"landmark missing"):
        read_landmarks(path)


def test_every_aligner_gets_the_same_table(store):
    pairs = draw_pairs(store, 3)
    rows = alignment_table(
        {"shift": Shift((0, 0, 4.0)), "random": RandomAligner(store)}, store, pairs, num_points=4
    )
    kinds = [
        [(r["measure"], r["statistic"]) for r in rows if r["aligner"] == name] for name in ("shift", "random")
    ]
    assert kinds[0] == kinds[1]
    value = {(r["aligner"], r["measure"], r["statistic"]): r["value"] for r in rows}
    assert value["shift", "cycle error, mm", "mean"] == pytest.approx(8.0)
    assert value["random", "cycle error, mm", "mean"] > 30
    assert value["random", "in same structure", "mean"] < 0.5


def test_check_alignment_writes_table_page_and_pictures(store, tmp_path):
    aligners = {"coordinate": CoordinateAligner(store), "shift": Shift(refuse_below=1e9)}
    rows = check_alignment(
        store, aligners, tmp_path / "out é", pairs=2, points=2, pictures=2, label_names={1: "Leber <b>"}
    )
    names = sorted(path.name for path in (tmp_path / "out é").iterdir())
    assert names == [
        "00_coordinate.png",
        "00_shift.png",
        "01_coordinate.png",
        "01_shift.png",
        "index.html",
        "table.csv",
    ]
    html = Path(tmp_path / "out é" / "index.html").read_text(encoding="utf-8")
    assert "Leber &lt;b&gt;" in html
    assert "(refused)" in html
    assert len((tmp_path / "out é" / "table.csv").read_text(encoding="utf-8").splitlines()) == len(rows) + 1


def test_the_command_takes_lists_as_text_and_deforms_scans(store, tmp_path, capsys):
    cli.check_alignment(
        str(store.path),
        str(tmp_path),
        aligners="coordinate,random",
        names="case0,case1",
        pairs=1,
        points=2,
        warps=1,
    )
    said = capsys.readouterr().out
    assert said.startswith("measure | coordinate | random")
    table = (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert (
        'coordinate,"known warp, error, mm",mean' in table and 'random,"known warp, error, mm",P90' in table
    )
    assert VolumeStore(tmp_path / "warped").names == ["case0", "case0~warped"]


def test_what_few_scans_have_is_measured_on_pairs_of_those(store, tmp_path):
    """Of 30 pairs one is drawn, and two of six scans are marked."""
    csv = tmp_path / "marks.csv"
    lines = [f"{name},carina,{10.0 + i},0,0" for i, name in enumerate(("case1", "case4"))]
    csv.write_text("\n".join(["scan,landmark,x,y,z", *lines]))
    aligners = {"shift": Shift()}
    rows = check_alignment(store, aligners, tmp_path / "out", pairs=1, points=2, pictures=0, landmark_csv=csv)
    (mean,) = [r for r in rows if r["measure"] == "landmark error, mm" and r["statistic"] == "mean"]
    assert np.isfinite(mean["value"]) and mean["pairs"] == 1
    csv.write_text("\n".join(["scan,landmark,x,y,z", lines[0]]))
    with pytest.raises(ValueError, match="marks case1 of .*two patients"):
        check_alignment(store, aligners, tmp_path / "out", pairs=1, landmark_csv=csv)


def test_deformed_scans_are_embedded_with_the_weights_of_the_others(store, tmp_path):
    torch.manual_seed(0)
    save_sam(tmp_path / "mine.safetensors", SAM(4, 8).eval(), {})
    cli.embed(str(store.path), str(tmp_path / "embedded"), weights=str(tmp_path / "mine.safetensors"))
    with pytest.raises(ValueError, match="other weights.*--weights"):
        cli.check_alignment(
            str(store.path), str(tmp_path / "out"), str(tmp_path / "embedded"), warps=1, weights=str(SHIPPED)
        )
    assert not (tmp_path / "out").exists()


def test_pairs_are_of_different_patients(store):
    assert len(draw_pairs(store, 1000)) == 30
    assert all(store.patient(q) != store.patient(k) for q, k in draw_pairs(store, 7))
    with pytest.raises(ValueError, match="two patients"):
        draw_pairs(store, 5, names=["case0"])


def test_planes_show_right_on_the_left_and_superior_on_top(store):
    name = store.names[0]
    centre = to_world(store.affine(name), np.array(store.shape(name)) / 2)
    picture = planes(store, name, centre, side_mm=400.0, pixels=90)[..., 0]
    assert picture.shape == (90, 270)
    shown = planes(store, name, centre + np.array([60.0, 0, 0]), side_mm=400.0, pixels=90)[..., 0]
    # looking from farther right, the body moves to the picture's right
    columns = np.arange(90)
    assert (shown[:, :90].sum(0) @ columns) / shown[:, :90].sum() > (
        picture[:, :90].sum(0) @ columns
    ) / picture[:, :90].sum()
