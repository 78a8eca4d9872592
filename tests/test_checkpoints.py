"""Published checkpoints, imitated with their real names: the encoder is read whole, by every reader, or refused with the reason.

The names are those of the authors' code (docs/checkpoints.md names the files); sizes are small.
"""

import datetime
import re

import pytest
import torch
from monai.networks.nets import UNETR, MaskedAutoEncoderViT, SwinUNETR, ViT, ViTAutoEnc
from seg_bundles import TINY, parser_of
from torch import nn

from custom.cli.main import main
from custom.encoders.nnformer import NNFormer
from custom.errors import AliceError
from custom.transfer.convert import convert
from custom.transfer.encoder_weights import WeightsError, build_encoder, load_encoder, read_weights
from custom.transfer.official import ALICE_NAMES

SWIN = {"feature_size": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 3)}
SIZE = (32, 32, 16)
VIT = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}


def swin(seed=1, **kwargs):
    torch.manual_seed(seed)
    return SwinUNETR(1, 3, **SWIN, **kwargs).eval()


def vit(seed=1, **kwargs):
    torch.manual_seed(seed)
    return ViT(1, SIZE, (16, 16, 16), num_layers=12, **VIT, **kwargs).eval()


def before(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def fc(state):
    return {re.sub(r"\.mlp\.linear(\d)", r".mlp.fc\1", name): tensor for name, tensor in state.items()}


def heads(**sizes):
    return {f"{name}.weight": torch.rand(3, 2) for name in sizes} | {
        f"{name}.bias": torch.rand(3) for name in sizes
    }


def valanarasu(net):
    """ssl_pretrained_weights.pth: MONAI's filter_swinunetr drops two characters behind ``encoder.layers1.0.``."""
    inner = {
        re.sub(r"^(layers\d\.0)\.", r"\1.0.", name): tensor
        for name, tensor in net.swinViT.state_dict().items()
    }
    norm = {"mask_token": torch.rand(1, 1, 12), "norm.weight": torch.rand(192), "norm.bias": torch.rand(192)}
    rest = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("swinViT.")}
    return {"model": before("encoder.", inner | norm) | rest, "epoch": 3}


