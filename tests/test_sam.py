"""SAM: sizes, unit vectors, slabs, and where on the patient each cell lies."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.landmarks.matching.points import match_points
from custom.landmarks.sam.network import SAM, embed_scan
from custom.landmarks.sam.scan_grid import cell_to_world, hu_to_units, read_scan, to_grid, world_to_cell
from custom.landmarks.sam.weights import load_sam_weights, save_sam


@pytest.fixture(scope="module")
def model() -> SAM:
    torch.manual_seed(0)
    net = SAM(width=4, embedding_dim=8)
    for module in net.modules():  # statistics as after training, so that a norm left out would show
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return net.eval()


# -- the network ---------------------------------------------------------------------------------------------


def test_the_published_width_has_the_published_number_of_weights():
    net = SAM().eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 1, 25, 71, 83))
    assert sum(p.numel() for p in net.parameters()) == 32_832_960
    assert len(net.state_dict()) == 138
    assert maps.fine.shape == (1, 128, 12, 36, 42)
    assert maps.coarse.shape == (1, 128, 6, 5, 6)


@pytest.mark.parametrize(
    ("size", "fine", "coarse"),
    [
        ((25, 71, 83), (12, 36, 42), (6, 5, 6)),
        ((32, 96, 96), (16, 48, 48), (8, 6, 6)),
        ((7, 17, 1), (3, 9, 1), (2, 2, 1)),
        ((2, 1, 33), (1, 1, 17), (1, 1, 3)),
    ],
)
def test_slices_are_floored_and_rows_and_columns_ceiled(model, size, fine, coarse):
    with torch.no_grad():
        maps = model(torch.randn(1, 1, *size))
    assert maps.fine.shape == (1, 8, *fine)
    assert maps.coarse.shape == (1, 8, *coarse)


def test_embeddings_have_length_one_in_float32(model):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(torch.randn(2, 1, 9, 20, 17) * 50)
    for level in maps:
        assert level.dtype == torch.float32
        torch.testing.assert_close(level.square().sum(1), torch.ones_like(level[:, 0]), rtol=0, atol=1e-5)


def test_weights_start_kaiming_fan_out():
    net = SAM(width=16)
    weight = net.layer3[0].conv2.conv.weight  # 64 channels, 27 taps
    assert weight.std().item() == pytest.approx((2 / (64 * 27)) ** 0.5, rel=0.02)
    assert not net.fine_head.smooth.bias.any()


@pytest.mark.parametrize("slices", [2, 11, 24, 37])
@pytest.mark.parametrize("slab", [2, 8, 32])
def test_slabs_equal_the_whole_volume_everywhere(model, slices, slab):
    x = torch.randn(1, 1, slices, 21, 35) * 50
    with torch.no_grad():
        whole = model(x)
    for a, b in zip(whole, model.embed(x, slab=slab), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_slabs_never_see_the_whole_volume_at_full_resolution(model):
    seen = []
    hook = model.stem.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[2]))
    model.embed(torch.randn(1, 1, 41, 9, 9), slab=8)
    hook.remove()
    assert seen == [10, 12, 12, 12, 11]  # 8 slices, two more on each side where there are


def test_every_weight_learns():
    net = SAM(width=4, embedding_dim=8)
    maps = net(torch.randn(2, 1, 8, 32, 32))
    sum((level * torch.randn_like(level)).sum() for level in maps).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_what_cannot_be_embedded_is_refused(model):
    with pytest.raises(ValueError, match="two slices or more"):
        model(torch.randn(1, 1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 1, Z, Y, X\)"):
        model(torch.randn(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match="even number of slices"):
        model.embed(torch.randn(1, 1, 8, 16, 16), slab=5)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        SAM(width=2).embed(torch.randn(1, 1, 8, 16, 16))
    with pytest.raises(ValueError, match="must be positive"):
        SAM(width=0)


# -- geometry ------------------------------------------------------------------------------------------------


def ramp(points_mm: np.ndarray) -> np.ndarray:
    """A value that says where in the world one is."""
    return points_mm @ np.array([1.0, 0.31, -0.17]) + 5.0


def scan_of(codes: str, spacing: tuple[float, ...], size: tuple[int, ...], degrees: float = 0.0):
    """A ramp stored with its axes towards ``codes``, rotated about z, and its affine."""
    turn = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), size)
    a = np.deg2rad(degrees)
    rotation = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.linalg.inv(turn)[:3, :3] @ np.diag(spacing)
    affine[:3, 3] = (-31.0, 17.5, 203.0)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1)
    return ramp(index @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32), affine


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SPL", "AIR"])
@pytest.mark.parametrize("degrees", [0.0, 12.0])
def test_the_resampled_grid_lies_where_its_affine_says(codes, degrees):
    volume, affine = scan_of(codes, (0.8, 1.3, 5.0), (41, 37, 13), degrees)
    grid = to_grid(*read_scan((volume, affine)))
    assert nib.aff2axcodes(grid.affine) == ("L", "P", "S")
    np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), 2.0)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.volume.shape), indexing="ij"), -1)
    world = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    inside = (slice(2, -2),) * 3  # beyond the outermost centres the border's value is taken
    np.testing.assert_allclose(grid.volume.numpy()[inside], ramp(world)[inside], atol=1e-3)


@pytest.mark.parametrize(
    ("size", "spacing", "new"),
    [
        (50, 0.8, 20),
        (51, 0.8, 21),
        (53, 0.8, 22),
        (40, 5.0, 100),
        (7, 2.0, 7),
        (1, 3.0, 1),
        (50, np.float32(0.8), 20),
    ],
)
def test_sizes_and_edges_are_torchios(size, spacing, new):
    affine = np.diag([-1.0, -1.0, float(spacing), 1.0])
    grid = to_grid(torch.zeros(4, 6, size), affine)
    assert grid.volume.shape == (2, 3, new)
    # first centre: outer edge of the scan, -s / 2, plus half a new voxel
    np.testing.assert_allclose(grid.affine[:3, 3], [-0.5, -0.5, 1.0 - spacing / 2], atol=1e-6)


def test_linear_interpolation_by_hand():
    volume = torch.tensor([0.0, 10.0, 40.0, 40.0]).view(1, 1, 4)
    grid = to_grid(volume, np.diag([-2.0, -2.0, 1.0, 1.0]))
    torch.testing.assert_close(grid.volume.flatten(), torch.tensor([5.0, 40.0]))  # centres at 0.5 and 2.5
    grid = to_grid(volume, np.diag([-2.0, -2.0, 4.0, 1.0]))  # centres at -0.25, 0.25, 0.75, ...
    torch.testing.assert_close(
        grid.volume.flatten(), torch.tensor([0.0, 2.5, 7.5, 17.5, 32.5, 40.0, 40.0, 40.0])
    )


def test_units_are_the_authors():
    hu = torch.tensor([-3000.0, -1024.0, -1000.0, 0.0, 3071.0, 9999.0, float("nan")])
    units = hu_to_units(hu)
    torch.testing.assert_close(
        units, torch.tensor([-50.0, -50.0, -48.5055, 13.7656, 205.0, 205.0, -50.0]), rtol=0, atol=1e-3
    )


def test_cells_lie_in_the_middle_of_their_voxels():
    affine = np.array([[-2.0, 0, 0, 100], [0, -2.0, 0, 50], [0, 0, 2.0, -300], [0, 0, 0, 1]])
    fine = cell_to_world([3, 0, 10], affine, "fine")  # voxels z 6.5, y 0.5, x 20.5
    np.testing.assert_allclose(fine, [100 - 41, 50 - 1, -300 + 13])
    coarse = cell_to_world([[3, 1, 2]], affine, "coarse")  # voxels z 13.5, y 23.5, x 39.5
    np.testing.assert_allclose(coarse, [[100 - 79, 50 - 47, -300 + 27]])


@pytest.mark.parametrize("level", ["fine", "coarse"])
def test_points_go_to_cells_and_back(level):
    affine = to_grid(*read_scan(scan_of("ASL", (1.1, 0.7, 3.0), (11, 13, 7), 20.0))).affine
    points = np.random.default_rng(0).uniform(-100, 100, (4, 5, 3))
    cells = world_to_cell(points, affine, level)
    np.testing.assert_allclose(cell_to_world(cells, affine, level), points, atol=1e-9)


@pytest.mark.parametrize("voxel", [0, 1, 2, 3, 4])
def test_the_nearest_fine_cell_is_half_the_voxel_rounded_down(voxel):
    cell = world_to_cell([2.0 * voxel] * 3, np.diag([2.0, 2.0, 2.0, 1.0]), "fine")
    assert np.rint(cell).tolist() == [voxel // 2] * 3


def test_a_path_a_metatensor_and_a_pair_embed_alike(model, tmp_path):
    volume, affine = scan_of("RAS", (1.5, 1.5, 3.0), (40, 35, 12))
    volume[:4] = -1000.0  # a file without air is refused
    nib.save(nib.Nifti1Image(volume[..., None], affine), tmp_path / "scan.nii.gz")
    want = embed_scan(model, (volume, affine))
    assert want.shape == (30, 27, 18)
    assert want.fine.shape == (8, 9, 14, 15)
    assert want.coarse.shape == (8, 5, 2, 2)
    meta = MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine))
    flipped = MetaTensor(
        torch.from_numpy(volume),
        affine=torch.from_numpy(np.diag([-1.0, -1, 1, 1]) @ affine),
        meta={"space": "LPS"},
    )
    for scan in (tmp_path / "scan.nii.gz", str(tmp_path / "scan.nii.gz"), meta, flipped):
        got = embed_scan(model, scan)
        np.testing.assert_allclose(got.affine, want.affine, atol=1e-4)
        torch.testing.assert_close(got.fine, want.fine, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.coarse, want.coarse, rtol=0, atol=1e-4)


def test_how_a_scan_is_stored_does_not_matter(model):
    rng = np.random.default_rng(0)
    volume, affine = rng.normal(0, 300, (23, 31, 17)).astype(np.float32), np.diag([1.7, 1.9, 2.3, 1.0])
    image = nib.Nifti1Image(volume, affine)
    want = embed_scan(model, (volume, affine))
    for codes in ("LPS", "SAR", "IRP"):
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
        turned = image.as_reoriented(turn)
        got = embed_scan(model, (turned.get_fdata(), turned.affine))
        np.testing.assert_allclose(got.affine, want.affine, atol=1e-5)
        torch.testing.assert_close(got.fine, want.fine, rtol=0, atol=1e-4)


def test_the_network_sees_z_y_x_growing_towards_superior_posterior_left(model):
    volume = np.full((24, 20, 16), -1024.0, dtype=np.float32)
    volume[2, 5, 13] = 3071.0  # in a RAS scan: far right, anterior third, superior
    inputs = []
    hook = model.stem.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    embed_scan(model, (volume, np.diag([2.0, 2.0, 2.0, 1.0])))
    hook.remove()
    assert inputs[0].shape == (1, 1, 16, 20, 24)
    assert (inputs[0] > 0).nonzero().tolist() == [[0, 0, 13, 19 - 5, 23 - 2]]


def test_what_is_no_ct_is_refused_by_its_file_and_spoken_of_in_memory(tmp_path, caplog):
    mr = np.random.default_rng(0).integers(0, 900, (9, 10, 11)).astype(np.int16)
    nib.save(nib.Nifti1Image(mr, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "mr.nii.gz")
    with pytest.raises(ValueError, match=r"mr\.nii\.gz.*not Hounsfield units"):
        read_scan(tmp_path / "mr.nii.gz")
    read_scan((mr, np.eye(4)))
    assert "without air" in caplog.text


def test_an_embedding_in_memory_knows_its_body_and_its_weights(tmp_path):
    """A point in the air, and a scan embedded with other weights, are refused as they are of files."""
    ball = np.linalg.norm(np.indices((48, 48, 48)) - 24, axis=0) < 14
    volume = np.where(ball, 40.0, -1000.0).astype(np.float32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    embeddings = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_sam(tmp_path / f"{seed}.safetensors", SAM(4, 8).eval(), {})
        network = load_sam_weights(tmp_path / f"{seed}.safetensors")
        embeddings.append(embed_scan(network, (volume, affine)))
    here = embeddings[0]
    found = match_points([[48.0, 48.0, 48.0], [6.0, 6.0, 6.0]], here, here)
    assert found.scores[0] > 0.99 and found.scores[1] == -1 and np.isnan(found.points_mm[1]).all()
    with pytest.raises(ValueError, match="different weights"):
        match_points([[48.0, 48.0, 48.0]], *embeddings)
    network.train()
    assert embed_scan(network.eval(), (volume, affine)).weights_sha256 is None, "it may have been trained"


@pytest.mark.parametrize(
    "affine, reason",
    [
        (np.diag([2.0, 2.0, 60.0, 1.0]), "spacing"),
        (np.diag([2.0, 2.0, 2.0, 1.0]) + 0.8 * np.eye(4, k=1) * np.array([[1.0], [0], [0], [0]]), "shear"),
    ],
)
def test_a_file_on_a_grid_that_no_patient_lies_in_is_refused(tmp_path, affine, reason):
    volume = np.full((20, 20, 20), -1000, np.int16)
    volume[5:15, 5:15, 5:15] = 40
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "odd.nii.gz")
    with pytest.raises(ValueError, match=rf"odd\.nii\.gz.*{reason}"):
        read_scan(tmp_path / "odd.nii.gz")


def test_a_tilted_scan_is_taken_with_a_warning(tmp_path, caplog):
    volume = np.full((20, 20, 20), -1000, np.int16)
    volume[5:15, 5:15, 5:15] = 40
    turn = np.deg2rad(40)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:2, :2] = 2 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "tilted.nii.gz")
    read_scan(tmp_path / "tilted.nii.gz")
    assert "tilted.nii.gz" in caplog.text and "upright" in caplog.text


def test_scans_without_a_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks an affine"):
        read_scan(np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="one 3D volume"):
        read_scan((np.zeros((3, 4, 5, 2)), np.eye(4)))
    with pytest.raises(ValueError, match="invertible"):
        read_scan((np.zeros((3, 4, 5)), np.zeros((4, 4))))
    with pytest.raises(ValueError, match="must be positive"):
        to_grid(torch.zeros(3, 4, 5), np.eye(4), spacing=0.0)
    (tmp_path / "scan.nii").write_text("not an image")
    with pytest.raises(ValueError, match=r"scan\.nii"):
        read_scan(tmp_path / "scan.nii")
    with pytest.raises(FileNotFoundError):
        read_scan(tmp_path / "nothing.nii.gz")
