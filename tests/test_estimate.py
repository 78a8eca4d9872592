"""What a run will take: the model of a step against a step, the disk against the disk, and honest gaps."""

import json
import math

import fsspec
import pytest
from conftest import REPO

from custom.bundles.estimate import MEASURED, MODELLED, UNKNOWN, dry_run, estimate, to_json
from custom.bundles.estimate_data import MadeUpPairs, folder_bytes, scans_of
from custom.bundles.preflight import ConfigKeyError
from custom.data.intake.scan_folder import scan_folder
from custom.errors import plain_message

CONFIGS = REPO / "bundles" / "alice_pretrain" / "configs"
SMALL = {
    "crop_size": [64, 32, 32], "spacing": [3.0, 3.0, 4.0], "network_def::hidden_size": 48, "network_def::mlp_dim": 96,
    "network_def::num_heads": 4, "student_def::decoder_width": 48, "student_def::head_width": 64, "batch_size": 6,
    "held_back_patients": 2,
}  # fmt: skip
SMALL["device"] = "$torch.device('cpu')"


def files(*names):
    return [str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml", *names)]


@pytest.mark.parametrize(
    "more, overrides",
    [
        ((), {}),
        ((), {"accumulate": 3}),
        pytest.param((), {"amp": True}, id="bf16"),
        pytest.param(
            ("swin.yaml",),
            {
                "network_def": {
                    "_target_": "custom.encoders.masked_swin.MaskedSwin", "in_chans": 1, "embed_dim": 12, "window_size": [7, 7, 7],
                    "patch_size": [2, 2, 2], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8],
                }, "batch_size": 3, "crop_size": [64, 64, 32],
            },
            marks=pytest.mark.slow, id="swin",
        ),
    ],
)  # fmt: skip
def test_the_modelled_memory_is_that_of_a_real_step(more, overrides):
    settings = {k: v for k, v in SMALL.items() if not more or "network_def" not in k} | overrides
    made = estimate(files(*more), settings, measure=False)
    seconds, peak = dry_run(files(*more), settings)
    assert made["device: peak"].how == MODELLED and seconds > 0
    # autocast on a CPU keeps norms in bfloat16, which on a GPU, as in the model, are float32
    assert made["device: peak"].value * 1e9 == pytest.approx(peak, rel=0.2 if "amp" in overrides else 0.15)


def test_a_run_without_data_says_what_it_cannot_know(tmp_path):
    made = estimate(
        files(), SMALL | {"dataset_dir": str(tmp_path / "none"), "output_dir": str(tmp_path / "out")}, False
    )
    assert {figure.name for figure in made.figures if figure.how == UNKNOWN} == {
        "scans",
        "disk: store",
        "RAM: page cache",
    }
    assert "none is not there" in made["scans"].note and not (tmp_path / "out").exists()
    assert made["hours"].value == pytest.approx(
        60 * max(made["seconds a step, device"].value, made["seconds a step, loader"].value) / 3600
    )
    assert made.bound in ("loader", "device") and "?" in made.table()
    assert json.loads(to_json(made))["figures"][0]["name"] == "scans"


def test_a_folder_is_told_by_its_headers_and_a_store_by_its_bytes(scans, store, tmp_path):
    settings = SMALL | {"dataset_dir": str(scans), "store_dir": str(tmp_path / "store")}
    before = estimate(files(), settings, measure=False)
    after = estimate(files(), settings | {"store_dir": str(store.path)}, measure=False)
    assert before["scans"].value == after["scans"].value == 6
    assert (before["disk: store"].how, after["disk: store"].how) == (MODELLED, MEASURED)
    assert after["disk: store"].value * 1e9 == folder_bytes(store.path)
    assert 0.5 < before["disk: store"].value / after["disk: store"].value < 3
    assert (before["CPU ms a pair, loader"].how, after["CPU ms a pair, loader"].how) == (MODELLED, MEASURED)
    assert not (tmp_path / "store").exists()


def test_a_checkpoint_has_the_modelled_size(tmp_path):
    from monai.bundle import ConfigParser

    from custom.engine.checkpoint import save_checkpoint

    made = estimate(files(), SMALL, measure=False)
    parser = ConfigParser()
    parser.read_config(files())
    for key, value in (SMALL | {"world_size": 1}).items():
        parser.set(value, key)
    student, teacher = (parser.get_parsed_content(name) for name in ("student", "teacher"))
    optimizer = parser.get_parsed_content("optimizer")
    for parameter in student.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    content = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    size = save_checkpoint(tmp_path, 1, content).stat().st_size
    assert made["disk: checkpoints"].value * 1e9 / 3 == pytest.approx(size, rel=0.1)


def test_more_processes_share_the_work(tmp_path):
    one, four = (estimate(files(), SMALL, measure=False, processes=n) for n in (1, 4))
    assert four["pairs a second"].value > 1.5 * one["pairs a second"].value
    assert four["device: peak"].value == one["device: peak"].value


def test_bad_settings_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigKeyError, match="batch_sise"):
        estimate(files(), {"batch_sise": 2})
    with pytest.raises(ValueError, match="processes must be at least 1"):
        estimate(files(), SMALL, processes=0)
    with pytest.raises(RuntimeError) as caught:  # wrapped by MONAI; the command says what is inside
        estimate(files(), SMALL | {"crop_size": [64, 32, 30]}, measure=False)
    assert "30" in str(plain_message(caught.value))
    with pytest.raises(ValueError, match="three positive numbers"):
        MadeUpPairs([4, 4])
    assert math.isfinite(estimate(files(), SMALL, measure=False)["TFLOP a step"].value)


def test_data_at_urls_are_counted_where_they_lie(scans, store, tmp_path, monkeypatch):
    monkeypatch.setattr("custom.data.remote.Path.home", lambda: tmp_path / "home")
    manifest = scan_folder(scans, output=tmp_path / "m.json", progress=False)
    system = fsspec.filesystem("memory")
    system.pipe_file("/there/m.json", (tmp_path / "m.json").read_bytes().replace(b'"../', b'"'))
    listed = scans_of("memory://there/m.json")  # the scans themselves are not there, and not asked for
    assert [one.name for one in listed] == [one.name for one in manifest.scans()]
    assert all(one.extra["shape"] for one in listed)
    system.rm("/there", recursive=True)
    made = estimate(files(), SMALL | {"store_dir": store.path.as_uri()}, measure=False)
    assert made["scans"].value == len(store) and made["disk: store"].how == MODELLED
    assert made["CPU ms a pair, loader"].how == MEASURED
