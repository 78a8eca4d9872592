"""Synthetic torsos: anatomy, exact correspondence, and the files of a cohort."""

import functools

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter

from custom.data.organs import BTCV_ORGANS
from custom.data.phantom.cohort import (
    FLARE22_ORGANS,
    PHASES,
    Phantom,
    find_canonical,
    make_phantom,
    read_canonical,
    write_cohort,
)

SEEDS = (0, 1, 2, 3)
TWO_FAST = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
VOLUMES_ML = {  # loose: the adult ranges of the specification, wider where thin organs meet 4 mm voxels
    "liver": (800, 2600),
    "right kidney": (70, 280),
    "spleen": (70, 500),
    "pancreas": (25, 140),
    "aorta": (40, 220),
    "inferior vena cava": (35, 200),
    "right adrenal gland": (0.8, 9),
    "left adrenal gland": (0.8, 9),
    "gallbladder": (8, 100),
    "esophagus": (8, 70),
    "stomach": (80, 900),
    "duodenum": (25, 120),
    "left kidney": (70, 280),
}


@functools.cache
def small(seed: int, phase: str | None = None) -> Phantom:
    return make_phantom(seed, size="small", phase=phase)


def organ(name: str) -> int:
    return FLARE22_ORGANS.index(name) + 1


def centroid_mm(phantom: Phantom, name: str) -> np.ndarray:
    voxels = np.argwhere(phantom.label == organ(name))
    return nib.affines.apply_affine(phantom.affine, voxels).mean(axis=0)


def test_a_seed_decides_everything():
    first, again = small(0), make_phantom(0, size="small")
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fields_have_the_promised_types_and_order():
    image, label, canonical, affine = small(0)
    assert (image.dtype, label.dtype, canonical.dtype, affine.dtype) == (np.int16, np.uint8, "f4", "f8")
    assert canonical.shape == (*image.shape, 3)
    assert label.shape == image.shape == (96, 80, 80)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    assert image.min() >= -1024
    assert image.max() <= 3071


def test_seeds_differ_in_body_and_not_only_in_noise():
    one, other = small(0), small(1)
    assert not np.array_equal(one.affine, other.affine)
    assert (one.label != other.label).mean() > 0.01


def test_the_phase_changes_the_image_and_leaves_the_body_alone():
    plain, arterial = small(0, "non-contrast"), small(0, "arterial")
    np.testing.assert_array_equal(plain.label, arterial.label)
    np.testing.assert_array_equal(plain.canonical, arterial.canonical)
    aorta = plain.label == organ("aorta")
    assert arterial.image[aorta].mean() > plain.image[aorta].mean() + 120


def test_shape_and_spacing_can_be_given():
    phantom = make_phantom(5, shape=(61, 53, 47), spacing=(6.0, 7.0, 8.0))
    assert phantom.image.shape == (61, 53, 47)
    np.testing.assert_allclose(np.diag(phantom.affine)[:3], (6.0, 7.0, 8.0))


@pytest.mark.slow
def test_a_standard_phantom_has_about_the_promised_size():
    phantom = make_phantom(4, coverage="upper_abdomen")
    assert phantom.image.shape[0] == phantom.image.shape[1]
    assert 140 <= phantom.image.shape[0] <= 180
    assert not (phantom.label == 0).all()


@pytest.mark.parametrize("seed", TWO_FAST)
def test_organs_lie_on_their_sides(seed):
    at = functools.partial(centroid_mm, small(seed))
    right, front, up = 0, 1, 2
    assert at("liver")[right] > at("spleen")[right]
    assert at("right kidney")[right] > at("left kidney")[right]
    assert at("right adrenal gland")[right] > at("left adrenal gland")[right]
    assert at("inferior vena cava")[right] > at("aorta")[right]
    assert at("gallbladder")[right] > at("stomach")[right]
    assert at("stomach")[front] > at("left kidney")[front]
    assert at("right adrenal gland")[up] > at("right kidney")[up]
    assert at("esophagus")[up] > at("duodenum")[up]


@pytest.mark.parametrize("seed", TWO_FAST)
def test_all_organs_are_there_with_human_volumes(seed):
    phantom = small(seed)
    voxel_ml = abs(np.linalg.det(phantom.affine[:3, :3])) / 1000
    volumes = np.bincount(phantom.label.ravel(), minlength=14)[1:] * voxel_ml
    for name, volume in zip(FLARE22_ORGANS, volumes, strict=True):
        low, high = VOLUMES_ML[name]
        assert low < volume < high, f"{name}: {volume:.1f} ml"


