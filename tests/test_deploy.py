import inspect
import json
import os
import sys
from pydoc import locate

import pytest
import torch
from conftest import REPO
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data.torchscript_utils import load_net_with_metadata
from monai.handlers import CheckpointLoader
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR, SwinUNETR
from safetensors.torch import save_file
from torch import nn

from custom.bundles import deploy
from custom.bundles.deploy import DeployError, OpenVINONetwork, compare, export_network, sample_window
from custom.bundles.network import BundleError, Deployable, read_bundle
from custom.bundles.preflight import check_keys
from custom.cli import main as cli
from custom.transfer.encoder_weights import WeightsError, sha256_of

ROI = (32, 48, 16)
SETTINGS = {
    "in_channels": 1,
    "out_channels": 3,
    "img_size": list(ROI),
    "feature_size": 4,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_heads": 4,
}
CONFIG = {
    "bundle_root": ".",
    "checkpoint": "$@bundle_root + '/models/model.pt'",
    "network_def": {"_target_": "UNETR", **SETTINGS},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0]},
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "image",
                "a_min": -175,
                "a_max": 250,
                "b_min": 0.0,
                "b_max": 1.0,
                "clip": True,
            },
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": list(ROI), "overlap": 0.5},
}
LABELS = {"0": "background", "1": "liver", "2": "spleen"}
ABOUT = {
    "name": "Tiny",
    "version": "0.1.0",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1}},
        "outputs": {"pred": {"channel_def": LABELS}},
    },
}


def unetr(**changes):
    torch.manual_seed(0)
    return UNETR(**(SETTINGS | changes)).eval()


def write_bundle(folder, config=CONFIG):
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps(ABOUT))
    torch.save(unetr().state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "tiny")


@pytest.fixture(scope="module")
def openvino_export(tmp_path_factory):
    """A bundle with its OpenVINO export beside its weights."""
    pytest.importorskip("openvino")
    folder = write_bundle(tmp_path_factory.mktemp("exported") / "tiny")
    export_network(read_bundle(folder), "openvino", folder / "models" / "model.xml")
    return folder


class Alters(nn.Module):
    """Not the same when traced: what Python decides is baked in."""

    def forward(self, x):
        return torch.cat([x * (3.0 if float(x[0, 0, 0, 0, 0]) < 0.7 else 1.0), x + 0.1], dim=1)


def test_a_bundles_network_comes_with_its_weights_and_all_that_feeding_it_takes(bundle):
    found = read_bundle(bundle)
    assert found.input_shape == (1, *ROI) and not found.network.training
    assert found.metadata == {
        "name": "Tiny",
        "version": "0.1.0",
        "labels": LABELS,
        "orientation": "RAS",
        "spacing": [1.5, 1.5, 2.0],
        "window_hu": [-175.0, 250.0],
        "scaled_to": [0.0, 1.0],
        "roi_size": list(ROI),
        "weights": "model.pt",
        "sha256": sha256_of(unetr().state_dict()),
    }
    window = sample_window((1, 1, *ROI), seed=3)
    with torch.no_grad():
        torch.testing.assert_close(found.network(window), unetr()(window), rtol=0, atol=0)


def test_a_checkout_without_model_pt_gives_its_model_safetensors(bundle):
    from_pt = read_bundle(bundle).metadata
    save_file(unetr().state_dict(), bundle / "models" / "model.safetensors")
    assert read_bundle(bundle).metadata["weights"] == "model.pt"
    (bundle / "models" / "model.pt").unlink()
    found = read_bundle(bundle)
    assert found.metadata == from_pt | {"weights": "model.safetensors"}
    for name, tensor in unetr().state_dict().items():
        if "cross_attn" not in name:  # MONAI 1.5 makes it, and never uses it
            torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=0, atol=0)
    path = bundle / "models" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model.safetensors: not readable as weights"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["alice_seg_flare", "alice_seg_btcv"])