def timm(net):
    """The encoder of SelfMedMAE: timm's blocks, a class token, positions beside the encoder."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("patch_embedding.patch_embeddings", "encoder.patch_embed.proj")
        name = name.replace("patch_embedding.position_embeddings", "encoder_pos_embed")
        name = name.replace("attn.out_proj", "attn.proj").replace("mlp.linear", "mlp.fc")
        name = f"encoder.{name}" if name.startswith(("blocks", "norm", "cls_token")) else name
        state |= {} if "cross_attn" in name or "classification" in name else {name: tensor}
    decoder = before("decoder.", {"blocks.0.norm1.weight": torch.rand(24), "norm.weight": torch.rand(24)})
    extra = {
        "mask_token": torch.rand(1, 1, 24),
        "encoder_to_decoder.weight": torch.rand(24, 48),
        "decoder_pos_embed": torch.rand(1, 4, 24),
    }
    return {
        "epoch": 1,
        "state_dict": state | decoder | extra,
        "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}},
    }


# name -> (a network whose weights were published, what its file holds)
SWIN_FILES = {
    "model_swinvit.pt (Tang)": lambda n: {"state_dict": before("module.", fc(n.swinViT.state_dict()) | heads(rotation_head=4, contrastive_head=5))},
    "Pretrain/main.py (Tang)": lambda n: {"state_dict": before("module.swinViT.", n.swinViT.state_dict()) | heads(**{"module.rotation_head": 4, "module.conv.0": 3}), "epoch": 4},
    "self_supervised_nv_swin_unetr_5050.pt": lambda n: {"state_dict": n.state_dict()},
    "ssl_pretrained_weights.pth (Valanarasu)": valanarasu,
    "supervised_suprem_swinunetr_2100.pth": lambda n: {"net": before("module.backbone.", n.state_dict()) | {"module.organ_embedding": torch.rand(4, 5)} | heads(**{"module.GAP.0": 1}), "epoch": 7},
    "clip_driven_universal": lambda n: {"net": before("backbone.", n.state_dict()) | {"organ_embedding": torch.rand(4, 5)}},
    "swin_unetr.base_5000ep (BTCV)": lambda n: {"epoch": 3, "best_acc": torch.tensor(0.8).double().numpy().max(), "state_dict": n.state_dict()},
    "an older swin_vit": lambda n: {"state_dict": before("swin_vit.", n.swinViT.state_dict())},
    "whole SwinUNETR": lambda n: n.state_dict(),
    "Lightning and torch.compile": lambda n: {"state_dict": before("model._orig_mod.", n.state_dict()), "pytorch-lightning_version": "2.0"},
    "MONAI Label": lambda n: {"model": n.state_dict()},
    "network_weights": lambda n: {"network_weights": before("module._orig_mod.", n.state_dict())},
}  # fmt: skip
V2_FILES = {
    "VoComni_B.pt": lambda n: {"state_dict": n.state_dict()},
    "VoCo_B_SSL_head.pt": lambda n: before("backbone.", n.state_dict()) | heads(**{"student.layer1.0": 2, "teacher.layer1.0": 2, "backbone.proj_head": 2}),
    "VoCo model_step.pt": lambda n: {"global_step": 9, "state_dict": before("module.backbone.", n.state_dict()) | heads(**{"module.student.layer1.0": 2})},
}  # fmt: skip
VIT_FILES = {
    "UNETR.load_from": lambda n: {"state_dict": before("module.transformer.", {k: v for k, v in n.state_dict().items() if "cross" not in k} | {"patch_embedding.cls_token": torch.rand(1, 1, 48)})},
    "whole UNETR": lambda n: before("vit.", n.state_dict()) | {"encoder1.layer.conv1.conv.weight": torch.rand(2)},
    "ViTAutoEnc (vit_unetr_ssl)": lambda n: {"epoch": 2, "state_dict": before("module.", n.state_dict()) | heads(**{"module.conv3d_transpose": 1, "module.conv3d_transpose_1": 1})},
    "fc1 and attn.proj": lambda n: fc({k.replace("out_proj", "proj"): v for k, v in n.state_dict().items()}),
}  # fmt: skip


def filled_by_load_encoder(path, network, _):
    report = load_encoder(network, path)
    assert len(report.loaded) == report.wanted
    return network


def filled_by_the_bundle(path, network, _):
    weights = parser_of("train").get_parsed_content("scripts").weights
    encoder = network.swinViT if isinstance(network, SwinUNETR) else network.vit
    assert weights.encoder_problems(encoder, str(path), SIZE) == []
    return weights.with_encoder(network, encoder, str(path))


def filled_by_convert(path, network, folder):
    words = [] if isinstance(network, SwinUNETR) else ["--num_heads", "4", "--trained_size", "[32,32,16]"]
    main(["convert", str(path), "--to", str(folder / "e.safetensors"), *words])
    load_encoder(network, folder / "e.safetensors")
    metadata = read_weights(folder / "e.safetensors")[1]
    built = build_encoder(metadata)
    encoder = network.swinViT if isinstance(network, SwinUNETR) else network.vit
    load_encoder(built, folder / "e.safetensors")
    assert all(
        torch.equal(encoder.state_dict()[k], v) for k, v in built.state_dict().items() if "cross" not in k
    )
    assert metadata["converted"]["file"] == path.name and len(metadata["converted"]["sha256"]) == 64
    return network


READERS = {
    "load_encoder": filled_by_load_encoder,
    "bundle": filled_by_the_bundle,
    "convert": filled_by_convert,
}


def features(network, volume):
    if isinstance(network, SwinUNETR):
        return network.swinViT(volume)
    vit = network.vit if isinstance(network, UNETR) else network
    return vit(volume)[1]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every imitation on disk: name -> (path, the network it came from, a volume, the network's features)."""
    folder, made = tmp_path_factory.mktemp("published"), {}
    for source, size, files in (
        (swin(), (32, 32, 32), SWIN_FILES),
        (swin(use_v2=True), (32, 32, 32), V2_FILES),
        (vit(), SIZE, VIT_FILES),
    ):
        volume = torch.rand(1, 1, *size)
        reference = features(source, volume)
        for name, wrap in files.items():
            path = folder / f"{len(made)}.pt"
            torch.save(wrap(source), path)
            made[name] = (path, source, volume, reference)
    return made