@pytest.mark.parametrize("seed", TWO_FAST)
def test_no_organ_lies_outside_the_body(seed):
    phantom = small(seed)
    x, y, _ = phantom.canonical[phantom.label > 0].T
    assert (np.abs(x) < 150).all()
    assert (np.abs(y) < 95).all()
    labelled = np.isin(phantom.label, [organ("liver"), organ("spleen"), organ("left kidney")])
    smooth = gaussian_filter(phantom.image.astype(np.float32), 1.0)
    assert smooth[binary_erosion(labelled, iterations=2)].min() > -120  # neither air nor lung


@pytest.mark.parametrize(
    "seed", [*TWO_FAST, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 8))]
)
def test_the_map_folds_nowhere(seed):
    phantom = small(seed)
    spacing = np.diag(phantom.affine)[:3]
    slopes = [np.gradient(phantom.canonical, step, axis=axis) for axis, step in enumerate(spacing)]
    assert np.linalg.det(np.stack(slopes, axis=-1)).min() > 0.05


@pytest.mark.parametrize(
    "seed_q, seed_k", [(0, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(2, 3), (3, 0)])]
)
def test_a_matched_point_lies_in_the_same_organ(seed_q, seed_k):
    q, k = small(seed_q), small(seed_k)
    away_from_edge = np.zeros(q.label.shape, dtype=bool)
    for label in range(1, 14):
        away_from_edge |= binary_erosion(q.label == label)
    voxels = np.argwhere(away_from_edge)[::7]
    found = find_canonical(k, q.canonical[tuple(voxels.T)])
    inside = found.residual_mm < 0.5
    assert inside.mean() > 0.9  # the rest: ends of aorta and oesophagus beyond K's field of view

    voxels_k = np.rint(nib.affines.apply_affine(np.linalg.inv(k.affine), found.points_mm)).astype(int)
    same = k.label[tuple(voxels_k.T)] == q.label[tuple(voxels.T)]
    assert same[inside].mean() > 0.95


def test_a_phantom_matches_itself_between_voxels():
    phantom = small(2)
    rng = np.random.default_rng(0)
    voxels = rng.uniform(8, 70, (200, 3))
    low = np.floor(voxels).astype(int)
    part = voxels - low
    wanted = np.zeros((200, 3))
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, part, 1 - part).prod(axis=1)
        wanted += weight[:, None] * phantom.canonical[tuple((low + corner).T)]
    found = find_canonical(phantom, wanted)
    np.testing.assert_allclose(found.points_mm, nib.affines.apply_affine(phantom.affine, voxels), atol=0.02)


def test_a_place_outside_the_scan_shows_in_its_residual():
    head = np.array([[0.0, 0.0, 700.0]])
    assert find_canonical(small(0), head).residual_mm[0] > 100


def test_relative_position_alone_misses_by_a_centimetre_or_more():
    q, k = small(0), small(1)
    voxels = np.argwhere(q.label > 0)[::29]
    found = find_canonical(k, q.canonical[tuple(voxels.T)])
    seen = found.residual_mm < 0.5
    guess = np.c_[voxels, np.ones(len(voxels))][seen]  # even the best affine guess
    target = found.points_mm[seen]
    fit = np.linalg.lstsq(guess, target, rcond=None)[0]
    assert np.linalg.norm(guess @ fit - target, axis=1).mean() > 6


@pytest.mark.slow
def test_organs_overlap_in_hu_without_contrast():
    liver, spleen, kidney = [], [], []
    for seed in SEEDS:
        phantom = small(seed, "non-contrast")
        for values, name in ((liver, "liver"), (spleen, "spleen"), (kidney, "right kidney")):
            values.append(phantom.image[phantom.label == organ(name)])
    for one, other in ((liver, spleen), (spleen, kidney)):
        counts = [np.histogram(np.concatenate(v), bins=np.arange(-200, 300, 10))[0] for v in (one, other)]
        shares = [count / count.sum() for count in counts]
        assert np.minimum(*shares).sum() > 0.3


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    calls = []
    images = write_cohort(folder, n=4, seed=7, size="small", progress=lambda *done: calls.append(done))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return folder, images


def test_a_cohort_has_the_layout_of_flare22(cohort):
    folder, images = cohort
    assert [path.name for path in images] == [f"FLARE22_Tr_{i:04d}_0000.nii.gz" for i in (1, 2, 3, 4)]
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    expected = ["README.txt"]
    for i in (1, 2, 3, 4):
        name = f"FLARE22_Tr_{i:04d}"
        expected += [f"canonical/{name}.npz", f"images/{name}_0000.nii.gz", f"labels/{name}.nii.gz"]
    assert written == sorted(expected)
    assert "Synthetic" in (folder / "README.txt").read_text()
    assert nib.load(images[0]).get_data_dtype() == np.int16


