import hashlib
import struct

import pytest
import torch
from conftest import REPO, TINY_VIT
from monai.networks.nets import UNETR, SwinUNETR, ViT, ViTAutoEnc
from safetensors.torch import load_file, save_file

from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.nnformer import NNFormer
from custom.transfer.encoder_weights import (
    WeightsError,
    build_encoder,
    load_encoder,
    read_weights,
    save_encoder,
    sha256_of,
)

SIZE = (32, 48, 16)
UNETR_12 = {
    "in_channels": 1,
    "out_channels": 3,
    "img_size": SIZE,
    "feature_size": 4,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_heads": 4,
}


def encoder(**kwargs):
    torch.manual_seed(0)
    return MaskedViT(**(TINY_VIT | {"num_layers": 12} | kwargs)).eval()


@pytest.fixture
def saved(tmp_path):
    net = encoder()
    path = tmp_path / "encoder.safetensors"
    save_encoder(
        path, net, {"network_type": "MaskedViT", "network": net.settings, "spacing": [1.5, 1.5, 2.0]}
    )
    return net, path


def test_stock_unetr_is_filled_whole_and_gives_the_same_features(saved, capsys):
    net, path = saved
    unetr = UNETR(**UNETR_12).eval()
    report = load_encoder(unetr, path)
    assert not capsys.readouterr().out
    volume = torch.rand(2, 1, *SIZE)
    torch.testing.assert_close(unetr.vit(volume)[0], net(volume)[0], rtol=0, atol=1e-5)
    for own, stock in zip(net(volume)[1], unetr.vit(volume)[1], strict=True):
        torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)
    used = {k for k in unetr.vit.state_dict() if "cross_attn" not in k}
    assert set(report.loaded) == used
    load_encoder(unetr, path, verbose=True)
    assert "(100%)" in capsys.readouterr().out and report.metadata["spacing"] == [1.5, 1.5, 2.0]


def test_the_checksum_is_of_names_shapes_types_and_bytes():
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7), "c": torch.arange(3).bfloat16()}
    digest = hashlib.sha256(b"a()torch.int64" + struct.pack("<q", 7))
    digest.update(b"b(2, 3)torch.float32" + struct.pack("<6f", *range(6)))
    digest.update(b"c(3,)torch.bfloat16" + b"\x00\x00\x80\x3f\x00\x40")
    assert sha256_of(state) == digest.hexdigest()
    odd = torch.arange(32).half().as_strided((32, 1), (1, 32))  # contiguous, yet its last stride is 32
    assert sha256_of({"a": odd}) == sha256_of({"a": torch.arange(32).half().view(32, 1)})


def test_what_is_shipped_agrees_with_its_checksum():
    path = REPO / "bundles" / "alice_pretrain" / "models" / "model.pt"
    state, metadata = read_weights(path)
    assert metadata["sha256"] == sha256_of(state)


def test_the_exported_file_loads_strictly_into_monais_vit(saved):
    net, path = saved
    stock = ViT(**(TINY_VIT | {"num_layers": 12}))
    stock.load_state_dict(load_file(path), strict=True)
    load_encoder(ViT(**(TINY_VIT | {"num_layers": 12})), path)


def test_an_autoencoder_takes_the_encoder_and_keeps_its_decoder(saved):
    net, path = saved
    auto = ViTAutoEnc(1, SIZE, 16, hidden_size=48, mlp_dim=96, num_layers=12, num_heads=4).eval()
    before = {k: v.clone() for k, v in auto.state_dict().items() if k.startswith("conv3d_transpose")}
    load_encoder(auto, path)
    assert all(torch.equal(v, auto.state_dict()[k]) for k, v in before.items())
    torch.testing.assert_close(auto(torch.ones(1, 1, *SIZE))[1][-1], net(torch.ones(1, 1, *SIZE))[1][-1])


@pytest.mark.parametrize("ours, theirs", [("conv", "perceptron"), ("perceptron", "conv")])
def test_either_patch_embedding_takes_the_others_weights_exactly(tmp_path, ours, theirs):
    net = encoder(proj_type=ours)
    save_encoder(tmp_path / "e.safetensors", net, {"network": net.settings})
    unetr = UNETR(**UNETR_12, proj_type=theirs).eval()
    report = load_encoder(unetr, tmp_path / "e.safetensors")
    volume = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(unetr.vit(volume)[0], net(volume)[0], rtol=0, atol=2e-5)
    assert "exact" in next(iter(report.adapted.values()))


def test_weights_may_be_read_by_whom_the_umask_says(saved, tmp_path):
    (tmp_path / "any").write_text("")
    assert saved[1].stat().st_mode == (tmp_path / "any").stat().st_mode