def test_a_segmentation_bundle_is_read_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_bundle(REPO / "bundles" / name)
    assert found.input_shape == (1, 64, 64, 64) and found.metadata["spacing"] == [3.0, 3.0, 3.0]
    assert found.metadata["labels"]["0"] == "background"


def test_torchscript_answers_as_the_network_for_batches_too_and_stock_monai_reads_its_metadata(bundle):
    path = bundle / "models" / "model.ts"
    comparison = export_network(read_bundle(bundle), "torchscript", path)
    assert comparison.relative < 1e-6 and comparison.agreement == 1.0
    loaded, metadata, _ = load_net_with_metadata(str(path))
    assert metadata["labels"] == LABELS and metadata["spacing"] == [1.5, 1.5, 2.0]
    assert metadata["sha256"] == sha256_of(unetr().state_dict()) and metadata["format"] == deploy.FORMAT
    volume = sample_window((1, 1, 41, 59, 23), seed=4)
    with torch.no_grad():
        found, expected = (sliding_window_inference(volume, ROI, 3, net) for net in (loaded, unetr()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.pt", "model.ts"]


@pytest.mark.slow
def test_activation_checkpointing_is_off_while_exporting_and_on_again_afterwards(tmp_path):
    torch.manual_seed(0)
    net = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), use_checkpoint=True)
    found = export_network(Deployable(net, (1, 64, 64, 32), {}), "torchscript", tmp_path / "swin.ts")
    assert found.relative < 1e-5 and net.swinViT.layers1[0].use_checkpoint is True


