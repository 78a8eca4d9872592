"""What a run will take: the disk against the disk, a real step, and honest gaps."""

import json

import fsspec
import pytest
from conftest import REPO

from custom.bundles.estimate import MadeUpStore, estimate, scans_of
from custom.bundles.preflight import ConfigKeyError
from custom.data.intake.scan_folder import scan_folder
from custom.engine.checkpoint import latest_checkpoint
from custom.errors import plain_message
from custom.landmarks.aligners.simple import CoordinateAligner
from custom.methods.pairs import AlignedPair

CONFIGS = REPO / "bundles" / "alice_pretrain" / "configs"
SMALL = {
    "crop_size": [64, 32, 32], "spacing": [3.0, 3.0, 4.0], "network_def::hidden_size": 48, "network_def::mlp_dim": 96,
    "network_def::num_heads": 4, "decoder_width": 48, "student_def::head_width": 64, "batch_size": 2,
    "held_back_patients": 2, "device": "$torch.device('cpu')",
}  # fmt: skip


def files(*names):
    return [str(CONFIGS / name) for name in ("train.yaml", "smoke.yaml", *names)]


def test_made_up_volumes_can_be_drawn_from():
    store = MadeUpStore([3.0, 3.0, 4.0], [64, 48, 40])
    pair = AlignedPair(store, CoordinateAligner(store), (32, 32, 16))[3]
    assert pair["crop_q"].shape == (1, 32, 32, 16) and pair["patient_q"] != pair["patient_k"]
    assert pair["crop_k"].min() >= 0 and pair["crop_k"].max() <= 1 and pair["crop_k"].std() > 0


def test_a_run_without_data_says_what_it_cannot_know(tmp_path):
    settings = SMALL | {"dataset_dir": str(tmp_path / "none"), "output_dir": str(tmp_path / "out")}
    made = estimate(files(), settings, measure=False)
    assert [figure.name for figure in made.figures if figure.value is None] == ["scans", "disk: store"]
    assert "none is not there" in made["scans"].note and not (tmp_path / "out").exists()
    assert "?" in made.table() and json.loads(made.to_json())["figures"][0]["name"] == "scans"


@pytest.mark.parametrize("method", [(), ("mae.yaml",)])
def test_a_few_real_steps_tell_memory_speed_and_hours(tmp_path, method):
    settings = SMALL if not method else {k: v for k, v in SMALL.items() if not k.startswith("student_def")}
    settings = settings | {
        "dataset_dir": str(tmp_path / "none"),
        "output_dir": str(tmp_path / "out"),
        "workers": 0,
    }
    made = estimate(files(*method), settings)
    step = made["seconds a step, device"].value + 2 * made["CPU ms a sample, loader"].value / 1e3
    assert made["hours"].value == pytest.approx(60 * step / 3600)
    assert made["samples a second"].value == pytest.approx(2 / step)
    # forward and backward of the encoder's matrices on visible tokens, at least
    assert made["TFLOP a step"].value > 0 and made["device: peak in a step"].value > 1e-3
    assert not (tmp_path / "out").exists()


def test_alice_costs_more_than_mae(tmp_path):
    lean = {k: v for k, v in SMALL.items() if not k.startswith("student_def")}
    alice, mae = (estimate(files(*more), lean) for more in ((), ("mae.yaml",)))
    assert alice["TFLOP a step"].value > 2 * mae["TFLOP a step"].value  # two crops, and a teacher


def test_a_folder_is_told_by_its_headers_and_a_store_by_its_bytes(scans, store, tmp_path):
    settings = SMALL | {"dataset_dir": str(scans), "store_dir": str(tmp_path / "store")}
    before = estimate(files(), settings, measure=False)
    after = estimate(files(), settings | {"store_dir": str(store.path)}, measure=False)
    assert before["scans"].value == after["scans"].value == 6
    size = sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
    assert after["disk: store"].value * 1e9 == pytest.approx(size)
    assert 0.5 < before["disk: store"].value / after["disk: store"].value < 3
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_checkpoint_has_the_size_that_was_told(scans, store, tmp_path):
    from monai.bundle import ConfigParser

    made = estimate(files(), SMALL | {"store_dir": str(store.path)})
    parser = ConfigParser()
    parser.read_config(files())
    own = {"store_dir": str(store.path), "dataset_dir": str(scans), "output_dir": str(tmp_path), "workers": 0}
    for key, value in (SMALL | own | {"iterations": 2, "preflight": None, "probe": None}).items():
        parser.set(value, key)
    parser.get_parsed_content("train::trainer").run()
    size = latest_checkpoint(tmp_path / "checkpoints").stat().st_size
    assert made["disk: checkpoints"].value * 1e9 / 3 == pytest.approx(size, rel=0.1)


@pytest.mark.slow
def test_more_processes_share_the_work():
    one, four = (estimate(files(), SMALL | {"workers": 0}, processes=n) for n in (1, 4))
    assert four["samples a second"].value > 1.5 * one["samples a second"].value
    assert four["TFLOP a step"].value == one["TFLOP a step"].value


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ConfigKeyError, match="batch_sise"):
        estimate(files(), {"batch_sise": 2})
    with pytest.raises(ValueError, match="processes must be at least 1"):
        estimate(files(), SMALL, processes=0)
    with pytest.raises(RuntimeError) as caught:  # wrapped by MONAI; the command says what is inside
        estimate(files(), SMALL | {"crop_size": [64, 32, 30]})
    assert "30" in str(plain_message(caught.value))


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
    assert made["scans"].value == len(store)