def test_every_missing_extra_and_misshaped_tensor_is_named_and_nothing_is_changed(saved, tmp_path):
    net, path = saved
    state = load_file(path)
    del state["blocks.3.mlp.linear1.weight"]
    state["surplus"] = torch.zeros(2)
    state["norm.weight"] = torch.zeros(7)
    save_file(state, tmp_path / "bad.safetensors")
    unetr = UNETR(**UNETR_12)
    before = {k: v.clone() for k, v in unetr.state_dict().items()}
    with pytest.raises(WeightsError, match="nothing was loaded") as caught:
        load_encoder(unetr, tmp_path / "bad.safetensors")
    for line in (
        "missing: blocks.3.mlp.linear1.weight (96, 48)",
        "extra: surplus (2,)",
        "shape: norm.weight is (7,) in the file, (48,) here",
    ):
        assert line in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in unetr.state_dict().items())


def test_another_token_grid_is_refused_unless_interpolation_is_asked_for(saved):
    _, path = saved
    other = UNETR(**(UNETR_12 | {"img_size": (48, 48, 32)}))
    with pytest.raises(
        WeightsError, match=r"grid \[2, 3, 1\] in the file, \[3, 3, 2\] here: pass interpolate_positions"
    ):
        load_encoder(other, path)
    report = load_encoder(other, path, interpolate_positions=True)
    assert "interpolated from grid" in report.adapted["patch_embedding.position_embeddings"]


def test_equal_counts_on_unlike_grids_do_not_pass_for_the_same_table(saved):
    """2x3x1 and 3x2x1 both have six tokens."""
    _, path = saved
    turned = UNETR(**(UNETR_12 | {"img_size": (48, 32, 16)}))
    with pytest.raises(WeightsError, match="pass interpolate_positions"):
        load_encoder(turned, path)


def test_a_stock_vit_of_another_size_says_that_it_needs_its_grid(saved):
    _, path = saved
    vit = ViT(**(TINY_VIT | {"num_layers": 12, "img_size": (48, 48, 32)}))
    with pytest.raises(WeightsError, match="pass grid="):
        load_encoder(vit, path)
    load_encoder(vit, path, grid=(3, 3, 2), interpolate_positions=True)


def test_another_number_of_heads_is_refused_though_every_shape_fits(saved):
    _, path = saved
    with pytest.raises(
        WeightsError, match="num_heads: 4 in the file, 3 here: build the network with num_heads=4"
    ):
        load_encoder(UNETR(**(UNETR_12 | {"num_heads": 3})), path)


def test_input_channels_are_repeated_only_when_asked(saved):
    net, path = saved
    two = UNETR(**(UNETR_12 | {"in_channels": 2})).eval()
    with pytest.raises(WeightsError, match="pass adapt_channels=True"):
        load_encoder(two, path)
    load_encoder(two, path, adapt_channels=True)
    volume = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(
        two.vit(volume.expand(-1, 2, -1, -1, -1))[0], net(volume)[0], atol=2e-5, rtol=0
    )


