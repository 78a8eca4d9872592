import nibabel as nib
import numpy as np
import pytest

from custom.data.errors import ScanError
from custom.data.grid.profiles import ProfileError, profile_of, require_ct, to_hu, window, window_of
from custom.data.intake.scan_folder import scan_folder
from custom.data.store.build import build_store
from custom.landmarks.aligners.affine import AffineAligner
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.landmarks.training.view_pairs import ViewPairs
from custom.methods.pairs import AlignedPair

SPACING = (3.0, 3.0, 4.0)


def mr(seed, gain=1.0, offset=0.0):
    """A bright ellipse in dark noise: float32, as the scanner scales it."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (61, 53, 31)], indexing="ij")
    body = (x / 0.7) ** 2 + (y / 0.8) ** 2 < 1
    volume = np.abs(rng.normal(0, 12, x.shape)) + body * (400 + 200 * z + rng.normal(0, 30, x.shape))
    return (gain * volume + offset).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mr")
    for seed, gain, offset in ((0, 1.0, 0.0), (1, 1.0, 0.0), (2, 3.5, 50.0)):
        seed_of = min(seed, 1)  # the third is the second, scaled by another scanner
        nib.save(
            nib.Nifti1Image(mr(seed_of, gain, offset), np.diag([*SPACING, 1.0])),
            folder / f"sub-{seed}_t1.nii.gz",
        )
    return folder


def whole(store, name):
    return store.read_crop(name, (0, 0, 0), store.shape(name))


def test_mr_is_stored_between_the_percentiles_of_its_body(folder, tmp_path):
    store = build_store(folder, tmp_path, SPACING, progress=False, profile="mr")
    name = store.names[0]
    raw = np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj)
    start, shape = store.records[name].crop_start, store.shape(name)
    raw = raw[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    stored, scaled = whole(store, name), store.records[name].scaling
    assert store.profile == "mr" and stored.min() >= 0 and stored.max() <= 10000
    inside = (stored > 0) & (stored < 10000)
    restored = stored / scaled["scale"] + scaled["offset"]
    np.testing.assert_allclose(restored[inside], raw[inside], atol=0.51 / scaled["scale"] + 1e-3)
    body = raw[tuple(store.body_voxels(name).T)]
    low, high = np.percentile(body, [0.2, 99.8])
    assert scaled["offset"] == pytest.approx(low) and 10000 / scaled["scale"] == pytest.approx(high - low)
    assert 150 < low < 300 and 550 < high < 720, "the body, not the air around it"


@pytest.mark.parametrize("profile", ["mr", "zscore"])
def test_affine_registers_what_the_profile_shows(folder, tmp_path, profile):
    store = build_store(folder, tmp_path, SPACING, progress=False, profile=profile)
    name = store.names[0]
    aligner = AffineAligner(store, spacing_mm=store.spacing[0])  # blocks of one voxel along x
    blocks, affine = aligner._coarse(name)
    step = np.rint(np.linalg.norm(affine[:3, :3], axis=0) / store.spacing).astype(int)
    shown = window(store.read_crop(name, (0, 0, 0), np.array(blocks.shape) * step), *store.window((0.0, 1.0)))
    assert blocks.mean() == pytest.approx(
        shown.mean(), abs=1e-4
    )  # read as HU, an MR would be 1 nearly everywhere
    assert shown.std() > 0.05


@pytest.mark.parametrize("profile", ["mr", "zscore"])
def test_a_scanners_scale_does_not_matter(folder, tmp_path, profile):
    store = build_store(folder, tmp_path, SPACING, progress=False, profile=profile)
    one, other = (whole(store, name).astype(int) for name in store.names[1:])
    assert one.shape == other.shape and np.abs(one - other).max() <= 2


def test_zscore_has_the_bodys_mean_and_deviation(folder, tmp_path):
    store = build_store(folder, tmp_path, SPACING, progress=False, profile="zscore")
    name = store.names[0]
    body = whole(store, name)[tuple(store.body_voxels(name).T)]
    assert abs(body.mean()) < 5 and abs(body.std() - 1000) < 5
    assert store.air(name) < -2000
    assert (store.read_crop(name, (-5, 0, 0), (3, 4, 5)) == store.air(name)).all(), "outside is air"


@pytest.mark.parametrize("profile, low, high", [("mr", 0, 10000), ("zscore", -3000, 3000)])
def test_pairs_map_every_profile_to_0_to_1(folder, tmp_path, profile, low, high):
    store = build_store(folder, tmp_path, SPACING, progress=False, profile=profile)
    pairs = AlignedPair(store, CoordinateAligner(store), (16, 12, 8), window_hu=(-175, 250))
    item, place = pairs[1], pairs.place(1)
    stored = store.read_crop(place.scan_k, place.start_k, (16, 12, 8))
    expected = np.clip((stored.astype(np.float32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(item["crop_k"][0].numpy(), expected, atol=1e-6)
    assert float(item["crop_k"].std()) > 0.05 and 0.2 < float(item["crop_k"].mean()) < 0.8
    assert store.window((-175, 250)) == (low, high)


def test_mr_is_refused_as_ct_and_the_way_out_is_named(folder, tmp_path):
    with pytest.raises(ScanError, match=r"not Hounsfield units .*give its profile \(mr\)"):
        build_store(folder, tmp_path, SPACING, progress=False)
    with pytest.raises(ProfileError, match="profile must be one of ct, mr, zscore; got 'pet'"):
        build_store(folder, tmp_path, SPACING, progress=False, profile="pet")


def test_a_manifest_carries_its_profile_to_the_store(folder, tmp_path):
    manifest = tmp_path / "m.json"
    made = scan_folder(folder, output=manifest, profile="mr", progress=False, min_slices=4, hash_ids=False)
    assert len(made.usable) == 3
    store = build_store(manifest, tmp_path / "s", SPACING, progress=False)
    assert store.profile == store.settings["profile"] == "mr"
    again = build_store(manifest, tmp_path / "z", SPACING, progress=False, profile="zscore")
    assert again.profile == "zscore"


def test_sam_is_refused_what_is_not_ct(folder, tmp_path):
    store = build_store(folder, tmp_path, (2.0, 2.0, 2.0), progress=False, profile="mr")
    with pytest.raises(ProfileError, match="profile 'mr', and SAM was made for CT.*allow_profile"):
        ViewPairs(store)
    require_ct("mr", "store", "SAM", allow=True)


def test_profiles_by_hand():
    assert window_of("ct", [-175.0, 250.0]) == (-175.0, 250.0) and profile_of("ct").air == -1024
    part = np.array([-2000.0, -0.5, 1.5, 40000.0], np.float32)
    assert to_hu(part).tolist() == [-1024, 0, 2, 3071] and to_hu(part).dtype == np.int16
    assert to_hu(np.array([-2000, 5, 40000], np.int32)).tolist() == [-1024, 5, 3071]


def test_one_value_in_the_body_is_refused(tmp_path):
    volume = np.zeros((61, 53, 31), np.float32)
    volume[15:45, 15:40] = 7
    nib.save(nib.Nifti1Image(volume, np.diag([*SPACING, 1.0])), tmp_path / "flat.nii.gz")
    with pytest.raises(ScanError, match=r"flat.nii.gz: every voxel of the body has the same value"):
        build_store(tmp_path, tmp_path / "s", SPACING, progress=False, profile="mr")
