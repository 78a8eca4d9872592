"""Settings of bundles: names and kinds, from the command line, from Python, and in all four bundles."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle import run as bundle_run

from custom.bundles.preflight import ConfigKeyError, check_files
from custom.bundles.setting_kinds import Kind, WrongKind, kind_of, kind_of_annotation, read_as
from custom.bundles.settings import configs_in

BUNDLES = sorted(p for p in (REPO / "bundles").iterdir() if p.is_dir())
PRETRAIN, SAM = REPO / "bundles/alice_pretrain/configs", REPO / "bundles/sam_landmarks/configs"
SEG = [REPO / f"bundles/alice_seg_{name}/configs" for name in ("flare", "btcv")]


# -- kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held, given, read",
    [
        (True, "false", False), (False, "Yes", True), (True, "off", False), (1, "3", 3), (1, 3.0, 3), (1, "1e3", 1000),
        (0.5, "1e-4", 1e-4), (0.5, 3, 3), (0.5, "3", 3), ([1.0, 2.0], (1, 2), [1, 2]), ([1.0], "[1, 2.5]", [1, 2.5]),
        (["a"], "x,y", ["x", "y"]), ("a", "no", "no"), ("a", "3", "3"), ("a", Path("b"), "b"), (None, "null", None),
        (None, "0.4", 0.4), (None, "text", "text"), ({"_target_": "x"}, "null", None), (True, "$1 > 2", "$1 > 2"),
        (1, "@other", "@other"), (1, "%file.yaml::x", "%file.yaml::x"), (1, np.int64(4), 4), (0.5, np.float32(0.5), 0.5),
        ("$@device.type == 'cuda'", "no", False), ("$int(0.03 * @n)", "4", 4), ("$len(@a) + 1", "4", 4),
        ("$-(-@n // 3)", "4", 4), ("$@root + '/runs'", "on", "on"), ("$'a' if @x else 'b'", "none", "none"),
        ("$torch.device('cpu')", torch.device("cpu"), torch.device("cpu")), ("$torch.device('cpu')", "cuda:1", "cuda:1"),
    ],
)  # fmt: skip
def test_a_value_is_read_as_what_the_config_holds(held, given, read):
    got = read_as(given, kind_of(held))
    assert got == read and type(got) is type(read)


@pytest.mark.parametrize(
    "held, given, message",
    [
        (True, "maybe", "true or false"), (True, 1, "true or false"), (True, "0", "true or false"), (True, None, "true or false"),
        (1, "many", "a whole number"), (1, 2.5, "a whole number"), (1, True, "a whole number"), (1, "null", "a whole number"),
        (0.5, "half", "a number"), (0.5, "nan", "a number"), (0.5, [0.5], "a number"),
        ([1.0, 2.0], 3, r"a list of numbers, such as \[1.0, 2.0\]"), ([1.0], ["a"], "a number"), (["a"], 3, "a list of text"),
        ("a", 3, "text; for this text write '\"3\"'"), ("a", True, "text"), ("a", None, "text"), ({"_target_": "x"}, 3, "an object"),
        ("$@device.type == 'cuda'", "cuda", "true or false"), ("$int(@n)", "half", "a whole number"),
    ],
)  # fmt: skip
def test_another_value_is_refused_with_what_is_taken(held, given, message):
    with pytest.raises(WrongKind, match=f"^takes {message}"):
        read_as(given, kind_of(held))


def test_false_is_no_file_where_null_would_leave_it_out():
    pretrained = Kind(frozenset({"text", "null"}))
    assert read_as("null", pretrained) is None and read_as("a.pt", pretrained) == "a.pt"
    with pytest.raises(WrongKind, match="takes text or null"):
        read_as("false", pretrained)


@pytest.mark.parametrize(
    "annotation, names",
    [
        ("bool", {"switch"}), ("int | None", {"whole", "null"}), ("Optional[float]", {"number", "null"}),
        ("str | os.PathLike[str]", {"text"}), ("Sequence[float] | float", {"list", "number"}),
        ("torch.nn.Module | None", set()), ("Any", set()), ("", set()), ("Union[int, str]", {"whole", "text"}),
    ],
)  # fmt: skip
def test_an_annotation_names_kinds(annotation, names):
    assert kind_of_annotation(annotation).names == names
    assert kind_of_annotation("", True).names == {"switch"}


# -- configs of a made-up bundle, from Python and by monai.bundle.run -----------------------

TRAIN = """
imports: [$import torch]
steps: 10
rate: 0.1
resume: true
pattern: null
amp: $@resume == 'never'
net: {_target_: torch.nn.Linear, in_features: 2, out_features: '@steps'}
check: {_target_: custom.bundles.preflight.preflight, may_be_null: {pattern: text}}
made: []
other: {net: '%net', steps: '%steps'}
run:
- $@check
- $@made.append((@steps, @rate, @resume, @pattern, @amp, @net.bias is None))
- $@made.append(@made[-1] if @other::steps == @steps else 'the copy has another value')
"""


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "smoke.yaml").write_text("steps: 3\n")
    return folder


def made_by(configs, way, **settings):
    """What a run in Python, by one of two ways, makes of its settings."""
    files = [str(configs / name) for name in ("train.yaml", "smoke.yaml")]
    if way == "workflow":
        workflow = ConfigWorkflow(files, logging_file=False, **settings)
        workflow.initialize()
        workflow.run()
        return workflow.parser.get_parsed_content("made")[-1]
    return bundle_run(config_file=files, logging_file=False, **settings)


def test_text_is_read_before_anything_is_made(configs):
    way = "workflow"
    assert made_by(configs, way) == (3, 0.1, True, None, False, False)
    given = {
        "steps": "4",
        "rate": "1e-3",
        "resume": "false",
        "pattern": "null",
        "amp": "on",
        "net::bias": "no",
    }
    assert made_by(configs, way, **given) == (4, 1e-3, False, None, True, True)
    assert made_by(configs, way, rate="$0.1 + 0.2", pattern="@rate") == (
        3,
        0.1 + 0.2,
        True,
        0.1 + 0.2,
        False,
        False,
    )


@pytest.mark.parametrize("way", ["workflow", "run"])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stepz": 3}, "'stepz' is no setting of this config. Did you mean 'steps'?"),
        ({"colour": "red"}, "'colour' is no setting of this config."),
        ({"net::biass": False}, "'net::biass' is no setting of this config. Did you mean 'bias'?"),
        ({"steps": "many"}, "steps = 'many': this setting takes a whole number."),
        ({"resume": "maybe"}, "resume = 'maybe': this setting takes true or false."),
        ({"net::bias": "maybe"}, "net::bias = 'maybe': this setting takes true or false."),
        ({"pattern": 3}, "pattern = 3: this setting takes text or null"),
        ({"steps": 2.5, "rate": "x"}, "rate = 'x': this setting takes a number."),
    ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_kind(configs, way, settings, message):
    with pytest.raises((ConfigKeyError, RuntimeError)) as refused:
        made_by(configs, way, **settings)
    errors = [refused.value, refused.value.__cause__, refused.value.__context__]
    assert any(message in str(error) for error in errors), errors


def test_a_file_from_elsewhere_may_bring_a_key_that_acts_and_no_other(configs, tmp_path):
    files = [str(configs / "train.yaml"), str(tmp_path / "own.yaml")]
    (tmp_path / "own.yaml").write_text("half: 0.5\nrate: $@half / 2\n")
    assert check_files(files, {"steps": "5"}) == {"steps": 5}
    (tmp_path / "own.yaml").write_text("stepz: 3\n")
    with pytest.raises(ConfigKeyError, match=r"own\.yaml: 'stepz' is no setting .* mean 'steps'"):
        check_files(files, {})


def test_on_the_command_line(configs):
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(configs / "train.yaml"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    more = [
        "--run",
        "['$@check','$print([@steps, @resume, @amp])']",
        "--resume",
        "false",
        "--amp",
        "no",
        "--steps",
        "1e1",
    ]
    done = subprocess.run([*words, *more], capture_output=True, text=True, env=env)
    assert "[10, False, False]" in done.stdout, done.stderr
    done = subprocess.run([*words, "--resume", "maybe"], capture_output=True, text=True, env=env)
    told = "alice: resume = 'maybe': this setting takes true or false."
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == told


# -- the four bundles -----------------------------------------------------------------


def test_the_bundles_hold_the_same_files_as_the_package():
    for name in ("settings.py", "setting_kinds.py", "setting_keys.py"):
        own = (REPO / "custom/bundles" / name).read_bytes()
        for bundle in ("alice_seg_flare", "alice_seg_btcv"):
            assert (REPO / "bundles" / bundle / f"scripts_{bundle}" / name).read_bytes() == own, bundle


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_every_config_reads_its_settings_first(bundle):
    for file, config in configs_in(bundle / "configs").items():
        if "run" in config:
            first = config["run"][0]
            assert first == "$@preflight" or "settings.read_settings(" in first, file
            # what happens before has not been checked, and must need no code of a bundle's own
            assert not re.search("@(?!device)", str(config.get("initialize", []))), file


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_every_setting_that_is_null_says_what_it_is_otherwise(bundle):
    contents = configs_in(bundle / "configs")
    declared = {key for c in contents.values() for key in c.get("preflight", {}).get("may_be_null", {})}
    declared |= {
        key for c in contents.values() for key in ("pretrained", "clip") if f"'{key}': " in str(c.get("run"))
    }
    for file, config in contents.items():
        top = {key for key, value in config.items() if value is None}
        assert top <= declared, f"{file}: {top - declared}"


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_a_setting_has_one_kind_in_all_configs_of_a_bundle(bundle):
    known = {}
    for config in configs_in(bundle / "configs").values():
        for key, value in config.items():
            kind = kind_of(value)
            if kind.names and value is not None and key not in ("initialize", "run", "finalize"):
                known.setdefault(key, set()).add(kind.names)
    mixed = {key: kinds for key, kinds in known.items() if len(kinds) > 1}
    assert all(kinds <= {frozenset({"whole"}), frozenset({"number"})} for kinds in mixed.values()), mixed


@pytest.mark.parametrize(
    "files, settings, read",
    [
        ([PRETRAIN / "train.yaml"], {"resume": "false", "student_def::predictor": "no"}, [False, False]),
        ([PRETRAIN / "train.yaml"], {"method::loss::weight_dv": "0", "amp": "off"}, [0, False]),
        ([PRETRAIN / "train.yaml"], {"method::loss::places": "null", "warmup": "1e2"}, [None, 100]),
        ([PRETRAIN / "inference.yaml"], {"spacing": (3, 3, 4), "weights": "a.pt"}, [[3, 3, 4], "a.pt"]),
        ([SAM / "train.yaml"], {"clip": "null", "amp": "yes"}, [None, True]),
        ([SAM / "inference.yaml"], {"fine_bits": "4", "overwrite": "true"}, [4, True]),
        ([SAM / "evaluate.yaml"], {"threshold": "0.4", "aligners": "sam,affine"}, [0.4, ["sam", "affine"]]),
        ([SEG[0] / "train.yaml"], {"resume": "false", "cache_rate": "0"}, [False, 0]),
        ([SEG[1] / "train.yaml"], {"labelled": 3, "amp": "false"}, [3, False]),
        ([SEG[0] / "inference.yaml"], {"overlap": "0.25", "network_def::qkv_bias": "on"}, [0.25, True]),
        ([SEG[1] / "train.yaml", SEG[1] / "inference.yaml", SEG[1] / "swin_unetr.yaml", SEG[1] / "evaluate.yaml"],
         {"fold": "2", "network_def::use_v2": "true"}, [2, True]),
    ],
)  # fmt: skip
def test_settings_of_the_bundles_are_read_by_kind(files, settings, read):
    assert list(check_files(list(map(str, files)), settings).values()) == read


@pytest.mark.parametrize(
    "files, settings, message",
    [
        ([PRETRAIN / "train.yaml"], {"student_def::predictor": "maybe"}, "student_def::predictor = 'maybe'"),
        ([PRETRAIN / "train.yaml"], {"predictor": False}, "'predictor' is no setting .*mean 'student_def::predictor'"),
        ([PRETRAIN / "train.yaml"], {"spacing": 3}, "spacing = 3: this setting takes a list of numbers"),
        ([SAM / "train.yaml"], {"memory": "large"}, "memory = 'large': this setting takes a whole number"),
        ([SAM / "inference.yaml"], {"slab": True}, "slab = True: this setting takes a whole number"),
        ([SEG[0] / "train.yaml"], {"network_def::hiden_size": 48}, "'network_def::hiden_size' .*mean 'hidden_size'"),
        ([SEG[1] / "inference.yaml"], {"overlap": "half"}, "overlap = 'half': this setting takes a number"),
        ([SEG[1] / f"{name}.yaml" for name in ("train", "inference", "evaluate")], {"epochs": 3}, "'epochs' acts on nothing"),
    ],
)  # fmt: skip
def test_wrong_settings_of_the_bundles_are_refused(files, settings, message):
    with pytest.raises(ConfigKeyError, match=message):
        check_files(list(map(str, files)), settings)


@pytest.mark.parametrize("name", ["flare", "btcv"])
def test_a_segmentation_bundle_refuses_in_one_line(name, tmp_path):
    bundle = REPO / f"bundles/alice_seg_{name}"
    given = {"dataset_dir": str(tmp_path), "epocs": 3, "amp": "maybe"}
    with pytest.raises(
        SystemExit, match=r"^alice_seg: amp = 'maybe': .* 'epocs' is no setting .* mean 'epochs'"
    ):
        ConfigWorkflow(
            str(bundle / "configs/train.yaml"), bundle_root=str(bundle), logging_file=False, **given
        ).run()


def test_configs_that_no_workflow_runs_are_left_alone():
    parser = ConfigParser({"check": {"_target_": "custom.bundles.settings.read_settings"}})
    assert parser.get_parsed_content("check") == []