def test_weights_of_older_monai_without_or_with_cross_attention_load(saved, tmp_path):
    """MONAI 1.3 lacks norm_cross_attn; 1.4 to 1.5 carry an unused cross_attn."""
    net, path = saved
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "cross_attn" not in k}, tmp_path / "v13.safetensors")
    save_file(state | {"blocks.0.cross_attn.to_q.weight": torch.zeros(48, 48)}, tmp_path / "v14.safetensors")
    for name in ("v13", "v14"):
        unetr = UNETR(**UNETR_12).eval()
        load_encoder(unetr, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(
            unetr.vit(torch.ones(1, 1, *SIZE))[0], net(torch.ones(1, 1, *SIZE))[0], atol=1e-5, rtol=0
        )


def test_a_plain_model_pt_carries_the_same_weights(saved, tmp_path):
    net, _ = saved
    save_encoder(tmp_path / "model.pt", net, {"network_type": "MaskedViT", "network": net.settings})
    state, metadata = read_weights(tmp_path / "model.pt")
    assert metadata["sha256"] and set(state) == set(net.state_dict())
    twin = build_encoder(metadata)
    twin.load_state_dict(state)


def test_half_precision_halves_the_file_and_loads_into_full(saved, tmp_path):
    net, path = saved
    save_encoder(tmp_path / "half.safetensors", net, {"network": net.settings}, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * path.stat().st_size
    unetr = UNETR(**UNETR_12).eval()
    load_encoder(unetr, tmp_path / "half.safetensors")
    assert all(v.dtype == torch.float32 for v in unetr.state_dict().values())
    torch.testing.assert_close(
        unetr.vit(torch.ones(1, 1, *SIZE))[0], net(torch.ones(1, 1, *SIZE))[0], atol=2e-2, rtol=0
    )


def test_altered_damaged_missing_and_foreign_files_are_refused(saved, tmp_path):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    (tmp_path / "altered.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="differ from their checksum"):
        read_weights(tmp_path / "altered.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    with pytest.raises(WeightsError, match="cut.safetensors: not readable"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "none.safetensors")
    torch.save({"student": {}, "format": "x"}, tmp_path / "iteration_00000001.pt")
    with pytest.raises(WeightsError, match="training checkpoint: use alice export"):
        read_weights(tmp_path / "iteration_00000001.pt")
    with pytest.raises(WeightsError, match=r"write to .safetensors or .pt"):
        save_encoder(tmp_path / "e.bin", encoder(), {})
    with pytest.raises(WeightsError, match="Conv3d is not a network"):
        load_encoder(torch.nn.Conv3d(1, 1, 1), path)


def test_nothing_but_tensors_is_ever_unpickled(tmp_path):
    import datetime

    torch.save({"state_dict": {}, "when": datetime.date(2024, 5, 1)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="evil.pt holds more than weights: datetime.date.*are never run"):
        read_weights(tmp_path / "evil.pt")


def test_a_failed_write_leaves_no_file(tmp_path):
    target = tmp_path / "folder" / "e.safetensors"
    (tmp_path / "folder").write_text("a file where a folder should be")
    with pytest.raises(WeightsError, match="cannot be written"):
        save_encoder(target, encoder(), {})


# -- Swin and nnFormer -------------------------------------------------------------------------------------------------

SWIN = {
    "in_chans": 1,
    "embed_dim": 12,
    "window_size": (7, 7, 7),
    "patch_size": (2, 2, 2),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 3),
}
SWIN_UNETR = {
    "in_channels": 1,
    "out_channels": 3,
    "feature_size": 12,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 3),
}


@pytest.fixture
def saved_swin(tmp_path):
    torch.manual_seed(0)
    net = MaskedSwin(**SWIN).eval()
    save_encoder(tmp_path / "swin.safetensors", net, {"network_type": "MaskedSwin", "network": net.settings})
    return net, tmp_path / "swin.safetensors"


def test_stock_swin_unetr_is_filled_whole_and_gives_the_same_five_maps(saved_swin):
    net, path = saved_swin
    stock = SwinUNETR(**SWIN_UNETR).eval()
    report = load_encoder(stock, path)
    assert set(report.loaded) == set(stock.swinViT.state_dict())
    volume = torch.rand(1, 1, 64, 32, 96)
    for own, theirs in zip(net(volume), stock.swinViT(volume, normalize=True), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"downsample": "mergingv2"},
            r"downsample: 'merging' in the file, 'mergingv2' here: build the network with downsample='merging'",
        ),
        ({"use_v2": True}, "the network is Swin UNETR V2 and the file is not: build it with use_v2=False"),
        ({"depths": (2, 1, 2, 1)}, "missing: layers1.0.blocks.1.norm1.weight"),
        ({"num_heads": (1, 2, 3, 3)}, "shape: layers3.0.blocks.0.attn.relative_position_bias_table"),
        ({"in_channels": 2}, "pass adapt_channels=True"),
    ],
)
def test_a_swin_unetr_of_another_build_is_refused_with_the_fix(saved_swin, changes, message):
    with pytest.raises(WeightsError, match=message):
        load_encoder(SwinUNETR(**(SWIN_UNETR | changes)), saved_swin[1])


def test_a_swin_takes_more_input_channels_when_asked(saved_swin):
    net, path = saved_swin
    stock = SwinUNETR(**(SWIN_UNETR | {"in_channels": 2})).eval()
    load_encoder(stock, path, adapt_channels=True)
    volume = torch.rand(1, 1, 64, 32, 32)
    torch.testing.assert_close(
        stock.swinViT(volume.expand(-1, 2, -1, -1, -1))[4], net(volume)[4], atol=1e-4, rtol=1e-4
    )


def test_nnformer_takes_its_encoder_and_another_index_is_refused(tmp_path):
    torch.manual_seed(0)
    small = {"embed_dim": 6, "num_heads": (1, 1, 2, 2), "img_size": (64, 64, 32), "drop_path_rate": 0.0}
    net = NNFormer(1, 2, **small).eval()
    save_encoder(
        tmp_path / "n.safetensors", net.encoder, {"network_type": "NNFormer", "network": net.settings}
    )
    other = NNFormer(1, 5, **small).eval()
    report = load_encoder(other, tmp_path / "n.safetensors")
    assert set(report.loaded) == set(other.encoder.state_dict())
    volume = torch.rand(1, 1, 64, 64, 32)
    assert all(torch.equal(a, b) for a, b in zip(net.encode(volume), other.encode(volume), strict=True))
    with pytest.raises(WeightsError, match="relative_index: 'injective' in the file, 'official' here"):
        load_encoder(NNFormer(1, 2, **small, relative_index="official"), tmp_path / "n.safetensors")
    with pytest.raises(WeightsError, match="pass interpolate_positions"):
        load_encoder(NNFormer(1, 2, **(small | {"img_size": (64, 64, 64)})), tmp_path / "n.safetensors")