def test_a_turned_file_shows_the_same_body_in_world_space(cohort):
    folder, images = cohort
    codes = []
    for index, path in enumerate(images):
        name = path.name.removesuffix("_0000.nii.gz")
        phantom = make_phantom([7, index], size="small")
        image, label = nib.load(path), nib.load(folder / "labels" / f"{name}.nii.gz")
        codes.append(nib.aff2axcodes(image.affine))
        np.testing.assert_array_equal(image.affine, label.affine)
        rng = np.random.default_rng(index)
        voxels = np.stack([rng.integers(0, size, 500) for size in image.shape], axis=-1)
        world = nib.affines.apply_affine(image.affine, voxels)
        at = nib.affines.apply_affine(np.linalg.inv(phantom.affine), world)
        np.testing.assert_allclose(at, np.rint(at), atol=1e-3)
        at, there = tuple(np.rint(at).astype(int).T), tuple(voxels.T)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj)[there], phantom.image[at])
        np.testing.assert_array_equal(np.asanyarray(label.dataobj)[there], phantom.label[at])
        stored = read_canonical(folder / "canonical" / f"{name}.npz")
        np.testing.assert_allclose(stored[there], phantom.canonical[at], atol=1e-3)
    assert len(set(codes)) > 1


def test_writing_again_adds_what_is_missing_and_leaves_the_rest(cohort):
    folder, images = cohort
    kept = images[0].stat().st_mtime_ns
    before = images[1].read_bytes()
    images[1].unlink()
    write_cohort(folder, n=4, seed=7, size="small")
    assert images[0].stat().st_mtime_ns == kept
    assert images[1].read_bytes() == before


def test_a_folder_is_not_shared_by_two_cohorts(cohort):
    with pytest.raises(ValueError, match="seed 7"):
        write_cohort(cohort[0], n=4, seed=8, size="small")


@pytest.mark.slow
def test_phase_and_voxel_size_vary():
    phantoms = [small(seed) for seed in range(6)]
    assert len({round(float(p.affine[0, 0]), 2) for p in phantoms}) > 3
    aortas = [float(np.median(p.image[p.label == organ("aorta")])) for p in phantoms]
    assert max(aortas) - min(aortas) > 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"phase": "venous"}, "Unknown phase 'venous'.*portal"),
        ({"size": "huge"}, "Unknown size 'huge'"),
        ({"coverage": "head"}, "Unknown coverage 'head'"),
        ({"shape": (96, 80, 7)}, r"at least 24 voxels, got \(96, 80, 7\)"),
        ({"spacing": (1.0, 0.0, 1.0)}, r"above 0 mm, got \(1.0, 0.0, 1.0\)"),
    ],
)
def test_a_wrong_choice_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, **arguments)


def test_an_empty_cohort_is_refused(tmp_path):
    with pytest.raises(ValueError, match="n=0"):
        write_cohort(tmp_path, n=0)


def test_coordinates_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 3\), got \(3,\)"):
        find_canonical(small(0), np.zeros(3))


def test_names_follow_flare22():
    assert len(FLARE22_ORGANS) == 13
    assert (FLARE22_ORGANS[0], FLARE22_ORGANS[1], FLARE22_ORGANS[12]) == (
        "liver",
        "right kidney",
        "left kidney",
    )
    assert len(PHASES) == 4


def test_btcv_labels_are_the_same_organs_in_btcvs_order(tmp_path):
    flare, btcv = (make_phantom(4, size="small", labels=labels) for labels in ("flare22", "btcv"))
    np.testing.assert_array_equal(flare.image, btcv.image)
    for value, organ in enumerate(BTCV_ORGANS, start=1):
        if organ in FLARE22_ORGANS:
            same = flare.label == FLARE22_ORGANS.index(organ) + 1
            np.testing.assert_array_equal(btcv.label == value, same, err_msg=organ)
    veins = btcv.label == BTCV_ORGANS.index("portal and splenic veins") + 1
    assert veins.any() and not flare.label[veins].any()
    (image,) = write_cohort(tmp_path, 1, 4, size="small", labels="btcv")
    assert image == tmp_path / "imagesTr" / "img0001.nii.gz"
    assert (tmp_path / "labelsTr" / "label0001.nii.gz").exists()
    assert (tmp_path / "canonical" / "img0001.npz").exists()
    with pytest.raises(ValueError, match="holds other files"):
        write_cohort(tmp_path, 1, 4, size="small")
    with pytest.raises(ValueError, match="labels"):
        make_phantom(4, size="small", labels="totalsegmentator")
