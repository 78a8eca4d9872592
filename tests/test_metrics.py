import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.metrics.utils import create_table_neighbour_code_to_surface_area

from custom import files
from custom.errors import AliceError
from custom.evaluation.compare.run_files import read_run
from custom.evaluation.scores import surfaces
from custom.evaluation.scores.csv_rows import read_rows, write_rows
from custom.evaluation.scores.metrics import case_rows, dice, flare_scores, hd95, nsd
from custom.evaluation.scores.rules import BTCV, BTCV_ORGANS, FLARE22, FLARE22_ORGANS, ScoringRule, plain_rule

SPACING = (0.7, 1.3, 2.9)
SHAPE = (17, 13, 11)
LIVER, AORTA, CAVA, ESOPHAGUS = 1, 5, 6, 10


def box(x: tuple[int, int], y: tuple[int, int], z: tuple[int, int], shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slice(*x), slice(*y), slice(*z)] = True
    return mask


def blob(seed: int, shape=SHAPE) -> np.ndarray:
    """A few overlapping boxes, some of them at the volume's border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for _ in range(4):
        start = [rng.integers(0, size - 2) for size in shape]
        mask[tuple(slice(low, low + rng.integers(1, 7)) for low in start)] = True
    return mask


# -- NSD ----------------------------------------------------------------------------------------------


def corner_areas(mask: np.ndarray, spacing) -> dict[tuple[int, int, int], float]:
    """Surface area at every corner between voxels, where the 2x2x2 neighbourhood is a box's: by geometry.

    A face carries the rectangle around its corner; an edge two half rectangles seen as one slope: the
    marching-cubes patch through the middles of the voxel edges; a corner (1 or 7 of 8) one triangle.
    """
    hx, hy, hz = spacing
    halves = {0: (hy / 2, hz / 2, hx), 1: (hx / 2, hz / 2, hy), 2: (hx / 2, hy / 2, hz)}  # sides, along
    padded = np.pad(mask, 1)
    areas = {}
    for corner in itertools.product(*(range(size + 1) for size in mask.shape)):
        cell = padded[tuple(slice(at, at + 2) for at in corner)]
        inside = int(cell.sum())
        if inside in (0, 8):
            continue
        flat = [axis for axis in range(3) if (np.take(cell, 0, axis) == np.take(cell, 1, axis)).all()]
        if inside in (1, 7):
            u, v = np.array([-hx, hy, 0]) / 2, np.array([-hx, 0, hz]) / 2
            areas[corner] = float(np.linalg.norm(np.cross(u, v)) / 2)
        elif inside == 4 and len(flat) == 2:
            (across,) = {0, 1, 2} - set(flat)
            areas[corner] = math.prod(spacing) / spacing[across]
        elif inside in (2, 6) and len(flat) == 1:
            side_1, side_2, along = halves[flat[0]]
            areas[corner] = math.hypot(side_1, side_2) * along
        else:
            raise AssertionError("not a box")
    return areas


def brute_force_nsd(a: np.ndarray, b: np.ndarray, spacing, tolerance_mm: float) -> float:
    areas_a, areas_b = corner_areas(a, spacing), corner_areas(b, spacing)

    def found(areas, others):
        points, targets = (np.array(list(part)) for part in (areas, others))
        steps = (points[:, None] - targets[None]) * np.array(spacing)
        near = np.sqrt((steps**2).sum(-1)).min(1) <= tolerance_mm
        return np.array(list(areas.values()))[near].sum()

    return (found(areas_a, areas_b) + found(areas_b, areas_a)) / (
        sum(areas_a.values()) + sum(areas_b.values())
    )


@pytest.mark.parametrize("tolerance_mm", [0.0, 0.7, 1.0, 1.3, 2.0, 2.9, 3.5])
@pytest.mark.parametrize(
    "a, b",
    [
        (box((3, 9), (2, 7), (3, 8)), box((4, 9), (2, 9), (3, 7))),
        (box((0, 17), (0, 13), (0, 11)), box((1, 16), (2, 13), (0, 9))),  # at the volume's border
        (box((5, 6), (5, 6), (5, 6)), box((5, 8), (5, 6), (4, 7))),  # one voxel, and a thin plate
    ],
)
def test_nsd_is_the_area_of_marching_cubes_patches_within_the_tolerance(a, b, tolerance_mm):
    assert nsd(a, b, SPACING, tolerance_mm) == pytest.approx(
        brute_force_nsd(a, b, SPACING, tolerance_mm), abs=1e-6
    )


def test_nsd_of_two_plates_by_hand():
    # 1-voxel plates over the whole cross-section of a 5 x 7 x 9 volume, two voxels (4 mm) apart in z.
    # Corners, x by y: 4 x 6 inside (face), 2 * 4 + 2 * 6 on edges, 4 at corners, on two levels of z each.
    # The lower plate's upper level lies 2 mm from the upper plate's lower level; the other levels 4 mm off.
    # By symmetry every level carries half of its plate's area, so at 2 mm half of all area is found.
    lower, upper = box((0, 5), (0, 7), (2, 3), (5, 7, 9)), box((0, 5), (0, 7), (4, 5), (5, 7, 9))
    assert nsd(lower, upper, (1, 1, 2), 1.99) == 0.0
    assert nsd(lower, upper, (1, 1, 2), 2.0) == pytest.approx(0.5, abs=1e-7)
    assert nsd(lower, upper, (1, 1, 2), 4.0) == 1.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_areas_are_those_of_monais_table(spacing):
    table, kernel = create_table_neighbour_code_to_surface_area(spacing)
    np.testing.assert_allclose(surfaces._surface_areas(spacing), table.numpy(), rtol=1e-6)
    assert kernel.flatten().tolist() == [128 >> bit for bit in range(8)]


def test_nsd_equals_monai_with_subvoxels():
    for seed in range(12):
        a, b = blob(seed), blob(seed + 100)
        ours = nsd(a, b, SPACING, 1.9)
        one_hot = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (a, b)]
        monai = compute_surface_dice(
            *one_hot, [1.9], include_background=True, use_subvoxels=True, spacing=SPACING
        )
        assert ours == pytest.approx(monai.item(), abs=5e-7)


def test_nsd_turns_with_the_axes():
    a, b = blob(3), blob(4)
    turned = nsd(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (SPACING[2], SPACING[0], SPACING[1]), 1.0)
    assert turned == pytest.approx(nsd(a, b, SPACING, 1.0), abs=1e-7)
    assert nsd(a, b, SPACING[::-1], 1.0) != pytest.approx(turned, abs=1e-3)


def test_background_around_the_organs_does_not_matter():
    a, b = blob(5), blob(6)
    padding = ((4, 0), (0, 9), (2, 3))
    assert nsd(np.pad(a, padding), np.pad(b, padding), SPACING, 1.0) == nsd(a, b, SPACING, 1.0)
    assert hd95(np.pad(a, padding), np.pad(b, padding), SPACING) == hd95(a, b, SPACING)


def test_a_surface_at_the_tolerance_is_within_it():
    a, b = box((2, 7), (2, 7), (2, 7)), box((7, 12), (2, 7), (2, 7))
    assert nsd(a, b, (0.6, 0.6, 0.6), 3.0) == 1.0  # five steps of 0.6 mm
    assert nsd(a, b, np.float32([0.6, 0.6, 0.6]), 3.0) < 1.0  # zooms are float32: 5 * 0.60000002 mm


# -- DSC and HD95 -------------------------------------------------------------------------------------


def test_dice_by_hand():
    a, b = box((0, 4), (0, 3), (0, 2)), box((2, 5), (0, 3), (0, 2))  # 24 and 18 voxels, 12 in both
    assert dice(a, b) == 2 * 12 / 42
    assert dice(torch.from_numpy(a), torch.from_numpy(b)) == dice(a, b)


def test_hd95_is_monais():
    for seed in range(6):
        a, b = blob(seed), blob(seed + 50)
        one_hot = [torch.from_numpy(np.pad(mask, 1))[None, None].float() for mask in (a, b)]
        monai = compute_hausdorff_distance(*one_hot, include_background=True, percentile=95, spacing=SPACING)
        assert hd95(a, b, SPACING) == pytest.approx(monai.item(), abs=1e-4)


def test_a_shifted_plate_is_as_far_as_it_was_shifted():
    a, b = box((0, 17), (0, 13), (2, 3)), box((0, 17), (0, 13), (5, 6))
    assert hd95(a, b, SPACING) == pytest.approx(3 * 2.9)


def test_empty_masks_have_no_score_together_and_the_worst_one_alone():
    empty, organ = np.zeros(SHAPE, bool), blob(0)
    for score in (dice(empty, empty), nsd(empty, empty, SPACING, 2), hd95(empty, empty, SPACING)):
        assert math.isnan(score)
    for pair in ((empty, organ), (organ, empty)):
        assert (dice(*pair), nsd(*pair, SPACING, 2), hd95(*pair, SPACING)) == (0.0, 0.0, math.inf)


# -- FLARE22 ------------------------------------------------------------------------------------------


def labelled(**boxes: np.ndarray) -> np.ndarray:
    labels = np.zeros(SHAPE, np.int64)
    for name, mask in boxes.items():
        labels[mask] = int(name.removeprefix("label_"))
    return labels


def test_flare_names_come_in_label_order_with_their_tolerances():
    scores = flare_scores(np.zeros(SHAPE, int), np.zeros(SHAPE, int), SPACING)
    assert tuple(scores) == FLARE22_ORGANS
    tolerances = dict(zip(FLARE22.organs, FLARE22.tolerances_mm, strict=True))
    assert tolerances["duodenum"] == 7
    assert tolerances["esophagus"] == tolerances["left kidney"] == 3
    assert tolerances["aorta"] == tolerances["gallbladder"] == 2
    assert [organ for organ, mm in tolerances.items() if mm == 5] == ["liver", "pancreas", "stomach"]


def test_flare_scores_absent_organs_1_and_0():
    reference, prediction = labelled(label_3=blob(0)), labelled(label_4=blob(0))
    scores = flare_scores(prediction, reference, SPACING)
    assert scores.pop("spleen") == scores.pop("pancreas") == (0.0, 0.0)
    assert set(scores.values()) == {(1.0, 1.0)}


def test_flare_leaves_out_slices_beyond_the_reference_and_its_last_one_for_tubes_only():
    tube, longer = box((5, 9), (4, 8), (2, 8)), box((5, 9), (4, 8), (0, 11))
    for label in (AORTA, CAVA, ESOPHAGUS):
        scores = flare_scores(
            labelled(**{f"label_{label}": longer}), labelled(**{f"label_{label}": tube}), SPACING
        )
        assert scores[FLARE22_ORGANS[label - 1]] == (1.0, 1.0)

    # the last labelled slice is excluded, whatever the prediction holds there; the first is not
    without_last, without_first = box((5, 9), (4, 8), (2, 7)), box((5, 9), (4, 8), (3, 8))
    aorta = labelled(label_5=tube)
    assert flare_scores(labelled(label_5=without_last), aorta, SPACING)["aorta"] == (1.0, 1.0)
    # slices 2 to 6 hold 16 voxels each: 2 * 64 / (64 + 80)
    assert flare_scores(labelled(label_5=without_first), aorta, SPACING)["aorta"][0] == round(128 / 144, 4)

    liver = flare_scores(labelled(label_1=longer), labelled(label_1=tube), SPACING)["liver"]
    assert liver[0] == round(2 * 6 / 17, 4)


def test_flare_measures_the_surface_of_the_cut_tube():
    reference = blob(1)
    prediction = np.roll(reference, (2, 1), (0, 2))
    z = np.flatnonzero(reference.any((0, 1)))
    cut = np.s_[..., z[0] : z[-1]]
    dsc, surface = flare_scores(labelled(label_6=prediction), labelled(label_6=reference), SPACING)[
        "inferior vena cava"
    ]
    assert dsc == round(dice(prediction[cut], reference[cut]), 4)
    assert surface == round(nsd(prediction[cut], reference[cut], SPACING, 2), 4)
    assert surface != round(nsd(prediction, reference, SPACING, 2), 4)


def test_a_tube_of_one_slice_has_no_score_unless_it_is_missed():
    disc, empty = box((5, 9), (4, 8), (3, 4)), np.zeros(SHAPE, bool)
    scores = flare_scores(labelled(label_5=disc), labelled(label_5=disc), SPACING)["aorta"]
    assert np.isnan(scores).all()
    assert flare_scores(labelled(label_5=empty), labelled(label_5=disc), SPACING)["aorta"] == (0.0, 0.0)
    (row,) = [
        r
        for r in case_rows(labelled(label_5=disc), labelled(label_5=disc), SPACING, FLARE22)
        if r["label"] == 5
    ]
    assert row["status"] == "unscored"


def test_a_tube_predicted_outside_the_scored_slices_is_missed():
    tube, above = box((5, 9), (4, 8), (2, 8)), box((5, 9), (4, 8), (7, 10))
    rows = case_rows(labelled(label_5=above), labelled(label_5=tube), SPACING, FLARE22)
    assert [(row["status"], row["dsc"], row["nsd"]) for row in rows if row["label"] == AORTA] == [
        ("missed", 0, 0)
    ]


def test_flare_nsd_is_0_below_a_dsc_of_a_fifth():
    # 10 x 1 x 1 voxels each: two in common is 0.2, one is 0.1; all surfaces lie within the liver's 5 mm
    reference, shift_8, shift_9 = (box((at, at + 10), (4, 5), (4, 5), (20, 9, 9)) for at in (0, 8, 9))
    fine = (0.5, 0.5, 0.5)
    assert flare_scores(shift_8.astype(int), reference.astype(int), fine)["liver"] == (0.2, 1.0)
    assert flare_scores(shift_9.astype(int), reference.astype(int), fine)["liver"] == (0.1, 0.0)
    assert nsd(shift_9, reference, fine, 5) == 1.0


def test_flare_rounds_to_four_decimals():
    reference = blob(1)
    prediction = np.roll(reference, (2, 1), (0, 2))
    for score in flare_scores(labelled(label_3=prediction), labelled(label_3=reference), SPACING)["spleen"]:
        assert 0 < score < 1
        assert score == round(score, 4)


def test_kind_of_array_does_not_matter():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 14, (2, *SHAPE))
    expected = flare_scores(prediction, reference, SPACING)
    assert expected == flare_scores(
        torch.from_numpy(prediction), torch.from_numpy(reference).to(torch.uint8), SPACING
    )
    assert expected == flare_scores(
        np.asfortranarray(prediction, np.float64), reference[:], np.array(SPACING)
    )


# -- BTCV and rows ------------------------------------------------------------------------------------


def test_btcv_counts_an_organ_the_reference_lacks_as_0():
    reference = labelled(label_1=box((2, 8), (2, 6), (2, 6)), label_6=box((9, 15), (2, 6), (2, 6)))
    prediction = labelled(label_1=box((2, 8), (2, 6), (2, 6)), label_6=box((12, 15), (2, 6), (2, 6)))
    scores = {row["organ"]: row["dsc"] for row in case_rows(prediction, reference, SPACING, BTCV)}
    assert tuple(scores) == BTCV_ORGANS
    assert (scores["spleen"], scores["liver"], scores["aorta"]) == (1.0, 2 / 3, 0.0)
    assert sum(scores.values()) == pytest.approx(1 + 2 / 3)  # so a mean over them is one over all 13


def test_rows_say_what_became_of_each_organ():
    rule = plain_rule(("ok", "missed", "spurious", "absent"), tolerance_mm=2)
    cube = box((2, 6), (2, 6), (2, 6))
    reference = labelled(label_1=cube, label_2=box((8, 10), (2, 6), (2, 6)))
    prediction = labelled(label_1=cube, label_3=box((8, 10), (2, 6), (2, 7)))
    rows = case_rows(prediction, reference, SPACING, rule, case="0007")
    assert [row["status"] for row in rows] == [row["organ"] for row in rows]
    assert [row["dsc"] for row in rows[:3]] == [1.0, 0.0, 0.0]
    assert [row["hd95"] for row in rows[:3]] == [0.0, math.inf, math.inf]
    assert np.isnan([rows[3][score] for score in ("dsc", "nsd", "hd95")]).all()
    voxel_ml = 0.7 * 1.3 * 2.9 / 1000
    assert [row["reference_ml"] / voxel_ml for row in rows] == pytest.approx([64, 32, 0, 0])
    assert [row["prediction_ml"] / voxel_ml for row in rows] == pytest.approx([64, 0, 40, 0])


def test_rows_come_back_from_a_file(tmp_path: Path):
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 14, (2, *SHAPE))
    prediction[prediction == 4], reference[reference == 9] = 0, 0
    reference[reference == 11] = prediction[prediction == 11] = 0
    rows = case_rows(prediction, reference, SPACING, FLARE22, case='0012, "second"\nscan')
    write_rows(tmp_path / "rows.csv", rows)
    read = read_rows(tmp_path / "rows.csv")
    np.testing.assert_equal(read, rows)  # types, nan and inf included
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"case": "old", "dsc": 1.0}])

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", disk_full)
    with pytest.raises(AliceError, match="No space left on device"):
        write_rows(path, [{"case": "new", "dsc": 0.0}])
    assert read_rows(path)[0]["case"] == "old"
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"\xef\xbb\xbfcase,organ,dsc\r\nold,liver,1\r\n")  # as Excel saves it
    assert read_rows(path) == [{"case": "old", "organ": "liver", "dsc": 1.0}]
    assert read_run(tmp_path) == read_rows(path)


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"prediction": np.zeros((17, 13, 10), int)},
            r"\(17, 13, 10\), the reference \(17, 13, 11\); resample",
        ),
        ({"prediction": np.full(SHAPE, 14)}, "prediction holds the label 14, but FLARE22 has 0 to 13"),
        ({"reference": np.full(SHAPE, -1)}, "reference holds the label -1"),
        ({"prediction": np.full(SHAPE, 2.5)}, "label 2.5, which is not an integer; resample label maps"),
        ({"reference": np.full(SHAPE, np.nan)}, "label nan, which is not an integer"),
        ({"spacing": (1, 0, 1)}, r"three positive numbers.*\(1.0, 0.0, 1.0\)"),
        ({"spacing": (1, -1, 1)}, "three positive numbers"),
        ({"spacing": (1, 1)}, "three positive numbers"),
        ({"spacing": (1, 1, math.nan)}, "three positive numbers"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    good = {"prediction": np.zeros(SHAPE, int), "reference": np.zeros(SHAPE, int), "spacing": SPACING}
    with pytest.raises(ValueError, match=message):
        flare_scores(**(good | change))


def test_more_refusals(tmp_path: Path):
    cube = np.zeros((1, *SHAPE), int)
    with pytest.raises(ValueError, match="drop batch and channel axes"):
        flare_scores(cube, cube, SPACING)
    with pytest.raises(ValueError, match="holds 7, expected a mask"):
        nsd(np.full(SHAPE, 7), np.zeros(SHAPE, int), SPACING, 1)
    with pytest.raises(ValueError, match="tolerance must be a distance"):
        nsd(blob(0), blob(1), SPACING, -1)
    with pytest.raises(ValueError, match="2 organs and 1 tolerances"):
        ScoringRule("short", ("liver", "spleen"), (1,))
    with pytest.raises(ValueError, match="No rows"):
        write_rows(tmp_path / "rows.csv", [])
    with pytest.raises(ValueError, match=r"columns \['nsd'\]"):
        write_rows(tmp_path / "rows.csv", [{"dsc": 1}, {"dsc": 1, "nsd": 1}])
    (tmp_path / "bad.csv").write_text("case,dsc\n0001,high\n")
    with pytest.raises(ValueError, match="line 2: dsc is 'high'"):
        read_rows(tmp_path / "bad.csv")
    assert not (tmp_path / "rows.csv").exists()
