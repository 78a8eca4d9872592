"""The bundle from its YAML; the slow tests run it as its users do: from another directory, killed, on two processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, write_scan
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import UNETR, SwinUNETR
from monai.utils import set_determinism

from custom.bundles.preflight import check_files, check_keys
from custom.cli.main import main as alice
from custom.encoders.nnformer import NNFormer
from custom.engine.checkpoint import checkpoints_of, load_checkpoint
from custom.engine.run_log import read_log
from custom.methods.run_folder import load_run
from custom.methods.run_page import ended, run_page
from custom.transfer.encoder_weights import load_encoder, read_weights

BUNDLE = REPO / "bundles" / "alice_pretrain"
CONFIGS = BUNDLE / "configs"
RIVALS = [
    f"{name}.yaml" for name in ("simmim", "moco", "dino", "ibot", "sim", "cmae", "swin_unetr", "ace", "sal")
]
TINY = {
    "crop_size": "[32,32,16]", "spacing": "[3.0,3.0,4.0]", "network_def::hidden_size": 48, "network_def::mlp_dim": 96,
    "network_def::num_heads": 4, "decoder_width": 48, "student_def::head_width": 64, "iterations": 6,
    "batch_size": 2, "warmup": 2, "held_back_patients": 2, "checkpoint_every": 2, "monitor_every": 3, "probe_every": 3,
}  # fmt: skip


def command(dataset, output, *extra_configs, launcher=("-m", "monai.bundle"), **settings):
    files = [str(CONFIGS / f) for f in ("train.yaml", "smoke.yaml", *extra_configs)]
    words = [
        sys.executable,
        *launcher,
        "run",
        "--config_file",
        str(files),
        "--dataset_dir",
        str(dataset),
        "--output_dir",
        str(output),
    ]
    for key, value in (TINY | settings).items():
        words += [f"--{key}", str(value)]
    return words


def run(words, cwd, check=True):
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder):
    return [
        tuple(line[k] for k in ("step", "total", "l_r", "l_dv", "l_st", "grad_norm"))
        for line in read_log(folder)
        if line["step"]
    ]


@pytest.fixture(scope="module")
def finished(scans, tmp_path_factory):
    """A run by ``python -m monai.bundle run``, started from another directory."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(command(scans, folder / "run", workers=1), cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """The same run in this process, which is much quicker."""
    folder = tmp_path_factory.mktemp("here")
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml")])
    own = {"dataset_dir": str(scans), "output_dir": str(folder), "workers": 0, "preflight": None}
    for key, value in (TINY | own).items():
        parser.set(yaml.safe_load(value) if isinstance(value, str) else value, key)
    set_determinism(parser["seed"])  # as the YAML's ``run``
    parser.get_parsed_content("train::trainer").run()
    set_determinism(None)
    return folder


@pytest.mark.slow
def test_a_run_is_the_same_from_any_directory(finished, trained):
    assert losses(finished) == losses(trained)


def test_a_run_leaves_checkpoints_log_and_an_encoder_for_stock_unetr(trained, tmp_path):
    assert [p.name for p in checkpoints_of(trained / "checkpoints")] == [
        "iteration_00000004.pt",
        "iteration_00000006.pt",
    ]
    lines = read_log(trained)
    assert [line["step"] for line in lines] == list(range(7)) and "probe/retrieval" in lines[0]
    assert list((trained / "tensorboard").glob("events*"))
    alice(["export", str(trained), "--to", str(tmp_path / "e.safetensors")])
    unetr = UNETR(1, 2, (32, 32, 16), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4).eval()
    report = load_encoder(unetr, tmp_path / "e.safetensors", verbose=False)
    assert report.metadata["trained_iterations"] == 6 and report.metadata["spacing"] == [3.0, 3.0, 4.0]
    volume = torch.rand(1, 1, 32, 32, 16)
    student = load_run(trained).student
    torch.testing.assert_close(unetr.vit(volume)[0], student.encoder(volume).tokens, atol=1e-5, rtol=0)


def test_chores_on_a_run_are_commands(trained, tmp_path, capsys):
    alice(["probe", str(trained)])
    lines = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()}
    assert {"raw intensities", "untrained", "step 6", "chance", "aligner coordinate"} <= set(lines)
    assert 0 <= float(lines["step 6"][0]) <= 1 and float(lines["aligner coordinate"][0]) > 0
    for which, message in (("pupil", "which must be student or teacher, got 'pupil'"), ("teacher", None)):
        with pytest.raises(SystemExit) if message else contextlib.nullcontext():
            alice(["export", str(trained), "--to", str(tmp_path / "w.safetensors"), "--which", which])
        assert (message or "w.safetensors") in "".join(capsys.readouterr())
    alice(["properties", str(trained), "--boxes", "4", "--batch", "4", "--json", str(tmp_path / "p.json")])
    found = json.loads((tmp_path / "p.json").read_text())
    assert list(found) == ["untrained", "step 6"] and found["step 6"]["chance"][0] == 0.25
    alice(["picture", str(trained), str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as refused:
        alice(["export", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert refused.value.code == 1 and said.startswith("alice: ") and "Traceback" not in said
    assert said.endswith(f"(looked into {tmp_path / 'checkpoints'}).")


def test_a_report_shows_a_run_that_ended_and_one_that_is_written(trained, tmp_path, capsys):
    alice(["report", str(trained), "--to", str(tmp_path / "one.html")])
    page = (tmp_path / "one.html").read_text()
    for said in (
        "6 of 6 steps",
        "<h2",
        "None.",
        "untrained",
        "step 6",
        "Place matching",
        "place_mm",
        "data:image/",
    ):
        assert said in page, said
    assert 'http-equiv="refresh"' not in page and not re.search(r"(src|href)=\"https?:", page)

    other = tmp_path / "b" / trained.name  # still at work: no checkpoint so far, and an alarm
    other.mkdir(parents=True)
    lines = read_log(trained)[:4]
    lines[2]["alarms"] = lines[3]["alarms"] = ["tokens tell their number <b>"]
    (other / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    for key, word in (("refresh", 20), ("refresh", None)):
        text = run_page([trained, other], **{key: word}).html()
        assert ('content="20"' in text) is (word == 20)
    assert (
        f"{other.relative_to(tmp_path.parent.parent)}".split("/")[-2] in text
        and "no checkpoint so far" in text
    )
    assert "tokens tell their number &lt;b&gt;" in text and "2 to 3" in text
    assert not ended(other) and ended(trained)
    with pytest.raises(SystemExit):
        alice(["report", str(tmp_path)])
    assert "no log of a run here" in capsys.readouterr().err


@pytest.mark.slow
def test_chores_on_a_run_work_from_the_command_line(finished, tmp_path):
    words = [sys.executable, "-m", "custom.cli.main"]
    run([*words, "probe", str(finished)], cwd=tmp_path)
    run([*words, "picture", str(finished), str(tmp_path / "p.png")], cwd=tmp_path)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    refused = run([*words, "export", str(tmp_path)], cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr


def test_a_profile_says_where_a_steps_time_goes(scans, trained, capsys):
    files = str([str(CONFIGS / f) for f in ("train.yaml", "smoke.yaml")])
    words = ["profile", files, "--steps", "2", "--dataset_dir", str(scans)]
    for key, value in (TINY | {"store_dir": trained / "store", "workers": 0}).items():
        if key not in ("iterations", "warmup", "checkpoint_every", "monitor_every", "probe_every"):
            words += [f"--{key}", str(value)]
    capsys.readouterr()
    alice(words)
    lines = capsys.readouterr().out.splitlines()
    shares = {line.split()[0]: float(line.split()[2].rstrip("%")) for line in lines if line.endswith("%")}
    assert {
        "loader",
        "views",
        "online",
        "decoder",
        "target",
        "losses",
        "backward",
        "optimizer",
        "ema",
    } <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=1) and shares["backward"] > 0


@pytest.mark.slow
def test_a_run_killed_midway_resumes_to_the_bit(scans, finished, tmp_path):
    words = command(scans, tmp_path / "run", workers=1, store_dir=finished / "store")
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "run" / "checkpoints" / "iteration_00000002.pt").is_file():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stopped = max(load_checkpoint(p)["iteration"] for p in checkpoints_of(tmp_path / "run" / "checkpoints"))
    assert 2 <= stopped < 6
    run(words, cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.slow
def test_two_processes_equal_one_over_the_same_global_batch(scans, finished, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle")
    shared = {"store_dir": finished / "store", "workers": 0}
    first = command(
        scans, tmp_path / "two", "multi_gpu.yaml", launcher=torchrun, **shared, iterations=4, warmup=0
    )
    run(command(scans, tmp_path / "one", **shared, batch_size=4, iterations=4, warmup=0), cwd=tmp_path)
    run(first, cwd=tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    weights = [
        load_checkpoint(tmp_path / name / "checkpoints" / "iteration_00000004.pt") for name in ("one", "two")
    ]
    for part in ("student", "teacher"):
        for name, tensor in weights[0][part].items():
            torch.testing.assert_close(
                tensor, weights[1][part][name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    # saved once, and it resumes: the first half again, then on
    for path in (tmp_path / "two" / "checkpoints").glob("*4.pt"):
        path.unlink()
    run(first, cwd=tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "two"), two, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset_dirr": "x"}, "'dataset_dirr' is no setting of this config. Did you mean 'dataset_dir'?"),
        ({"dataset_dir": "/nowhere", "store_dir": "empty"}, "/nowhere: no such folder or datalist"),
        ({"crop_size": "[32,40,16]"}, "y = 40 is not a multiple of the patch (16): take 32 or 48"),
        ({"method::loss::similarity": "cosin"}, "similarity must be one of cosine, dino, infonce; got 'cosin'"),
        ({"hidden_ratio": 1.0}, "hidden_ratio must be in [0, 1), got 1.0"),
        ({"aligner": "guess"}, "aligner must be one of"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_line(scans, finished, tmp_path, settings, message):
    words = command(scans, tmp_path / "run", **({"store_dir": finished / "store", "workers": 0} | settings))
    done = run(words, cwd=tmp_path, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("alice: ") and message in last
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").rglob("*.pt"))


def test_every_override_names_a_key_of_train_yaml():
    complete = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    for name in (
        "smoke.yaml",
        "multi_gpu.yaml",
        "swin.yaml",
        "nnformer.yaml",
        "official.yaml",
        "paper.yaml",
        "mae.yaml",
        "quickstart.yaml",
        "pooled.yaml",
        "small.yaml",
        *RIVALS,
    ):
        check_keys(complete, ConfigParser.load_config_file(CONFIGS / name), name)


@pytest.mark.parametrize("file", RIVALS)
def test_a_rival_runs_from_its_file(file, scans, store, tmp_path):
    small = {"network_def::hidden_size": 48, "network_def::mlp_dim": 96, "network_def::num_heads": 4}
    small |= {"iterations": 3, "warmup": 1, "batch_size": 4, "probe_every": 3, "monitor_every": 2}
    small |= {"decoder_width": 48} if file in ("sim.yaml", "cmae.yaml") else {}
    small |= {"student_def::hidden_width": 64} if file in ("moco.yaml", "cmae.yaml") else {}
    workflow = ConfigWorkflow(
        [str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml", file)],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(scans),
        store_dir=str(store.path),
        output_dir=str(tmp_path),
        crop_size=[32, 32, 16],
        workers=0,
        **small,
    )
    workflow.initialize()
    workflow.run()
    set_determinism(None)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and "probe/linear" in lines[-1]
    alice(["export", str(tmp_path), "--to", str(tmp_path / "e.safetensors")])
    unetr = UNETR(1, 2, (32, 32, 16), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4)
    report = load_encoder(unetr, tmp_path / "e.safetensors", verbose=False)
    assert report.metadata["method"] == file.removesuffix(".yaml")
    if file == "ace.yaml":
        _check_whose_encoder_is_exported(tmp_path)
    alice(["picture", str(tmp_path), str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 10_000


def _check_whose_encoder_is_exported(folder):
    weights = {}
    for which in ("student", "teacher"):
        alice(["export", str(folder), "--to", str(folder / f"{which}.safetensors"), "--which", which])
        weights[which], about = read_weights(folder / f"{which}.safetensors")
        assert about["exported"] == which
    default, about = read_weights(folder / "e.safetensors")
    assert about["exported"] == "teacher" and "patents pending" in about["notice"]
    alice(["export", str(folder), "--to", str(folder / "hf"), "--format", "hf"])
    assert about["notice"] in (folder / "hf" / "README.md").read_text(encoding="utf-8")
    assert all(torch.equal(value, weights["teacher"][name]) for name, value in default.items())
    assert any(not torch.equal(value, weights["student"][name]) for name, value in default.items())


def test_every_switch_of_the_method_can_be_reached_by_name():
    complete = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    switches = {
        "": "hidden_ratio weight_decay warmup iterations learning_rate aligner crop_size spacing window_hu amp accumulate resume seed",
        "student_def::": "predictor alignment casa_teacher pooled_from teacher_has_decoder prototypes",
        "method::loss::": "similarity reconstruction skip_empty weight_r weight_dv weight_st similarity_start similarity_ramp",
        "method::view::": "rotation flip scale shift noise zoom",
        "masking::": "kind ratio",
        "schedule::": "momentum final_weight_decay final_learning_rate",
        "optimizer::": "betas",
        "train::trainer::": "clip clip_each compile_encoders keep_checkpoints",
        "train::dataset::": "queue_length max_redraws max_offset",
        "train::dataset::aligner::": "threshold max_cycle_mm",
    }
    for place, names in switches.items():
        check_keys(complete, {f"{place}{name}": 0 for name in names.split()}, "here")
    with pytest.raises(
        ValueError, match="'weight_dv' is no setting of this config. Did you mean 'method::loss::weight_dv'"
    ):
        check_keys(complete, {"weight_dv": 0}, "here")
    with pytest.raises(ValueError, match="wieght_dv' is no setting of this config. Did you mean 'weight_dv'"):
        check_keys(complete, {"method::loss::wieght_dv": 0}, "here")


def test_settings_of_another_method_are_refused():
    files = [str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml", "mae.yaml")]
    check_files(files, {"method::skip_empty": False, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match="'method::loss::weight_dv' is no setting"):
        check_files(files, {"method::loss::weight_dv": 0.3})
    with pytest.raises(
        ValueError, match="'aligner' acts on nothing in this run; .*mae.yaml replaced what used it"
    ):
        check_files(files, {"aligner": "random"})


def test_the_papers_settings_are_the_default():
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "train.yaml"))
    paper = {
        "crop_size": [192, 192, 64],
        "batch_size": 8,
        "learning_rate": 5e-5,
        "iterations": 100_000,
        "optimizer::betas": [0.9, 0.95],
        "hidden_ratio": 0.75,
    }
    assert {k: parser[k] for k in paper} == paper
    vit = parser["network_def"]
    assert (vit["hidden_size"], vit["num_layers"], vit["num_heads"], vit["mlp_dim"], vit["patch_size"]) == (
        768,
        12,
        12,
        3072,
        16,
    )


def test_metadata_meets_the_schema_and_pins_exact_versions():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    required = {
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    }
    assert required <= set(metadata) and metadata["version"] in metadata["changelog"]
    pins = dict(re.findall(r"^([\w.\-]+)==(\S+?)(?:;.*)?$", (REPO / "constraints.txt").read_text(), re.M))
    known = {k.lower().replace("_", "-"): v for k, v in pins.items()}
    for name, version in metadata["required_packages_version"].items():
        assert known[name.lower().replace("_", "-")] == version, name
    assert (
        known["monai"] == metadata["monai_version"]
        and known["torch"] == metadata["pytorch_version"]
        and known["numpy"] == metadata["numpy_version"]
    )
    for direction in ("inputs", "outputs"):
        for tensor in metadata["network_data_format"][direction].values():
            assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(tensor)


@pytest.mark.parametrize("bundle", sorted(p.name for p in (REPO / "bundles").iterdir() if p.is_dir()))
def test_metadata_validates_against_monais_schema(bundle):
    schema = json.loads((REPO / "tests" / "data" / "meta_schema_20240725.json").read_text())
    metadata = json.loads((REPO / "bundles" / bundle / "configs" / "metadata.json").read_text())
    jsonschema.validate(metadata, schema)
    with pytest.raises(jsonschema.ValidationError, match="'task' is a required property"):
        jsonschema.validate({k: v for k, v in metadata.items() if k != "task"}, schema)


def test_the_bundle_has_the_zoos_files_none_too_large():
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "configs/train.yaml",
        "configs/inference.yaml",
        "configs/logging.conf",
        "docs/README.md",
        "docs/data_license.txt",
    ):
        assert (BUNDLE / name).is_file(), name
    assert all(p.stat().st_size <= 25 * 2**20 for p in BUNDLE.rglob("*") if p.is_file())


@pytest.mark.slow
def test_inference_turns_a_scan_into_a_placed_feature_map(finished, tmp_path):
    write_scan(tmp_path / "scans" / "one.nii.gz", 3)
    (tmp_path / "scans" / "one_label.nii.gz").unlink()
    run(
        [
            sys.executable,
            "-m",
            "custom.cli.main",
            "export",
            str(finished),
            "--to",
            str(tmp_path / "model.pt"),
        ],
        cwd=tmp_path,
    )
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.yaml"), "--dataset_dir", str(tmp_path / "scans"),
             "--output_dir", str(tmp_path / "out"), "--weights", str(tmp_path / "model.pt"), "--crop_size", "[32,32,16]", "--spacing", "[3.0,3.0,4.0]",
             "--network_def::encoder::hidden_size", "48", "--network_def::encoder::mlp_dim", "96", "--network_def::encoder::num_heads", "4"]  # fmt: skip
    run(words, cwd=tmp_path)
    image = nib.load(next(Path(tmp_path / "out").rglob("*features.nii.gz")))
    scan = nib.load(tmp_path / "scans" / "one.nii.gz")
    assert image.shape[3] == 48 and np.isfinite(image.get_fdata()).all()
    np.testing.assert_allclose(image.header.get_zooms()[:3], (48.0, 48.0, 64.0))
    np.testing.assert_allclose(
        image.affine[:3, 3], scan.affine[:3, :3] @ np.full(3, 7.5) + scan.affine[:3, 3], atol=1e-3
    )


def test_features_lie_where_the_affine_says(tmp_path):
    """The same windows on a network whose feature is its own position."""
    from monai.transforms import DivisiblePad

    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "inference.yaml"))
    parser["crop_size"] = [32, 32, 16]
    inferer = parser.get_parsed_content("inferer")
    ramp = DivisiblePad(k=16, method="end")(torch.arange(61.0).view(1, 61, 1, 1).expand(1, 61, 53, 47))
    found = inferer(torch.as_tensor(ramp)[None], lambda x: torch.nn.functional.avg_pool3d(x, 16))
    assert found.shape[2:] == (4, 4, 3)
    torch.testing.assert_close(found[0, 0, :3, 0, 0], torch.tensor([7.5, 23.5, 39.5]))


@pytest.mark.slow
def test_the_shipped_encoder_passes_the_zoos_checks(tmp_path):
    common = ["--meta_file", str(CONFIGS / "metadata.json"), "--config_file", str(CONFIGS / "inference.yaml")]
    verify = [sys.executable, "-m", "monai.bundle", "verify_net_in_out", "--net_id", "network_def", *common]
    assert "verified with no error" in (done := run(verify, cwd=tmp_path)).stdout + done.stderr
    weights = ["--ckpt_file", str(BUNDLE / "models" / "model.pt"), "--filepath", str(tmp_path / "model.ts")]
    trace = ["--use_trace", "True", "--input_shape", "[1,1,64,64,32]"]
    run(
        [
            sys.executable,
            "-m",
            "monai.bundle",
            "ckpt_export",
            "--net_id",
            "network_def",
            *common,
            *weights,
            *trace,
        ],
        cwd=tmp_path,
    )
    crop = torch.rand(1, 1, 64, 64, 32)
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "inference.yaml"))
    parser["bundle_root"], parser["device"] = str(BUNDLE), "cpu"
    network = parser.get_parsed_content("network").eval()
    torch.testing.assert_close(
        torch.jit.load(tmp_path / "model.ts")(crop), network(crop), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_real_abdomen_chest_and_head_and_neck_pre_train_together(real_data, tmp_path):
    done = run(
        command(real_data, tmp_path / "run", iterations=20, warmup=2, probe_every=100, workers=0),
        cwd=tmp_path,
    )
    report = json.loads((tmp_path / "run" / "store" / "report.json").read_text())
    assert len(report["taken"]) == 84 and all("mr" in name for name in report["refused"])
    found = np.array(losses(tmp_path / "run"))
    assert len(found) == 20 and "Traceback" not in done.stderr and "collapse" not in done.stderr
    assert (found[-5:, 2:5].mean(axis=0) < found[:5, 2:5].mean(axis=0)).all(), "every loss term falls"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, settings",
    [
        ("swin.yaml", {"network_def::embed_dim": 12, "crop_size": "[64,64,32]", "network_def::num_heads": "[1,2,2,2]"}),
        ("paper.yaml", {"network_def::hidden_size": 48, "network_def::mlp_dim": 96, "network_def::num_heads": 4}),
        ("nnformer.yaml", {"network_def::embed_dim": 6, "network_def::num_heads": "[1,1,2,2]", "accumulate": 2}),
        ("mae.yaml", {"network_def::hidden_size": 48, "network_def::mlp_dim": 96, "network_def::num_heads": 4}),
        ("official.yaml", {"network_def::embed_dim": 6, "network_def::num_heads": "[1,1,2,2]", "student_def::prototypes": 16, "crop_size": "[64,64,64]"}),
    ],
)  # fmt: skip
def test_every_network_pre_trains_exports_and_loads(scans, finished, tmp_path, config, settings):
    files = [str(CONFIGS / f) for f in ("train.yaml", config)]
    common = {"spacing": "[3.0,3.0,4.0]", "iterations": 2, "warmup": 0, "batch_size": 2, "held_back_patients": 2, "workers": 1, "probe_every": 9,
              "store_dir": finished / "store", "crop_size": "[32,32,32]", "learning_rate": 1.0e-3}  # fmt: skip
    words = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(files),
        "--dataset_dir",
        str(scans),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    for key, value in (common | settings).items():
        words += [f"--{key}", str(value)]
    run(words, cwd=tmp_path)
    assert all(np.isfinite(line["total"]) for line in read_log(tmp_path / "run") if line["step"])
    run(
        [
            sys.executable,
            "-m",
            "custom.cli.main",
            "export",
            str(tmp_path / "run"),
            "--to",
            str(tmp_path / "e.safetensors"),
        ],
        cwd=tmp_path,
    )
    student, volume = load_run(tmp_path / "run").student, torch.rand(1, 1, 64, 64, 64)
    if config == "swin.yaml":
        stock = SwinUNETR(1, 3, feature_size=12, num_heads=(1, 2, 2, 2)).eval()
        load_encoder(stock, tmp_path / "e.safetensors", verbose=False)
        for own, theirs in zip(student.encoder.encoder(volume), stock.swinViT(volume), strict=True):
            torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)
    else:
        settings = read_weights(tmp_path / "e.safetensors")[1]["network"]
        if config == "paper.yaml":
            assert student.casa is not None and isinstance(student.predict_tokens, torch.nn.Identity)
        if config in ("paper.yaml", "mae.yaml"):
            stock = UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4)
            load_encoder(stock, tmp_path / "e.safetensors", verbose=False)
            return
        load_encoder(NNFormer(**(settings | {"out_channels": 5})), tmp_path / "e.safetensors", verbose=False)


@pytest.mark.parametrize("iterations, warmup", [(5, 2), (60, 10)])
def test_a_trial_of_few_steps_has_a_warm_up_that_fits(iterations, warmup):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml")])
    parser["iterations"] = iterations
    assert parser.get_parsed_content("warmup") == warmup
