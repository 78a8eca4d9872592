import numpy as np
import pytest

from custom.evaluation.compare.overlays import (
    Overlay,
    axial_overlay,
    field_around,
    overlay_pictures,
    worst_slice,
)


def test_overlay_shows_the_patients_right_on_the_left_and_front_on_top():
    image = np.zeros((20, 30))  # x towards Right, y Anterior
    image[15:, 20:] = 1.0  # right, anterior
    empty = np.zeros((20, 30), bool)
    shown = axial_overlay(image, empty, empty, spacing=(2.0, 1.0))
    height, width, _ = shown.shape
    assert width / height == pytest.approx(20 * 2.0 / 30, abs=0.01)
    assert shown[: height // 4, : width // 8].min() == 1.0
    assert shown[height // 2 :].max() == shown[:, width // 2 :].max() == 0.0


def test_overlay_outlines_reference_green_and_prediction_pink():
    image, reference, prediction = np.full((30, 30), 0.5), np.zeros((30, 30), bool), np.zeros((30, 30), bool)
    reference[20:28, 5:25], prediction[2:10, 5:25] = True, True  # right, left
    shown = axial_overlay(image, reference, prediction)
    middle = shown.shape[1] // 2
    green, pink = (shown[..., 1] > 0.8), (shown[..., 0] > 0.9)
    assert green[:, :middle].any()
    assert not green[:, middle:].any()
    assert pink[:, middle:].any()
    assert not pink[:, :middle].any()
    assert 0.005 < green.mean() < 0.03  # an outline, not an area


def test_worst_slice_is_where_a_prediction_fails_most():
    reference = np.zeros((5, 7, 9), bool)
    reference[1:4, 2:5, 3:8] = True
    prediction = reference.copy()
    prediction[2, 2:5, 6] = False
    assert worst_slice(reference, reference, prediction) == 6
    assert worst_slice(reference, reference, reference) == 3


def test_a_small_organ_is_shown_large_with_its_surroundings():
    mask = np.zeros((97, 83), bool)
    mask[50:53, 60:64] = True
    x, y = field_around(mask, (2.0, 3.0))
    assert (x.stop - x.start, y.stop - y.start) == (60, 40)  # 120 mm
    assert abs((x.start + x.stop) / 2 - 51.5) <= 1
    assert y.start == 42 and y.stop == 82  # 62 is in the middle
    corner = np.zeros((97, 83), bool)
    corner[0, 82] = True
    assert field_around(corner, (2.0, 3.0)) == (slice(0, 60), slice(43, 83))
    assert field_around(np.zeros((5, 7), bool), (1, 1)) == (slice(None), slice(None))
    large = np.ones((97, 83), bool)
    assert field_around(large, (2.0, 3.0)) == (slice(0, 97), slice(0, 83))


def test_pictures_are_of_the_worst_slice_and_of_each_run():
    volume = np.zeros((31, 29, 7))
    volume[..., 5] = 1.0
    reference = np.zeros(volume.shape, bool)
    reference[10:16, 10:16, 2:6] = True
    missed = reference.copy()
    missed[..., 5] = False
    z, (of_a, of_b) = overlay_pictures(Overlay("", volume, reference, missed, reference, (4, 4, 4)))
    assert z == 5
    assert of_a.max() == 1.0
    green = np.isclose(of_a, (0.30, 0.85, 0.45)).all(-1)
    assert green.any()
    np.testing.assert_array_equal(of_a, of_b)  # the reference's outline covers the equal prediction's