def test_an_export_that_answers_differently_is_refused_and_an_older_file_kept(tmp_path):
    path = tmp_path / "net.ts"
    path.write_bytes(b"older")
    changed = Deployable(Alters(), (1, 16, 16, 16), {})
    one, other = (sample_window((1, 1, 16, 16, 16), seed)[0, 0, 0, 0, 0] for seed in (0, 1))
    assert (one < 0.7) != (other < 0.7)  # else the trap does not spring
    with pytest.raises(
        DeployError, match=r"net.ts: not written, since the torchscript network answers differently"
    ):
        export_network(changed, "torchscript", path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.ts"] and path.read_bytes() == b"older"
    assert export_network(changed, "torchscript", path, tolerance=10.0).relative > 0.1
    assert path.read_bytes() != b"older"


def test_an_answer_of_nan_is_no_match(tmp_path):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.cat([x, x.log() * (x - 2).log()], dim=1)

    with pytest.raises(DeployError, match="answers differently"):
        export_network(Deployable(Breaks(), (1, 16, 16, 16), {}), "torchscript", tmp_path / "net.ts")
    assert not list(tmp_path.iterdir())


def test_differences_are_measured_by_hand_made_numbers():
    expected = torch.tensor([[4.0, 1.0], [2.0, 3.0]]).view(1, 2, 2, 1, 1)
    found = torch.tensor([[4.0, 1.0], [4.5, 3.0]]).view(1, 2, 2, 1, 1)
    assert compare(expected, found) == (2.5, 0.625, 0.5)
    with pytest.raises(DeployError, match="gives"):
        compare(expected, found[:, :1])


def test_weights_of_others_are_refused_by_name(bundle, tmp_path):
    state = unetr().state_dict()
    for name, content, message in (
        (
            "ddp",
            {f"module.{k}": v for k, v in state.items()},
            r"ddp.pt does not fit UNETR: every name starts with module.",
        ),
        (
            "other",
            unetr(out_channels=4).state_dict(),
            r"other.pt does not fit UNETR[\s\S]*out.conv.conv.bias",
        ),
        ("short", dict(list(state.items())[1:]), r"Missing key\(s\) in state_dict: \"vit"),
        ("many", {f"{k}x": v for k, v in state.items()}, "Missing key"),
        ("list", [1, 2], "holds no state dict"),
        ("empty", {}, "holds no state dict"),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(WeightsError, match=message):
            read_bundle(bundle, tmp_path / f"{name}.pt")
    (tmp_path / "cut.pt").write_bytes((bundle / "models" / "model.pt").read_bytes()[:999])
    with pytest.raises(WeightsError, match=r"cut.pt: not readable"):
        read_bundle(bundle, tmp_path / "cut.pt")
    with pytest.raises(WeightsError, match=r"none.pt: no such file"):
        read_bundle(bundle, tmp_path / "none.pt")
    torch.save({"model": state}, tmp_path / "nested.pt")  # as MONAI Label writes
    assert read_bundle(bundle, tmp_path / "nested.pt").metadata["sha256"] == sha256_of(state)


def test_folders_that_are_no_bundle_and_configs_without_a_window_are_refused(tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        read_bundle(tmp_path)
    without = {key: value for key, value in CONFIG.items() if key != "network_def"}
    with pytest.raises(BundleError, match=r"inference.json: has no 'network_def'"):
        read_bundle(write_bundle(tmp_path / "a", without))
    simple = CONFIG | {"inferer": {"_target_": "SimpleInferer"}}
    with pytest.raises(BundleError, match="no fixed roi_size"):
        read_bundle(write_bundle(tmp_path / "b", simple))


def test_kinds_suffixes_and_missing_packages_are_named(bundle, tmp_path, monkeypatch):
    network = read_bundle(bundle)
    with pytest.raises(DeployError, match=r"torchscript, onnx, openvino, not 'tensorrt'"):
        export_network(network, "tensorrt", tmp_path / "x.engine")
    with pytest.raises(DeployError, match=r"written to a file that ends in .onnx"):
        export_network(network, "onnx", tmp_path / "x.pt")
    with pytest.raises(DeployError, match="for openvino only"):
        export_network(network, "torchscript", tmp_path / "x.ts", half=True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeployError, match=r"openvino is not installed: pip install 'alice-monai\[cpu\]'"):
        export_network(network, "openvino", tmp_path / "x.xml")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_the_command_exports_a_bundle_and_says_how_far_the_answers_lie_apart(bundle, monkeypatch, capsys):
    def alice(*words):
        monkeypatch.setattr(sys, "argv", ["alice", "export", str(bundle), *words])
        cli.main()
        return capsys.readouterr().out

    assert "model.ts: largest difference" in alice("--to", "torchscript")
    (bundle / "configs" / "wide.json").write_text(json.dumps({"network_def::out_channels": 4}))
    torch.save(unetr(out_channels=4).state_dict(), bundle / "wide.pt")
    alice(
        "--to=torchscript", "-o", f"{bundle}/w/wide.ts", f"--weights={bundle}/wide.pt", "--config=wide.json"
    )
    assert torch.jit.load(bundle / "w" / "wide.ts")(torch.zeros(1, 1, *ROI)).shape[1] == 4
    for words, message in (
        (["--to", "x.safetensors"], "is a bundle; export it with --to torchscript"),
        (["--to", "onnx", "-o", "model.pt"], "ends in .onnx"),
        (["--to", "onnx", "--config", "absent.yaml"], "absent.yaml: no such config file"),
    ):
        with pytest.raises(SystemExit) as left:
            alice(*words)
        assert left.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_answers_as_the_network_and_holds_its_metadata(bundle):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = bundle / "models" / "model.onnx"
    comparison = export_network(read_bundle(bundle), "onnx", path)
    assert comparison.relative < 1e-4 and comparison.agreement > 0.999
    model = onnx.load(path)
    onnx.checker.check_model(model)
    held = json.loads({entry.key: entry.value for entry in model.metadata_props}["alice"])
    assert held["labels"] == LABELS and held["roi_size"] == list(ROI)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.pt"]


def test_openvino_does_not_report_our_users(openvino_export, tmp_path, monkeypatch):
    sender = pytest.importorskip("openvino_telemetry.utils.sender")
    sent = []
    monkeypatch.setattr(sender.TelemetrySender, "send", lambda *args, **kwargs: sent.append(args))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    export_network(read_bundle(openvino_export), "openvino", tmp_path / "quiet.xml")
    assert not sent and "CI" not in os.environ


def test_openvino_stands_in_for_the_network_in_a_sliding_window(openvino_export):
    net = OpenVINONetwork(openvino_export / "models" / "model.xml", num_threads=1)
    assert net.metadata["labels"] == LABELS and not list(net.parameters())
    volume = sample_window((1, 1, 41, 59, 23), seed=4)
    with torch.no_grad():
        found, expected = (
            sliding_window_inference(volume, ROI, 3, n, mode="gaussian") for n in (net, unetr())
        )
    assert compare(expected, found).relative < 1e-3 and compare(expected, found).agreement > 0.999
    with pytest.raises(DeployError, match=r"windows of \(1, 32, 48, 16\), not \(1, 48, 32, 16\)"):
        net(torch.zeros(1, 1, 48, 32, 16))


def test_openvino_refuses_to_stand_in_for_other_weights(openvino_export, tmp_path):
    net = OpenVINONetwork(openvino_export / "models" / "model.xml", num_threads=1)
    for path in (openvino_export / "models" / "model.pt", tmp_path / "tuned.pt"):
        state = unetr().state_dict()
        if path.name == "tuned.pt":
            state["out.conv.conv.bias"] += 0.5
            torch.save(state, path)
        engine = Engine(lambda _, batch: batch)
        CheckpointLoader(str(path), {"model": net}).attach(engine)
        if path.name == "tuned.pt":
            with pytest.raises(DeployError, match=r"was not made from these weights .*alice export BUNDLE"):
                engine.run([0])
        else:
            engine.run([0])


def test_openvino_stores_half_and_refuses_what_is_missing_or_damaged(openvino_export, tmp_path):
    whole, half = openvino_export / "models" / "model.bin", tmp_path / "half.bin"
    found = export_network(read_bundle(openvino_export), "openvino", half.with_suffix(".xml"), half=True)
    assert found.relative < deploy.HALF_TOLERANCE and half.stat().st_size < 0.6 * whole.stat().st_size
    with pytest.raises(DeployError, match=r"'f8' is not to be had on this CPU; use .*f32"):
        OpenVINONetwork(half.with_suffix(".xml"), precision="f8")
    half.with_suffix(".xml").write_text("<net")
    with pytest.raises(DeployError, match=r"half.xml: not readable"):
        OpenVINONetwork(half.with_suffix(".xml"))
    half.unlink()
    with pytest.raises(DeployError, match=r"Make it with: alice export BUNDLE --to openvino"):
        OpenVINONetwork(half.with_suffix(".xml"))


def test_a_pretraining_bundles_features_can_be_exported_too(tmp_path):
    source = REPO / "bundles" / "alice_pretrain"
    found = read_bundle(source)
    assert found.input_shape == (1, 96, 64, 64) and found.metadata["window_hu"] == [-175.0, 250.0]
    assert export_network(found, "torchscript", tmp_path / "features.ts").relative < 1e-5


@pytest.mark.parametrize("name", ["alice_seg_flare", "alice_seg_btcv"])
def test_the_bundles_openvino_override_changes_keys_that_exist_and_names_the_exported_file(name):
    configs = REPO / "bundles" / name / "configs"
    inference, override = (
        ConfigParser.load_config_file(configs / file) for file in ("inference.yaml", "openvino.yaml")
    )
    check_keys(inference, override, "openvino.yaml")
    parser = ConfigParser({"bundle_root": "/somewhere"} | override)
    given = {
        key: parser.get_parsed_content(f"network_def::{key}")
        for key in override["network_def"]
        if key != "_target_"
    }
    assert locate(override["network_def"]["_target_"]) is OpenVINONetwork
    assert given.pop("path") == "/somewhere/models/model.xml" and given["precision"] == "f32"
    assert set(given) < set(inspect.signature(OpenVINONetwork).parameters)