@pytest.fixture(scope="module")
def others():
    """Networks of other weights, to be filled."""
    torch.manual_seed(2)
    unetr = UNETR(1, 3, SIZE, feature_size=4, **VIT).eval()
    return {"v1": swin(2), "v2": swin(2, use_v2=True), "vit": unetr}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*SWIN_FILES, *V2_FILES, *VIT_FILES])
def test_every_layout_is_read_whole_by_every_reader(published, others, tmp_path, name, reader):
    path, _, volume, reference = published[name]
    network = others["v1" if name in SWIN_FILES else "v2" if name in V2_FILES else "vit"]
    for parameter in network.parameters():  # so that what is not filled shows
        nn.init.constant_(parameter, torch.nan)
    READERS[reader](path, network, tmp_path)
    for own, theirs in zip(features(network, volume), reference, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)


def test_it_is_said_what_was_taken_from_where(published):
    report = load_encoder(swin(2), published["supervised_suprem_swinunetr_2100.pth"][0])
    assert report.place.startswith("under 'net', below module.backbone.swinViT., left out ")
    assert "organ_embedding" in report.place and "taken from" in str(report)
    report = load_encoder(swin(2), published["model_swinvit.pt (Tang)"][0])
    assert "fc1 and fc2, here linear1 and linear2" in report.place and "rotation_head" in report.place


# -- a class token ------------------------------------------------------------------------------------------------------


def mae():
    torch.manual_seed(1)
    return MaskedAutoEncoderViT(
        1, SIZE, (16, 16, 16), num_layers=12, decoder_hidden_size=24, decoder_num_heads=2, **VIT
    ).eval()


