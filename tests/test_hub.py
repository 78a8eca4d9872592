"""Folders of the Hugging Face hub: written whole, read back from a folder; the hub itself is asked only for an id."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VIT
from monai.networks.nets import UNETR, SwinUNETR
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from custom.cli.main import main
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.nnformer import NNFormer
from custom.methods import run_folder
from custom.methods.run_folder import Run
from custom.transfer import from_pretrained
from custom.transfer.encoder_weights import WeightsError
from custom.transfer.hub import save_folder

ABOUT = {
    "method": "alice",
    "spacing": [1.5, 1.5, 2.0],
    "window_hu": [-175.0, 250.0],
    "scans": 7,
    "crop_size": [32, 48, 16],
}


def vit():
    torch.manual_seed(0)
    return MaskedViT(**(TINY_VIT | {"num_layers": 12})).eval()


def about(net):
    return ABOUT | {"network_type": type(net).__name__, "network": net.settings}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of one network, as load_run gives it, with a log."""
    net, folder = vit(), tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 0, "probe/retrieval": 0.25, "probe/chance": 0.1}, {"step": 4, "total": 3.0},
             {"step": 8, "probe/retrieval": 0.75, "probe/chance": 0.1}, {"step": 12, "probe/retrieval": 0.9}]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = about(net) | {"store_dir": "/home/somebody/store", "held_back": ["patient_17"]}
    student = SimpleNamespace(encoder=SimpleNamespace(encoder=net))
    monkeypatch.setattr(run_folder, "load_run", lambda *_: Run(folder, 10, summary, student))
    return net, folder


def test_a_run_becomes_a_folder_that_fills_stock_networks(run, tmp_path):
    net, folder = run
    target = tmp_path / "hf"
    main(
        [
            "export",
            str(folder),
            "--to",
            str(target),
            "--format",
            "hf",
            "--license",
            "apache-2.0",
            "--data",
            "7 CT of us",
        ]
    )
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["MaskedViT"] and config["network"]["hidden_size"] == 48
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "| data | 7 CT of us |" in card
    assert "| retrieval, step 0 | 0.25 |" in card and "| retrieval, step 8 | 0.75 |" in card
    assert "0.9" not in card  # of a step after the checkpoint
    for text in (card, json.dumps(config)):
        assert "somebody" not in text and "patient_17" not in text

    volume = torch.rand(1, 1, 32, 48, 16)
    built = from_pretrained(target)
    assert isinstance(built, MaskedViT) and not built.training
    torch.testing.assert_close(built(volume)[0], net(volume)[0], rtol=0, atol=0)
    unetr = UNETR(1, 3, (32, 48, 16), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4)
    assert from_pretrained(str(target), unetr) is unetr
    torch.testing.assert_close(unetr.eval().vit(volume)[0], net(volume)[0], rtol=0, atol=1e-5)


def test_a_published_checkpoint_becomes_a_folder(tmp_path):
    swin = SwinUNETR(1, 3, feature_size=12, num_heads=(1, 2, 2, 3), use_v2=True)
    torch.save({"net": swin.state_dict()}, tmp_path / "voco.pt")
    main(["convert", str(tmp_path / "voco.pt"), "--to", str(tmp_path / "hf"), "--format", "hf"])
    built = from_pretrained(tmp_path / "hf")
    assert all(torch.equal(v, swin.swinViT.state_dict()[k]) for k, v in built.state_dict().items())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "license: other" in card
        and "ask before you use" in card
        and "that of voco.pt" in card
        and "No probe" in card
    )


def test_nnformer_comes_back_as_its_encoder(tmp_path):
    net = NNFormer(1, 2, embed_dim=6, num_heads=(1, 1, 2, 2), img_size=(64, 64, 32))
    save_folder(tmp_path / "n", net.encoder, {"network_type": "NNFormer", "network": net.settings})
    built = from_pretrained(tmp_path / "n")
    assert all(torch.equal(v, net.encoder.state_dict()[k]) for k, v in built.state_dict().items())


def test_weights_that_another_program_wrote_anew_are_built_from_the_config(tmp_path):
    net = vit()
    save_folder(tmp_path, net, about(net))
    save_file(
        load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    built = from_pretrained(tmp_path)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in built.state_dict().items())


def test_an_id_is_asked_of_the_hub(tmp_path, monkeypatch):
    net, asked = vit(), []
    save_folder(tmp_path, net, about(net))

    def download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    assert isinstance(from_pretrained("somebody/encoder", revision="v1"), nn.Module)
    assert ("somebody/encoder", "model.safetensors", "v1") in asked


@pytest.mark.parametrize("name, told", [
    ("somebody/encoder", r"pip install 'alice-monai\[hub\]'"),
    ("encoder", "no such folder, and an id of the hub reads owner/name"),
    ("a/b/c", "no such folder, and an id of the hub reads owner/name"),
])  # fmt: skip
def test_without_the_extra_and_for_what_is_no_id_the_way_out_is_said(monkeypatch, name, told):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=told):
        from_pretrained(name)


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("cannot reach the hub\nmore lines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    with pytest.raises(
        WeightsError, match=r"^somebody/x: the hub gives no model.safetensors \(cannot reach the hub\)"
    ):
        from_pretrained("somebody/x")


def test_folders_without_an_encoder_and_files_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="holds no model.safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file"):
        from_pretrained(tmp_path / "file")
    with pytest.raises(WeightsError, match="is a file; name a folder"):
        save_folder(tmp_path / "file", vit(), about(vit()))
    save_folder(tmp_path / "other", vit(), about(vit()) | {"network_type": "ResNet"})
    with pytest.raises(WeightsError, match="names the network 'ResNet'"):
        from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("words, told", [
    (["--to", "e.safetensors", "--format", "hf"], "--format hf writes a folder"),
    (["--to", "onnx", "--format", "hf"], "--format hf writes a folder"),
    (["--to", "folder", "--format", "keras"], "--format keras: is not known"),
])  # fmt: skip
def test_formats_that_do_not_go_together_are_refused(run, capsys, words, told):
    with pytest.raises(SystemExit):
        main(["export", str(run[1]), *words])
    assert told in capsys.readouterr().err
