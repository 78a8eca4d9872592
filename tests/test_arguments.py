import inspect
import re

import pytest

from custom.cli.main import COMMANDS, command
from custom.data.arguments import number, voxel_size, whole_number, worker_count
from custom.data.errors import ManifestError, StoreError
from custom.data.intake.manifest import Manifest
from custom.data.intake.scan_folder import scan_folder
from custom.data.store.build import build_store, shared_store
from custom.data.store.settings import BuildSettings
from custom.errors import AliceError


@pytest.mark.parametrize(
    "spacing", [3, (3, 3), (0, 3, 3), ("a", "b", "c"), "abc", (3, 3, True), None, (3, 3, float("nan"))]
)
def test_a_spacing_that_is_none_is_refused(spacing, tmp_path):
    with pytest.raises(ValueError, match="spacing must be three numbers of mm between 0.1 and 20, got"):
        build_store([], tmp_path / "store", spacing=spacing)
    assert not (tmp_path / "store").exists()


def test_numbers_come_through_and_others_are_named():
    assert voxel_size([1, 1.5, 2]) == [1.0, 1.5, 2.0] and number("margin_mm", 3, 0, 9) == 3.0
    assert whole_number("workers", 0, 0) == 0
    for value in ("abc", -3, True, None):
        with pytest.raises(ValueError, match="margin_mm must be between 0 and 1000, got"):
            number("margin_mm", value, 0, 1000)


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (3, 3), (64, 4)])
def test_nobody_said_how_many_workers(cores, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores), raising=False)
    assert worker_count(None) == workers and worker_count(0) == 0 and worker_count(9) == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": "many"}, "workers must be a whole number"),
        ({"bad_scans_allowed": 0.5}, "bad_scans_allowed must be a whole number"),
        ({"margin_mm": 1001}, "margin_mm must be between 0 and 1000"),
        ({"margin_mm": 2, "crop_body": False}, "margin_mm = 2 has no effect"),
        ({"profile": "pet"}, "profile must be one of"),
    ],
)
def test_a_build_with_a_wrong_setting_is_refused_before_it_starts(wrong, message, tmp_path):
    for build in (build_store, shared_store):
        with pytest.raises(AliceError, match=message):
            build(tmp_path / "scans", tmp_path / "store", **wrong)
    with pytest.raises(TypeError, match="'margin'"):
        build_store(tmp_path / "scans", tmp_path / "store", margin=3)
    assert not list(tmp_path.iterdir())


def test_settings_are_those_of_the_store_unless_others_are_asked_for(tmp_path):
    new = BuildSettings().stored(tmp_path, None, "mr")
    assert (new["spacing"], new["profile"], new["crop_margin_mm"]) == ([1.5, 1.5, 2.0], "mr", 10.0)
    whole = BuildSettings(crop_body=False, remove_table=True).stored(tmp_path, None, None)
    assert whole["crop_margin_mm"] is None and whole["profile"] == "ct"
    assert BuildSettings().stored(tmp_path, whole, None) == whole
    with pytest.raises(StoreError, match=r"built with .*None.*, now .*10\.0"):
        BuildSettings(crop_body=True).stored(tmp_path, whole, None)
    wide = BuildSettings(margin_mm=25).stored(tmp_path, None, None)
    assert BuildSettings(crop_body=True).stored(tmp_path, wide, None)["crop_margin_mm"] == 25.0


@pytest.mark.parametrize(
    "wrong", [{"workers": "many"}, {"workers": -1}, {"min_slices": "few"}, {"min_slices": 2.5}]
)
def test_a_scan_with_wrong_numbers_is_refused_before_it_starts(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number of at least"):
        scan_folder(tmp_path, output=tmp_path / "m.json", **wrong)
    assert not list(tmp_path.iterdir())


def test_a_store_where_a_file_lies_is_refused(tmp_path):
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(StoreError, match="m.json: is a file; a store is a folder"):
        build_store([], tmp_path / "m.json")


def test_a_manifest_of_an_unknown_protocol_is_said_once():
    with pytest.raises(ManifestError, match=r"^nosuch://b/m.json: cannot be read.*copy the manifest\.$"):
        Manifest.load("nosuch://b/m.json")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_its_line_of_help(name):
    function = command(name)
    said = inspect.getdoc(function) or ""
    lines = re.findall(r"(?m)^    ([\w, ]+):", said.partition("Args:\n")[2].split("\n\n")[0])
    told = {name for line in lines for name in line.split(", ")}
    for option in inspect.signature(function).parameters:
        assert option in told, f"alice {name} --{option}"