def mae_features(net, volume):
    tokens = net.patch_embedding(volume)
    tokens = torch.cat([net.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    return net.blocks(tokens)


@pytest.mark.parametrize("kind", ["MaskedAutoEncoderViT", "SelfMedMAE", "timm"])
def test_a_class_token_is_taken_where_the_network_has_one_and_refused_elsewhere(tmp_path, kind):
    path, volume = tmp_path / "mae.pt", torch.rand(2, 1, *SIZE)
    net = ViT(
        1,
        SIZE,
        (16, 16, 16),
        num_layers=12,
        classification=True,
        **VIT,
        qkv_bias=kind != "MaskedAutoEncoderViT",
    ).eval()
    if kind == "MaskedAutoEncoderViT":
        source = mae()
        torch.save(source.state_dict(), path)
        expected = mae_features(source, volume)
    else:
        source = vit(classification=True, qkv_bias=True)
        nn.init.normal_(source.cls_token)
        content, tokens = timm(source), source.patch_embedding(volume)
        row = torch.zeros(1, 1, 48)
        if kind == "timm":  # a table with a first row for the class token
            row = torch.rand(1, 1, 48)
            state = {
                k.removeprefix("encoder."): v
                for k, v in content["state_dict"].items()
                if k.startswith("encoder.")
            }
            content = state | {
                "pos_embed": torch.cat([row, content["state_dict"]["encoder_pos_embed"]], dim=1)
            }
        torch.save(content, path)
        tokens = torch.cat([(source.cls_token + row).expand(2, -1, -1), tokens], dim=1)
        for block in source.blocks:
            tokens = block(tokens)
        expected = source.norm(tokens)
    report = load_encoder(net, path)
    assert "cls_token" in report.loaded and len(report.loaded) == report.wanted
    tokens = net.patch_embedding(volume)
    tokens = torch.cat([net.cls_token.expand(2, -1, -1), tokens], dim=1)
    for block in net.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(net.norm(tokens), expected, rtol=0, atol=1e-5)

    unetr = UNETR(1, 3, SIZE, feature_size=4, **VIT, qkv_bias=kind != "MaskedAutoEncoderViT")
    with pytest.raises(
        WeightsError, match="mae.pt: nothing was loaded: it was trained with a class token.*drop_class_token"
    ):
        load_encoder(unetr, path)
    weights = parser_of("train").get_parsed_content("scripts").weights
    assert "class token" in weights.encoder_problems(unetr.vit, str(path), SIZE)[0]
    report = load_encoder(unetr, path, drop_class_token=True)
    assert len(report.loaded) == report.wanted and "features differ" in report.adapted["cls_token"]
    words = ["--trained_size", "[32,32,16]", "--num_heads", "4"]
    with pytest.raises(SystemExit):
        main(["convert", str(path), "--to", str(tmp_path / "e.pt"), *words])
    assert not (tmp_path / "e.pt").exists()
    main(["convert", str(path), "--to", str(tmp_path / "e.pt"), "--drop_class_token", *words])
    other = UNETR(1, 3, SIZE, feature_size=4, **VIT, qkv_bias=kind != "MaskedAutoEncoderViT")
    load_encoder(other, tmp_path / "e.pt")
    torch.testing.assert_close(other.vit(volume)[0], unetr.vit(volume)[0], rtol=0, atol=0)


# -- Alice's nnFormer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nnformer():
    torch.manual_seed(1)
    return NNFormer(position_embedding="none", relative_index="official").eval()


def official(net):
    state = {}
    for name, tensor in net.state_dict().items():
        for pattern, replacement in ALICE_NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for name, index in net.named_buffers():
        if name.endswith("relative_position_index"):
            state[name.replace("encoder.", "model_down.", 1)] = index
    return state


@pytest.mark.parametrize("kind", ["flat", "teacher", "training"])
def test_the_authors_nnformer_is_read_whole(tmp_path, nnformer, kind):
    state, path = official(nnformer), tmp_path / "alice.pth"
    both = {"student": before("module.backbone.", state), "teacher": before("backbone.", state), "epoch": 1}
    torch.save(
        {"flat": state | {"state_dict": {}}, "teacher": {"state_dict": state}, "training": both}[kind], path
    )
    net = NNFormer(position_embedding="none", relative_index="official").eval()
    which = "teacher" if kind == "training" else ""
    if which:
        with pytest.raises(WeightsError, match=r"it holds 2 encoders: under 'student', below module.backbone.model_down., "
                           r"under 'teacher'.*which='teacher'.*alice convert FILE --which teacher"):  # fmt: skip
            load_encoder(net, path)
    report = load_encoder(net, path, which=which)
    assert len(report.loaded) == report.wanted
    assert all(torch.equal(v, nnformer.encoder.state_dict()[k]) for k, v in net.encoder.state_dict().items())
    main(
        [
            "convert",
            str(path),
            "--to",
            str(tmp_path / "e.safetensors"),
            *(["--which", which] if which else []),
        ]
    )
    load_encoder(build_encoder(read_weights(tmp_path / "e.safetensors")[1]), tmp_path / "e.safetensors")
    with pytest.raises(WeightsError, match="build NNFormer with position_embedding='none'"):
        load_encoder(NNFormer(relative_index="official"), path, which=which)
    with pytest.raises(WeightsError, match="build it with relative_index='official'"):
        load_encoder(NNFormer(position_embedding="none"), path, which=which)


# -- refusals -----------------------------------------------------------------------------------------------------------


def both(net):
    return {
        "student": net.swinViT.state_dict(),
        "teacher": before("backbone.swinViT.", net.swinViT.state_dict()),
    }


def without(net):
    state = net.state_dict()
    del state["swinViT.layers3.0.blocks.1.attn.qkv.weight"]
    return {"net": before("module.", state)}


REFUSED = {
    "two encoders": (both, "it holds 2 encoders: under 'student', under 'teacher', below backbone.swinViT."),
    "half of one": (without, "missing: layers3.0.blocks.1.attn.qkv.weight|layers3.0.blocks.1.attn.qkv.weight is missing"),
    "Swin V2": (lambda n: swin(use_v2=True).state_dict(), "the file is of Swin UNETR V2: build the network with use_v2=True"),
    "deeper": (lambda n: SwinUNETR(1, 3, **(SWIN | {"depths": (2, 2, 4, 2)})).state_dict(), "layers3.0.blocks.2"),
    "another network": (lambda n: {"net": {"conv1.weight": torch.rand(2), "fc.weight": torch.rand(3)}},
                        "none of its 2 tensors has a name of this encoder; the first are conv1.weight"),
    "no tensors": (lambda n: {"epoch": 1, "args": "x"}, "it holds no state dict, but epoch, args"),
    "objects": (lambda n: {"state_dict": n.state_dict(), "when": datetime.date(2024, 1, 1)},
                "holds more than weights: datetime.date.*pickled objects are never run"),
    "twice": (lambda n: n.state_dict() | before("module.", n.state_dict()), "holds swinViT.patch_embed.proj.weight twice"),
    "a run of ours": (lambda n: {"format": "alice-run-2", "student": n.state_dict()}, "training checkpoint of alice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_one_whole_encoder_is_refused_by_every_reader(tmp_path, capsys, kind):
    wrap, told = REFUSED[kind]
    path, network = tmp_path / "published.pt", swin(2)
    torch.save(wrap(swin()), path)
    untouched = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=told) as refused:
        load_encoder(network, path)
    assert "published.pt" in str(refused.value)
    weights = parser_of("train").get_parsed_content("scripts").weights
    (problem,) = weights.encoder_problems(network.swinViT, str(path), (96, 96, 96))
    assert "published.pt" in problem and re.search(told, problem, re.DOTALL)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in network.state_dict().items())
    if kind in ("Swin V2", "deeper"):  # convert builds the network that the file is of
        return
    with pytest.raises(SystemExit):
        main(["convert", str(path), "--to", str(tmp_path / "e.safetensors")])
    assert "published.pt" in capsys.readouterr().err and not (tmp_path / "e.safetensors").exists()


def test_which_of_two_encoders_is_said(tmp_path):
    one, other, path = swin(1), swin(3), tmp_path / "both.pt"
    torch.save({"student": one.state_dict(), "teacher": before("module.", other.state_dict())}, path)
    for which, source in (("student", one), ("teacher", other)):
        network = swin(2)
        load_encoder(network, path, which=which)
        assert torch.equal(network.swinViT.patch_embed.proj.weight, source.swinViT.patch_embed.proj.weight)
    with pytest.raises(WeightsError, match="it holds no 'ema', but under 'student'"):
        load_encoder(swin(2), path, which="ema")


@pytest.mark.parametrize("words, told", [
    (["--num_heads", "4"], "whose tensors show heads and windows"),
    (["--which", "teacher"], "holds no encoder under 'teacher'"),
    (["--img_size", "[32,32,32]"], "fits crops of any size"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, words, told):
    torch.save(swin().state_dict(), tmp_path / "m.pt")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "m.pt"), "--to", str(tmp_path / "e.pt"), *words])
    assert told in capsys.readouterr().err and not (tmp_path / "e.pt").exists()


def test_sizes_that_no_tensor_shows_are_asked_for_or_told(tmp_path, capsys):
    torch.save(vit().state_dict(), tmp_path / "m.pt")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "m.pt"), "--to", str(tmp_path / "e.pt")])
    assert "its 4 positions are those of no cube" in capsys.readouterr().err
    torch.manual_seed(1)
    cube = ViTAutoEnc(1, (32, 32, 32), (16, 16, 16), num_layers=2, hidden_size=128, mlp_dim=64, num_heads=2)
    torch.save(cube.state_dict(), tmp_path / "cube.pt")
    main(
        [
            "convert",
            str(tmp_path / "cube.pt"),
            "--to",
            str(tmp_path / "e.pt"),
            "--img_size",
            "[32,64,32]",
            "--license",
            "CC-BY-4.0",
        ]
    )
    told = capsys.readouterr().out
    assert "assumed: num_heads 2" in told and "assumed: img_size [32, 32, 32]: a cube of 2^3 tokens" in told
    metadata = read_weights(tmp_path / "e.pt")[1]
    assert metadata["network"]["img_size"] == [32, 64, 32] and metadata["license"] == "CC-BY-4.0"
    assert len(metadata["converted"]["assumed"]) == 2
    with pytest.raises(AliceError, match="needs no conversion"):
        convert(tmp_path / "e.pt")


def test_the_tiny_settings_of_the_bundle_fit_this_file():
    assert TINY["roi_size"] == list(SIZE)
