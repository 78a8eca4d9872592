"""The two segmentation bundles: twins, stock MONAI, from data to weights to labels on the scan's own grid."""

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPO
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.bundle.scripts import ckpt_export, run, verify_net_in_out
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import UNETR, SwinUNETR
from safetensors.torch import save_file
from seg_bundles import (
    BUNDLES,
    FLARE,
    SHAPE,
    SMALL_NNFORMER,
    TINY,
    TRIAL,
    bundle_run,
    configs,
    names_of,
    parser_of,
)

from custom.bundles.copies import write_copies
from custom.bundles.preflight import check_keys
from custom.encoders.masked_swin import MaskedSwin
from custom.encoders.masked_vit import MaskedViT
from custom.evaluation.scores.rules import BTCV, FLARE22
from custom.evaluation.splits.folds import few_shot, split_folds
from custom.transfer.encoder_weights import WeightsError, resize_encoder, save_encoder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Weights of the tiny network, untrained."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(5)
    torch.save(tiny_network("inference").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    bundle_run("train", dataset_dir=str(cohort), output_dir=str(folder), ckpt_dir=str(folder), **TRIAL)
    return folder


@pytest.mark.slow
def test_without_a_case_to_validate_on_the_last_network_is_the_fine_tuned_one(cohort, tmp_path):
    # as MONAI Label asks, when an annotator has labelled one or two scans
    data = [
        {
            "image": str(cohort / "images" / "case_01_0000.nii.gz"),
            "label": str(cohort / "labels" / "case_01.nii.gz"),
        }
    ]
    more = {"train#dataset#data": data, "validate#dataset#data": []}
    bundle_run("train", output_dir=str(tmp_path / "run"), ckpt_dir=str(tmp_path / "models"), **(TRIAL | more))
    kept = torch.load(tmp_path / "models" / "model_finetuned.pt", weights_only=True)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert kept.keys() == last.keys() and all(torch.equal(kept[k], last[k]) for k in kept)


def test_with_cases_to_validate_on_the_best_network_is(tmp_path):
    parser = parser_of("train", **TINY, dataset_dir=str(tmp_path))
    parser.update({"validate#dataset#data": [{"image": "a"}]})
    assert parser.get_parsed_content("train::keeper") is None


# -- the files -------------------------------------------------------------------


def test_the_bundles_are_twins_but_for_their_settings():
    flare, btcv = (REPO / "bundles" / name / "configs" for name in BUNDLES)
    assert {p.name for p in flare.iterdir()} == {p.name for p in btcv.iterdir()}
    settings = {"labels", "official_tolerances_mm", "spacing", "roi_size", "scripts"}
    for path in flare.glob("*.yaml"):
        one, two = (ConfigParser.load_config_file(folder / path.name) for folder in (flare, btcv))
        assert list(one) == list(two), path.name
        assert {key for key in one if one[key] != two[key]} <= settings, path.name
        if "scripts" in one:
            assert one["scripts"].replace("alice_seg_flare", "alice_seg_btcv") == two["scripts"]


def test_the_bundles_scripts_are_the_same():
    flare, btcv = (
        {p.name: p.read_bytes() for p in (REPO / "bundles" / name / f"scripts_{name}").glob("*.py")}
        for name in BUNDLES
    )
    assert flare == btcv and "__init__.py" in flare


@pytest.mark.parametrize("name", BUNDLES)
def test_configs_hold_settings_and_no_programs(name):
    lines = [
        line
        for p in (REPO / "bundles" / name / "configs").glob("*.yaml")
        for line in p.read_text().splitlines()
    ]
    assert len(lines) > 500 and not [line for line in lines if "lambda" in line.replace("lr_lambda", "")]
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("name", BUNDLES)
def test_organs_are_those_of_the_scores_in_label_order(name):
    folder = REPO / "bundles" / name / "configs"
    channels = json.loads((folder / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    expected = {"0": "background"} | {str(i): organ for i, organ in enumerate(BUNDLES[name], 1)}
    assert channels["channel_def"] == expected and channels["num_channels"] == 14
    tolerances = ConfigParser.load_config_file(folder / "evaluate.yaml")["official_tolerances_mm"]
    assert (
        tuple(tolerances) == BUNDLES[name]
        and tuple(tolerances.values())
        == {"alice_seg_flare": FLARE22, "alice_seg_btcv": BTCV}[name].tolerances_mm
    )
    for config in ("train", "inference"):
        assert tuple(ConfigParser.load_config_file(folder / f"{config}.yaml")["labels"]) == BUNDLES[name]


@pytest.mark.parametrize("name", BUNDLES)
def test_training_and_inference_agree(name):
    train, inference = (
        ConfigParser.load_config_file(REPO / "bundles" / name / "configs" / f"{config}.yaml")
        for config in ("train", "inference")
    )
    for key in (
        "labels",
        "spacing",
        "window_hu",
        "roi_size",
        "network_def",
        "num_classes",
        "label_folders",
        "scripts",
    ):
        assert train[key] == inference[key], key


@pytest.mark.parametrize("name", BUNDLES)
def test_only_nnformer_and_openvino_need_more_than_monai(name):
    folder = REPO / "bundles" / name
    for path in (folder / "configs").glob("*.*"):
        text = re.sub("(?m)#.*", "", path.read_text()).replace("(custom.evaluation.splits.folds)", "")
        assert path.name in ("nnformer.yaml", "openvino.yaml") or "custom." not in text, path.name
    for path in (folder / f"scripts_{name}").glob("*.py"):
        assert not re.search(r"(?m)^\s*(from|import) custom\b", path.read_text()), path.name


@pytest.mark.parametrize("override, bases", [
    ("smoke", ("train",)), ("multi_gpu_train", ("train",)), ("unetr", ("train",)), ("swin_unetr", ("train",)), ("nnformer", ("train",)),
    ("layer_decay", ("train",)), ("frozen", ("train",)), ("sawtooth", ("train",)), ("partial", ("train",)),
    ("flips", ("inference",)), ("ensemble", ("inference",)), ("evaluate", ("train", "inference")),
])  # fmt: skip
def test_overrides_name_keys_that_exist_or_use_their_own(override, bases):
    known = {}
    for base in bases:
        known |= ConfigParser.load_config_file(FLARE / "configs" / f"{base}.yaml")
    changes = ConfigParser.load_config_file(FLARE / "configs" / f"{override}.yaml")
    text = json.dumps(changes)
    own = {k for k in changes if k not in known and (f"@{k}" in text or k == "more_imports")}
    check_keys(known, {k: v for k, v in changes.items() if k not in own}, override)


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_meets_the_schema(name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((REPO / "tests" / "data" / "meta_schema_20240725.json").read_text())
    jsonschema.validate(
        json.loads((REPO / "bundles" / name / "configs" / "metadata.json").read_text()), schema
    )


# -- who trains and who is held back -----------------------------------------------


@pytest.mark.parametrize("name, cases", [
    ("alice_seg_flare", [f"FLARE22_Tr_{i:04d}" for i in range(1, 51)]),
    ("alice_seg_btcv", [f"{i:04d}" for i in (*range(1, 11), *range(21, 41))]),
])  # fmt: skip
def test_the_stored_folds_are_the_seeded_deal_of_the_published_cases(name, cases):
    stored = json.loads((REPO / "bundles" / name / "configs" / "folds.json").read_text())["folds"]
    dealt = split_folds([{"patient": case} for case in cases])
    assert stored == [[record["patient"] for record in fold] for fold in dealt]


def problems_of(parser):
    """What stops a training before it starts."""
    return parser.get_parsed_content("problems")


def test_folds_and_few_shot_subsets_are_those_of_custom(cohort):
    cases = [{"patient": f"case_{i:02d}"} for i in range(1, 7)]
    folds = split_folds(cases)
    for fold in range(5):
        parser = parser_of("train", dataset_dir=str(cohort), fold=fold, labelled=2)
        held_back = {f"{r['patient']}_0000.nii.gz" for r in folds[fold]}
        split = parser.get_parsed_content("cases")
        assert names_of(split.held_back) == held_back
        others = [c for c in cases if f"{c['patient']}_0000.nii.gz" not in held_back]
        assert names_of(split.others) == {f"{c['patient']}_0000.nii.gz" for c in others}
        assert names_of(split.training) == {f"{r['patient']}_0000.nii.gz" for r in few_shot(others, 2)}


@pytest.mark.parametrize("images, labels, cases", [
    ("images/FLARE22_Tr_{}_0000.nii.gz", "labels/FLARE22_Tr_{}.nii.gz", ["0005", "0001", "0004", "0003", "0013"]),
    ("RawData/Training/img/img{}.nii.gz", "RawData/Training/label/label{}.nii.gz", ["0002", "0006", "0009", "0005", "0001"]),
    ("averaged-training-images/DET{}_avg.nii.gz", "averaged-training-labels/DET{}_avg_seg.nii.gz", ["1", "2", "3", "4", "5"]),
    ("imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz", ["1", "2", "3", "4", "5"]),
])  # fmt: skip
def test_published_layouts_are_paired(tmp_path, images, labels, cases):
    for case in cases:
        for pattern in (images, labels):
            path = tmp_path / pattern.format(case)
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), path)
    bundle = REPO / "bundles" / ("alice_seg_btcv" if "img" in images else "alice_seg_flare")
    parser = parser_of("train", bundle=bundle, dataset_dir=str(tmp_path))
    assert not problems_of(parser)
    split = parser.get_parsed_content("cases")
    pairs = {(r["image"], r["label"]) for r in split.records}
    assert pairs == {(str(tmp_path / images.format(c)), str(tmp_path / labels.format(c))) for c in cases}
    if "FLARE22" in images or "img" in images:  # five published cases, one of each stored fold
        assert split.uses_stored_folds
        assert [Path(r["image"]).name for r in split.held_back] == [Path(images.format(cases[0])).name]


@pytest.mark.parametrize("settings, message", [
    ({"fold": 5}, "fold: there is no fold 5, they are counted 0 to 4."),
    ({"labelled": 1.5}, "labelled: 1.5 is neither a share in (0, 1] nor a number of patients; 10 % is 0.1."),
    ({"labelled": 0}, "labelled: 0 is neither"),
    ({"labelled": 6}, "labelled: 6 patients are asked for, fold 0 trains on 4."),
    ({"dataset_dir": "/nowhere"}, "dataset_dir: no case to train on in /nowhere;"),
    ({"pretrained": "gone.pt"}, "pretrained: gone.pt: no such file; make it with alice export."),
])  # fmt: skip
def test_settings_out_of_range_end_in_one_line_before_anything_is_written(
    cohort, tmp_path, settings, message
):
    with pytest.raises(SystemExit) as stopped:
        bundle_run("train", **({"dataset_dir": str(cohort), "output_dir": str(tmp_path / "run")} | settings))
    assert str(stopped.value).startswith("alice_seg: ") and message in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_an_image_without_label_is_named(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "data")
    (tmp_path / "data" / "labels" / "case_03.nii.gz").unlink()
    problems = problems_of(parser_of("train", dataset_dir=str(tmp_path / "data")))
    assert any("image without label, or label without image: case_03" in p for p in problems)


def test_cases_of_one_name_are_named(cohort, tmp_path):
    for site in ("a", "b"):
        shutil.copytree(cohort, tmp_path / "data" / site)
    problems = problems_of(parser_of("train", dataset_dir=str(tmp_path / "data")))
    assert any("several files of one case: " in p and "case_03" in p for p in problems), problems


@pytest.mark.parametrize("labels, fits", [
    ({"0": "background", "1": "spleen"}, False),  # MSD's Task09
    ({"background": 0, "liver": 1, "right_kidney": 2}, True),  # as nnU-Net writes it
    ({"1": "Liver", "2": "rkid"}, True),  # as BTCV's list in MONAI's tutorials
    ({"0": "background", "1": "spleen", "2": "left atrium"}, False),  # another body region
    (["liver"], True),
])  # fmt: skip
def test_a_datalist_whose_organs_have_other_values_is_refused(tmp_path, labels, fits):
    pairs = [{"image": f"{i}.nii.gz", "label": f"{i}_l.nii.gz", "fold": i % 5} for i in range(5)]
    (tmp_path / "d.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    parser = parser_of("train", dataset_dir=str(tmp_path / "d.json"))
    said = [p for p in problems_of(parser) if p.startswith("labels: ")]
    assert bool(said) is not fits and (fits or "1 is 'spleen'" in said[0])


@pytest.mark.parametrize("fault, message", [
    ("value", "case_01.nii.gz: label values [17.0], this bundle knows 0 to 13; a setting label_map maps them."),
    ("grid", "case_01.nii.gz: image and label lie on different grids"),
    ("place", "case_01.nii.gz: image and label are placed differently, up to 5.00 mm apart"),
    ("stretch", "case_01.nii.gz: image and label are placed differently, up to "),
    ("empty", "case_01.nii.gz: the label is empty"),
    ("image", "case_01_0000.nii.gz has no value below 0: it is no CT, or not in Hounsfield units."),
    ("air", "case_01_0000.nii.gz shows nothing but air."),
])  # fmt: skip
def test_a_faulty_case_is_refused_by_name_in_training_and_in_evaluation(cohort, tmp_path, fault, message):
    image, label = (
        nib.load(cohort / kind / name)
        for kind, name in (("images", "case_01_0000.nii.gz"), ("labels", "case_01.nii.gz"))
    )
    volume, voxels, affine = np.array(image.dataobj), np.array(label.dataobj), label.affine.copy()
    if fault == "value":
        voxels[4, 4, 4] = 17
    elif fault == "grid":
        voxels = voxels[1:]
    elif fault == "place":
        affine[0, 3] += 5
    elif fault == "stretch":  # a third of a percent, within the header's rounding voxel by voxel
        affine[0, 0] *= 1.003
    elif fault == "air":
        volume[:] = -1000
    elif fault == "image":
        volume += 1024
    else:
        voxels[:] = 0
    case = {"image": str(tmp_path / "case_01_0000.nii.gz"), "label": str(tmp_path / "case_01.nii.gz")}
    nib.save(nib.Nifti1Image(volume, image.affine), case["image"])
    nib.save(nib.Nifti1Image(voxels, affine), case["label"])
    for names, key in (
        (("train",), "validate::preprocessing"),
        (("train", "inference", "evaluate"), "dataset::transform"),
    ):
        with pytest.raises(RuntimeError) as refused:
            parser_of(*names, **TINY).get_parsed_content(key)(case)
        causes = causes_of(refused.value)
        assert any(message in cause for cause in causes), causes


def causes_of(error):
    """What an error and those it came from say: MONAI wraps the errors of transforms."""
    said = []
    while error:
        said.append(str(error))
        error = error.__cause__
    return said


# -- training ----------------------------------------------------------------------


@pytest.mark.slow
def test_training_keeps_the_best_and_the_last_and_never_model_pt(trained):
    assert {p.name for p in trained.rglob("*.pt")} == {"model_finetuned.pt", "last.pt"}
    state = torch.load(trained / "model_finetuned.pt", weights_only=True)
    tiny_network("train").load_state_dict(state, strict=True)
    assert not (FLARE / "models" / "model_finetuned.pt").exists()


def tiny_network(*names, **settings):
    return parser_of(*names, **(TINY | settings)).get_parsed_content("network_def")


# -- where training starts -----------------------------------------------------------


def encoder_file(folder, name, network):
    """What alice export writes: the state dict alone."""
    torch.manual_seed(7)
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor)
    path = folder / name
    (save_file if path.suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_an_exported_encoder_fills_the_network_whole(tmp_path, name, bundle):
    vit = MaskedViT(1, [32, 32, 16], 16, hidden_size=48, mlp_dim=96, num_layers=12, num_heads=4)
    path = encoder_file(tmp_path, name, vit)
    parser = parser_of("train", bundle=REPO / "bundles" / bundle, **TINY, pretrained=str(path))
    network = parser.get_parsed_content("network")
    assert isinstance(network, UNETR)
    for key, tensor in vit.state_dict().items():
        torch.testing.assert_close(network.vit.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_swin_encoder_fills_swin_unetr_whole(tmp_path):
    swin = MaskedSwin(1, 12, [7, 7, 7], [2, 2, 2], [2, 2, 2, 2], [3, 6, 12, 24])
    path = encoder_file(tmp_path, "swin.pt", swin)
    settings = {"network_def::feature_size": 12, "device": "$torch.device('cpu')", "pretrained": str(path)}
    network = parser_of("train", "swin_unetr", **settings).get_parsed_content("network")
    assert isinstance(network, SwinUNETR)
    for key, tensor in swin.state_dict().items():
        torch.testing.assert_close(network.swinViT.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("fault, message", [
    ("other", "e.pt does not fit the encoder: patch_embedding.position_embeddings is [1, 4, 36], not [1, 4, 48]"),
    ("short", "e.pt does not fit the encoder: norm.bias is missing, not [48]."),
    ("positions", "e.pt does not fit the encoder: patch_embedding.position_embeddings is [1, 32, 48], not [1, 4, 48]."),
])  # fmt: skip
def test_an_encoder_that_does_not_fit_is_refused_by_name(tmp_path, cohort, fault, message):
    size, width = (
        ([64, 64, 32], 48) if fault == "positions" else ([32, 32, 16], 36 if fault == "other" else 48)
    )
    vit = MaskedViT(1, size, 16, hidden_size=width, mlp_dim=96, num_layers=12, num_heads=4)
    state = vit.state_dict()
    if fault == "short":
        state.popitem()
    torch.save(state, tmp_path / "e.pt")
    parser = parser_of("train", **TINY, pretrained=str(tmp_path / "e.pt"), dataset_dir=str(cohort))
    (problem,) = problems_of(parser)
    assert message in problem
    with pytest.raises(RuntimeError):  # nor does any other way to the network lead past it
        parser.get_parsed_content("network")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_encoder_of_other_heads_is_refused(tmp_path, cohort, suffix):
    # heads share one matrix, so that shapes do not tell how many there are
    path = tmp_path / f"e{suffix}"
    for heads, said in ((6, "does not fit the encoder: num_heads is 6, not 4."), (4, None)):
        vit = MaskedViT(1, [32, 32, 16], 16, hidden_size=48, mlp_dim=96, num_layers=12, num_heads=heads)
        save_encoder(path, vit, {"network": vit.settings})
        parser = parser_of("train", **TINY, pretrained=str(path), dataset_dir=str(cohort))
        problems = problems_of(parser)
        assert not problems if said is None else said in problems[0]


def test_an_encoder_is_resized_to_the_crops_of_fine_tuning():
    vit = MaskedViT(1, [64, 32, 32], 16, hidden_size=48, mlp_dim=96, num_layers=12, num_heads=4)
    resized = resize_encoder(vit, vit.settings, [32, 32, 16])
    tiny_network("train").vit.load_state_dict(resized.state_dict(), strict=True)
    assert vit.state_dict()["patch_embedding.position_embeddings"].shape[1] == 4 * 2 * 2
    with pytest.raises(
        WeightsError, match=r"img_size \[32, 40, 16\]: patches of \[16, 16, 16\] voxels do not divide"
    ):
        resize_encoder(vit, vit.settings, [32, 40, 16])
    swin = MaskedSwin(1, 12, [7, 7, 7], [2, 2, 2], [2, 2, 2, 2], [3, 6, 12, 24])
    with pytest.raises(WeightsError, match="fits crops of any size"):
        resize_encoder(swin, swin.settings, [64, 64, 64])


# -- schedules and losses --------------------------------------------------------------


def test_frozen_trains_all_but_the_encoder():
    parser = parser_of("train", "frozen", **TINY)
    network, encoder = (parser.get_parsed_content(key) for key in ("network", "encoder"))
    trained = {
        id(p) for group in parser.get_parsed_content("optimizer").param_groups for p in group["params"]
    }
    resting = {id(p) for p in encoder.parameters()}
    assert trained == {id(p) for p in network.parameters()} - resting and trained and resting
    assert not any(p.requires_grad for p in encoder.parameters())


def test_layer_decay_gives_every_parameter_once_and_the_encoder_less():
    parser = parser_of("train", "layer_decay", **TINY)
    groups, network = parser.get_parsed_content("parameters"), parser.get_parsed_content("network")
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    at = lambda name: rate[id(network.get_parameter(name))] / 1e-4  # noqa: E731
    assert at("out.conv.conv.weight") == 1 and at("vit.norm.weight") == pytest.approx(0.75)
    assert at("vit.blocks.11.mlp.linear1.weight") == pytest.approx(0.75)
    assert at("vit.blocks.0.mlp.linear1.weight") == pytest.approx(0.75**12)


def test_layer_decay_falls_by_stage_in_swin_unetr_and_nnformer():
    at, small = {}, {"swin_unetr": {"network_def::feature_size": 12}, "nnformer": SMALL_NNFORMER}
    for config in small:
        parser = parser_of("train", config, "layer_decay", **small[config])
        rate = {id(p): g["lr"] for g in parser.get_parsed_content("parameters") for p in g["params"]}
        network = parser.get_parsed_content("network")
        at[config] = {
            n: rate[id(p)] / parser.get_parsed_content("learning_rate") for n, p in network.named_parameters()
        }
    stages = [{r for n, r in at["nnformer"].items() if f"encoder.layers.{s}.blocks" in n} for s in range(4)]
    assert [len(s) for s in stages] == [1] * 4
    assert [s.pop() for s in stages] == pytest.approx([0.75**4, 0.75**3, 0.75**2, 0.75])
    assert {r for n, r in at["nnformer"].items() if "encoder.norms.3" in n} == {0.75}
    swin = [{r for n, r in at["swin_unetr"].items() if f"swinViT.layers{s}." in n}.pop() for s in range(1, 5)]
    assert swin == pytest.approx([0.75**4, 0.75**3, 0.75**2, 0.75])


def test_the_sawtooth_rests_the_encoder_then_warms_up_again():
    parser = parser_of("train", "sawtooth", **TINY, total_steps=100)
    optimizer, schedule = (parser.get_parsed_content(k) for k in ("optimizer", "lr_scheduler"))
    decoder, encoder = [], []
    for _ in range(100):
        decoder.append(optimizer.param_groups[0]["lr"] / 1e-4)
        encoder.append(optimizer.param_groups[1]["lr"] / 1e-4)
        optimizer.step()
        schedule.step()
    assert not any(encoder[:21]) and all(encoder[21:])
    assert (
        max(decoder[:20]) == pytest.approx(1)
        and decoder[20] == 0
        and decoder[25] == encoder[25] == pytest.approx(1)
    )
    assert encoder[-1] < 0.01


def test_partial_labels_do_not_punish_what_nobody_annotated():
    parser = parser_of("train", "partial", **TINY, annotated=[1, 3])
    loss = parser.get_parsed_content("train::trainer::loss_function")
    label = torch.zeros(1, 1, 4, 4, 4)
    label[:, :, 0], label[:, :, 1] = 1, 3
    logits = 20 * torch.nn.functional.one_hot(label[:, 0].long(), 14).permute(0, 4, 1, 2, 3).float()
    unseen = logits.clone()
    unseen[:, [0, 7], 3] = unseen[:, [7, 0], 3]  # says organ 7, where only "neither 1 nor 3" is known
    assert loss(unseen, label) == pytest.approx(loss(logits, label).item(), abs=1e-5)
    wrong = logits.clone()
    wrong[:, [0, 3], 3] = wrong[:, [3, 0], 3]
    assert loss(wrong, label) > loss(logits, label) + 1


@pytest.mark.parametrize(
    "name, kind", [("unetr", "UNETR"), ("swin_unetr", "SwinUNETR"), ("nnformer", "NNFormer")]
)
def test_the_published_networks_can_be_built(name, kind):
    with torch.device("meta"):
        parser = parser_of("train", name)
        parser.update({"roi_size": [96, 96, 96]} if name != "nnformer" else {})
        assert parser["network_def"]["_target_"].split(".")[-1] == kind
    assert parser["spacing"] == [1.5, 1.5, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_unetr", "nnformer"])
def test_other_networks_train_and_segment(cohort, tmp_path, name):
    width = {"network_def::feature_size": 12} if name == "swin_unetr" else SMALL_NNFORMER
    small = width | {"roi_size": [64, 64, 32], "spacing": [8.0, 8.0, 8.0], "device": "$torch.device('cpu')"}
    common = small | {"dataset_dir": str(cohort), "output_dir": str(tmp_path)}
    bundle_run("train", name, **common, epochs=1, crops_per_case=1, labelled=2, ckpt_dir=str(tmp_path))
    weights = str(tmp_path / "model_finetuned.pt")
    bundle_run(
        "inference",
        name,
        **(common | {"dataset_dir": str(cohort / "images" / "case_01_0000.nii.gz")}),
        checkpoint=weights,
    )
    assert nib.load(tmp_path / "case_01_0000_seg.nii.gz").shape == SHAPE


# -- inference and evaluation ----------------------------------------------------------


@pytest.fixture(scope="session")
def segmented(cohort, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented")
    weights = str(trained / "model_finetuned.pt")
    bundle_run("inference", dataset_dir=str(cohort), output_dir=str(folder), checkpoint=weights, **TINY)
    return folder


@pytest.mark.slow
def test_segmentations_lie_on_the_scans_own_grid(cohort, segmented):
    scans = sorted((cohort / "images").iterdir())
    assert [p.name for p in sorted(segmented.iterdir())] == [
        p.name.replace(".nii", "_seg.nii") for p in scans
    ]
    for scan, made in zip(scans, sorted(segmented.iterdir()), strict=True):
        scan, made = nib.load(scan), nib.load(made)
        assert made.shape == scan.shape and made.get_data_dtype() == np.uint8
        np.testing.assert_allclose(made.affine, scan.affine, atol=1e-4)
        assert np.asarray(made.dataobj).max() <= 13


def test_labels_come_back_to_the_voxels_they_were_read_from(cohort):
    """Preprocessing, a network that reads its answer off the image, and postprocessing: there and back."""
    parser = parser_of("inference", **(TINY | {"spacing": [4.0, 4.0, 4.0]}))
    pre, post = (parser.get_parsed_content(k) for k in ("preprocessing", "postprocessing"))
    post.transforms = post.transforms[:-1]  # without SaveImaged
    path = cohort / "images" / "case_01_0000.nii.gz"
    case = pre({"image": str(path)})
    tissue = (case["image"] > 0.2).float()
    case["pred"] = torch.cat([1 - tissue, 40 * tissue, *[torch.full_like(tissue, -9)] * 12])
    found = np.asarray(post(case)["pred"][0]).astype(bool)
    wanted = np.asarray(nib.load(path).dataobj) > -90
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.9


def test_windows_lie_over_the_body_only(tmp_path):
    volume = np.full((60, 60, 40), -1000, np.int16)
    volume[20:40, 22:38, 10:30] = 40
    volume[2:58, 50:51] = 100  # a table
    nib.save(nib.Nifti1Image(volume, np.diag([5.0, 5.0, 5.0, 1.0])), tmp_path / "a.nii.gz")
    pre = parser_of("inference", spacing=[5.0, 5.0, 5.0]).get_parsed_content("preprocessing")
    assert pre({"image": str(tmp_path / "a.nii.gz")})["image"].shape[1:] == (20 + 4, 16 + 4, 20 + 4)


@pytest.mark.parametrize("fill, message", [
    (300, "has no value below 0: it is no CT, or not in Hounsfield units."),
    (-1000, "shows nothing but air."),
    (np.nan, "holds values that are no numbers."),
])  # fmt: skip
def test_what_is_no_ct_is_refused_by_name(tmp_path, fill, message):
    nib.save(nib.Nifti1Image(np.full((20, 21, 22), fill, np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.raises(RuntimeError) as refused:
        parser_of("inference").get_parsed_content("preprocessing")({"image": str(tmp_path / "scan.nii.gz")})
    causes = causes_of(refused.value)
    assert any(c.endswith(f"scan.nii.gz {message}") for c in causes), causes


@pytest.mark.parametrize("fault, message", [
    ("prefix", r"m.pt does not fit the network: every name starts with module., as DataParallel saves them"),
    ("other", r"m.pt does not fit the network: out.conv.conv.weight is \[3, 4, 1, 1, 1\], not \[14, 4, 1, 1, 1\]\."),
    ("short", r"m.pt does not fit the network: out.conv.conv.bias is missing, not \[14\]\."),
    ("list", r"m.pt does not fit the network: it holds no state dict, but a list\."),
])  # fmt: skip
def test_weights_of_another_network_are_refused_by_name(cohort, weights, tmp_path, fault, message):
    state = torch.load(weights, weights_only=True)
    state = {f"module.{k}" if fault == "prefix" else k: v for k, v in state.items()}
    if fault == "other":
        state["out.conv.conv.weight"] = state["out.conv.conv.weight"][:3]
    if fault == "short":
        del state["out.conv.conv.bias"]
    torch.save([1] if fault == "list" else state, tmp_path / "m.pt")
    with pytest.raises(SystemExit, match=message):
        bundle_run(
            "inference",
            dataset_dir=str(cohort),
            output_dir=str(tmp_path / "out"),
            checkpoint=str(tmp_path / "m.pt"),
            **TINY,
        )
    assert not list(tmp_path.rglob("*.nii.gz"))


@pytest.mark.parametrize("config, key", [("inference", "inferer"), ("train", "validate::inferer")])
def test_where_the_gpus_memory_ends_windows_are_put_together_on_the_cpu(config, key, monkeypatch, caplog):
    asked = []

    def crowded(inferer, inputs, network, *args, device, **more):
        asked.append(str(device))
        if device == inputs.device:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return "stitched"

    class OnGpu:
        is_cuda, device, shape = True, torch.device("cuda:0"), torch.Size([1, 1, 40, 40, 40])

    monkeypatch.setattr(SlidingWindowInferer, "__call__", crowded)
    with caplog.at_level("WARNING"):
        assert parser_of(config, **TINY).get_parsed_content(key)(OnGpu(), None) == "stitched"
    assert asked == ["cuda:0", "cpu"] and "GPU stitching failed" in caplog.text


def test_missing_scans_and_weights_end_in_one_line(cohort, tmp_path):
    with pytest.raises(SystemExit, match=r"dataset_dir: no scan found in .*nowhere"):
        bundle_run("inference", dataset_dir=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"checkpoint: gone.pt: no such file"):
        bundle_run("inference", dataset_dir=str(cohort), checkpoint="gone.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights_are_named_before_anything_is_written(cohort, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {"layer.weight": torch.rand(30, 30), "layer.bias": torch.rand(30)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole, is_whole = path.read_bytes(), parser_of("train").get_parsed_content("scripts").weights.is_whole
    settings = {"dataset_dir": str(cohort), "output_dir": str(tmp_path / "run"), **TINY}
    with pytest.raises(SystemExit, match="does not fit the encoder"):  # whole, but of another network
        bundle_run("train", **settings, pretrained=str(path))
    assert is_whole(str(path))
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert not is_whole(str(path)), kept
    with pytest.raises(SystemExit, match=rf"pretrained: .*weights{suffix} is damaged or cut short"):
        bundle_run("train", **settings, pretrained=str(path))
    with pytest.raises(SystemExit, match=rf"checkpoint: .*weights{suffix} is damaged or cut short"):
        bundle_run("inference", **settings, checkpoint=str(path))
    assert not (tmp_path / "run").exists()


def test_a_header_that_is_no_json_is_damage(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"layer.bias": torch.rand(30)}, path)
    path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
    assert not parser_of("train").get_parsed_content("scripts").weights.is_whole(str(path))


def save_scan(source, to):
    """A copy, with an extension in its header as some programs write it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    scan = nib.load(source)
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"as some programs write " * 200))
    nib.save(scan, to)


@pytest.mark.parametrize("suffix, cut", [
    (".nii.gz", lambda whole: whole[: int(len(whole) * 0.6)]),
    (".nii.gz", lambda whole: whole[:-1]),
    (".nii.gz", lambda whole: whole[:150]),
    (".nii.gz", lambda whole: b""),
    (".nii.gz", lambda whole: whole[:-2000] + bytes(2000)),  # room was made for it, and never filled
    (".nii", lambda whole: whole[:-1]),
    (".nii", lambda whole: whole[:200]),
])  # fmt: skip
def test_scans_cut_short_are_seen(cohort, tmp_path, suffix, cut):
    is_damaged = parser_of("inference").get_parsed_content("scripts").files.is_damaged
    path = tmp_path / f"a{suffix}"
    save_scan(cohort / "images" / "case_02_0000.nii.gz", path)
    assert not is_damaged(str(path))
    path.write_bytes(cut(path.read_bytes()))
    assert is_damaged(str(path))


def test_scans_cut_short_are_named_before_anything_is_written(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    settings = {"dataset_dir": str(data), "output_dir": str(tmp_path / "run"), **TINY}
    assert not problems_of(parser_of("train", **settings))
    for path in (data / "images" / "case_02_0000.nii.gz", data / "labels" / "case_03.nii.gz"):
        path.write_bytes(path.read_bytes()[:-1])
    told = r"is cut short or damaged; copy it again: \S*"
    with pytest.raises(
        SystemExit, match=rf"2 of 6 cases cannot be used.*\n.*{told}case_02_0000.nii.gz\n"
    ) as refused:
        bundle_run("train", **settings)
    assert str(refused.value).endswith("case_03.nii.gz") and not (tmp_path / "run").exists()
    for fold in range(5):  # an evaluation asks about what it reads
        parser = parser_of("train", "inference", "evaluate", **settings, fold=fold)
        held_back = names_of(parser.get_parsed_content("cases").held_back)
        refused = parser.get_parsed_content("examined").table
        assert ("case_02_0000.nii.gz" in refused) == ("case_02_0000.nii.gz" in held_back)


def test_a_gz_of_several_members_and_a_tiny_one_are_whole(cohort, tmp_path):
    damaged = parser_of("inference").get_parsed_content("scripts").files.is_damaged
    voxels = gzip.decompress((cohort / "images" / "case_01_0000.nii.gz").read_bytes())
    members = [gzip.compress(part) for part in (voxels[:5000], voxels[5000:], b"")]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"".join(members))
    assert nib.load(path).get_fdata().shape == SHAPE and not damaged(str(path))
    for cut in (members[0], members[0] + members[1][:-9]):
        path.write_bytes(cut)
        assert damaged(str(path))
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), path)
    assert path.stat().st_size < 100 and not damaged(str(path))


def test_flips_and_ensembles_average_probabilities(weights):
    weights = str(weights)
    volume = torch.rand(1, 1, 40, 32, 16)
    answers = {}
    for name in ("ensemble", "flips"):
        parser = parser_of("inference", name, **TINY, checkpoints=[weights, weights])
        network = parser.get_parsed_content("network").eval()
        network.load_state_dict(torch.load(weights, weights_only=True))
        with torch.no_grad():
            answers[name] = parser.get_parsed_content("evaluator::inferer")(volume, network).softmax(1)
            answers[f"{name} mirrored"] = parser.get_parsed_content("evaluator::inferer")(
                volume.flip(2), network
            ).softmax(1)
            plain = parser.get_parsed_content("inferer")(
                volume, lambda x, n=network: n(x).softmax(1).log()
            ).softmax(1)
    torch.testing.assert_close(answers["ensemble"], plain, atol=1e-5, rtol=0)  # twice the same network
    torch.testing.assert_close(answers["flips mirrored"].flip(2), answers["flips"], atol=1e-5, rtol=0)
    assert (answers["flips"] - plain).abs().max() > 1e-4


def test_an_ensemble_is_the_mean_of_different_networks(weights, tmp_path):
    other = tmp_path / "other.pt"
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"out.conv.conv.bias": state["out.conv.conv.bias"] + torch.arange(14.0)}, other)
    parser = parser_of("inference", "ensemble", **TINY, checkpoints=[str(weights), str(other)])
    volume, networks = (
        torch.rand(1, 1, *TINY["roi_size"]),
        [tiny_network("inference").eval() for _ in range(2)],
    )
    for network, path in zip(networks, (weights, other), strict=True):
        network.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = sum(network(volume).softmax(1) for network in networks) / 2
        found = parser.get_parsed_content("evaluator::inferer")(volume, None).exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_evaluation_measures_the_held_back_cases_on_their_own_grid(cohort, trained, segmented, tmp_path):
    weights = str(trained / "model_finetuned.pt")
    names = ("train", "inference", "evaluate")
    bundle_run(*names, dataset_dir=str(cohort), output_dir=str(tmp_path), checkpoint=weights, fold=0, **TINY)
    held_back = names_of(parser_of("train", dataset_dir=str(cohort)).get_parsed_content("cases").held_back)
    made = sorted(tmp_path.glob("*.nii.gz"))
    assert {p.name.replace("_seg", "") for p in made} == held_back
    rows = [line.split(",") for line in (tmp_path / "dice_raw.csv").read_text().splitlines()[1:]]
    assert len(rows) == len(made) and (tmp_path / "surface_dice_summary.csv").is_file()
    for path in made:  # the same voxels as inference.yaml, and Dice done by hand
        found = np.asarray(nib.load(path).dataobj)
        np.testing.assert_array_equal(found, np.asarray(nib.load(segmented / path.name).dataobj))
        label = np.asarray(nib.load(cohort / "labels" / path.name.replace("_0000_seg", "")).dataobj)
        row = next(r for r in rows if Path(r[0]).name == path.name.replace("_seg", ""))
        for organ in range(1, 14):
            a, b = found == organ, label == organ
            assert float(row[organ]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-5)


# -- what other programs ask of a bundle ---------------------------------------------------


@pytest.fixture(scope="session")
def small_bundle(weights, tmp_path_factory):
    """A release of a tiny network, as it would lie in a user's folder."""
    bundle = tmp_path_factory.mktemp("bundle") / "alice_seg_flare"
    shutil.copytree(FLARE, bundle, ignore=shutil.ignore_patterns("*.pt", "*.safetensors", "*.json", "runs"))
    shutil.copy(FLARE / "configs" / "metadata.json", bundle / "configs")
    shutil.copy(FLARE / "configs" / "folds.json", bundle / "configs")
    for name in ("train", "inference"):
        path = bundle / "configs" / f"{name}.yaml"
        content = ConfigParser.load_config_file(path)
        for key, value in TINY.items():
            head, _, tail = key.partition("::")
            content.__setitem__(head, value) if not tail else content[head].__setitem__(tail, value)
        ConfigParser.export_config_file(content, str(path), fmt="yaml")
    save_file(torch.load(weights, weights_only=True), bundle / "models" / "model.safetensors")
    write_copies(bundle)
    return bundle


@pytest.mark.slow
def test_the_zoos_checks_pass(small_bundle, tmp_path):
    meta = json.loads((small_bundle / "configs" / "metadata.json").read_text())
    for tensor in (
        meta["network_data_format"]["inputs"]["image"],
        meta["network_data_format"]["outputs"]["pred"],
    ):
        tensor["spatial_shape"] = TINY["roi_size"]
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    files = {
        "meta_file": str(tmp_path / "metadata.json"),
        "config_file": str(small_bundle / "configs" / "inference.json"),
    }
    verify_net_in_out(net_id="network_def", **files)
    ckpt_export(
        net_id="network_def", **files, ckpt_file=str(small_bundle / "models" / "model.pt"), filepath=str(tmp_path / "model.ts"),
        use_trace=True, input_shape=[1, 1, *TINY["roi_size"]],
    )  # fmt: skip
    network = tiny_network("inference").eval()
    network.load_state_dict(torch.load(small_bundle / "models" / "model.pt", weights_only=True))
    volume = torch.rand(1, 1, *TINY["roi_size"])
    torch.testing.assert_close(
        torch.jit.load(tmp_path / "model.ts")(volume), network(volume), atol=1e-4, rtol=0
    )


@pytest.mark.slow
def test_load_works_from_elsewhere_with_nothing_of_ours(small_bundle, tmp_path):
    lines = [
        "import sys, torch", "from monai.bundle import load", "assert 'custom' not in sys.modules",
        f"net = load('alice_seg_flare', bundle_dir={str(small_bundle.parent)!r}, source='github', workflow_type=sys.argv[1])",
        f"state = torch.load({str(small_bundle / 'models' / 'model.pt')!r}, weights_only=True)",
        "assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items()), 'weights differ'",
        "assert not any(m == 'custom' or m.startswith('custom.') for m in sys.modules)",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines), "train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_monai_labels_way_of_training_works(cohort, small_bundle, tmp_path, monkeypatch):
    """Everything in the config evaluated (run_id ""), lists replaced, a loader put before the handlers."""
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser()
    parser.read_config(small_bundle / "configs" / "train.json")
    handlers = parser["train#handlers"]
    handlers = handlers._raw if hasattr(handlers, "_raw") else handlers
    model = str(small_bundle / "models" / "model.pt")
    before = Path(model).read_bytes()
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": model,
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    case = {
        key: str(cohort / kind / f"case_01{tail}.nii.gz")
        for key, kind, tail in (("image", "images", "_0000"), ("label", "labels", ""))
    }
    run(
        run_id="", config_file=str(small_bundle / "configs" / "train.json"), bundle_root=str(small_bundle), logging_file=False,
        **{"train#trainer#max_epochs": 1, "train#dataset#data": [case], "validate#dataset#data": [case],
           "train#handlers": [loader, *handlers], "device": "cpu", "displayable_configs": {"cache_rate": 0.0}},
    )  # fmt: skip
    assert (small_bundle / "models" / "model_finetuned.pt").is_file() and Path(model).read_bytes() == before


# -- where the bundles' own functions are found ----------------------------------------------


def copy_of(bundle, folder):
    """Configs and scripts of a bundle, without its weights."""
    return Path(
        shutil.copytree(bundle, folder / bundle.name, ignore=shutil.ignore_patterns("models", "runs", "docs"))
    )


def test_two_bundles_in_one_process_use_their_own_functions():
    found = {
        name: parser_of("train", bundle=REPO / "bundles" / name).get_parsed_content("scripts")
        for name in BUNDLES
    }
    for name, scripts in found.items():
        assert Path(scripts.cases.__file__).parent == REPO / "bundles" / name / f"scripts_{name}"
    assert len({scripts.cases.Cases for scripts in found.values()}) == 2
    before = list(sys.path)
    assert parser_of("train").get_parsed_content("scripts") is found["alice_seg_flare"]
    assert sys.path == before  # a server parses a config for every request


def test_two_copies_of_one_bundle_use_their_own_functions(tmp_path):
    changed = copy_of(FLARE, tmp_path)
    path = changed / "scripts_alice_seg_flare" / "scans.py"
    path.write_text(path.read_text().replace("no scan found in", "nothing to be seen in"))
    stock = parser_of("train").get_parsed_content("scripts")
    before = sys.path.count(str(FLARE))
    try:
        other = parser_of("train", bundle=changed).get_parsed_content("scripts")
        again = parser_of("train").get_parsed_content("scripts")
        found = [sys.path.count(str(bundle)) for bundle in (FLARE, changed)]
    finally:
        sys.path[:] = [folder for folder in sys.path if folder != str(changed)]
    for scripts, told in ((stock, "no scan found"), (other, "nothing to be seen"), (again, "no scan found")):
        assert scripts.scans.inference_problems([], "here") == [f"dataset_dir: {told} in here."]
    assert found == [before, 1]


@pytest.mark.parametrize("names, key", [
    (("train",), "train::preprocessing"),
    (("train",), "validate::preprocessing"),
    (("train", "inference", "evaluate"), "dataset"),
    (("inference",), "dataset"),
    (("inference",), "postprocessing"),
])  # fmt: skip
def test_data_can_be_sent_to_processes_that_are_not_forked(names, key, tmp_path):
    settings = {"dataset_dir": str(tmp_path), **TINY}
    item = parser_of(*names, **settings).get_parsed_content(key)
    assert type(pickle.loads(pickle.dumps(item))) is type(item)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_cut_crops(cohort, tmp_path, method):
    """As on macOS and Windows (spawn), and on Linux from Python 3.14 (forkserver): a worker starts from nothing, and finds
    the bundle's functions from another folder."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, runpy, sys\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv.pop(1))\n"
        "    runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)\n"
    )
    settings = TRIAL | {
        "dataset_dir": cohort,
        "output_dir": "run",
        "ckpt_dir": "run",
        "labelled": 2,
        "workers": 1,
    }
    arguments = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), method, "run", "--bundle_root", str(FLARE), "--config_file", *configs("train"), *arguments],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


@pytest.mark.parametrize("name", BUNDLES)
def test_a_checkout_segments_with_the_weights_that_are_in_git(name):
    bundle = REPO / "bundles" / name
    tracked = subprocess.run(["git", "ls-files", "models"], cwd=bundle, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        assert tracked.stdout.split() == ["models/README.md", "models/model.safetensors"]
    parser = parser_of("inference", bundle=bundle)
    scripts, network = parser.get_parsed_content("scripts"), parser.get_parsed_content("network_def")
    assert scripts.weights.checkpoint_problems(network, str(bundle / "models" / "model.safetensors")) == []


def test_model_pt_goes_before_model_safetensors(tmp_path):
    shipped = parser_of("inference").get_parsed_content("scripts").weights.shipped
    (tmp_path / "models").mkdir()
    for name, expected in (
        ("none", "model.pt"),
        ("model.safetensors", "model.safetensors"),
        ("model.pt", "model.pt"),
    ):
        (tmp_path / "models" / name).touch()
        assert shipped(str(tmp_path)) == f"{tmp_path}/models/{expected}"


def test_the_handler_fills_the_whole_network_or_fails(weights, tmp_path):
    network = tiny_network("inference")
    load = parser_of("inference").get_parsed_content("scripts").weights.LoadWeights
    engine = Engine(lambda *_: None)
    load(str(weights), network).attach(engine)
    engine.run([0])
    state = torch.load(weights, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    state.popitem()
    torch.save(state, tmp_path / "short.pt")
    engine = Engine(lambda *_: None)
    load(str(tmp_path / "short.pt"), network).attach(engine)
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.run([0])


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("config, key", [("inference", "inferer"), ("train", "validate::inferer")])
def test_windows_overlap_by_half_and_fade_towards_their_edges(bundle, config, key):
    inferer = parser_of(config, bundle=REPO / "bundles" / bundle, roi_size=[16, 16, 16]).get_parsed_content(
        key
    )
    ramp = (
        torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)
    )  # an answer that shows where windows lie
    answer = lambda windows: ramp.expand(len(windows), -1, -1, -1, -1).clone()  # noqa: E731
    volume = torch.zeros(1, 1, 40, 16, 16)
    expected = sliding_window_inference(volume, [16] * 3, 2, answer, overlap=0.5, mode="gaussian")
    torch.testing.assert_close(inferer(volume, answer), expected)
