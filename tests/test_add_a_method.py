"""The guide's method runs as it stands in docs/add_a_method.md."""

import re
import sys

import yaml
from conftest import REPO, TINY_VIT
from test_methods import CROP, trainer

from custom.bundles.preflight import check_keys
from custom.engine.run_log import RunLog, read_log
from custom.methods import registry
from custom.methods.run_folder import load_run
from custom.transfer.encoder_weights import build_encoder


def blocks():
    text = (REPO / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(python|yaml)\n(.*?)```", text, flags=re.S))


def test_the_guides_method_trains_saves_and_is_built_again(store, tmp_path, monkeypatch):
    code = blocks()["python"]
    assert len(code.splitlines()) < 60
    (tmp_path / "guided").mkdir()
    (tmp_path / "guided" / "deblur.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "guided")
    import deblur  # what the guide says, with no line of ours

    about = {"network": {**TINY_VIT, "img_size": list(CROP)}, "network_type": "MaskedViT"}
    student = deblur.build_student(build_encoder(about), {"width": 64})
    engine = trainer(
        deblur.Deblur(student), store, tmp_path, steps=30, handlers=[RunLog(tmp_path)], rate=3e-3
    )
    engine.run()
    lines = read_log(tmp_path)
    assert len(lines) == 30 and lines[-1]["l_sharp"] < 0.7 * lines[0]["l_sharp"]
    monkeypatch.setitem(registry.METHODS, "deblur", "deblur")
    assert load_run(tmp_path).student.settings == {"width": 64}
    sys.modules.pop("deblur")


def test_the_guides_file_names_keys_of_train_yaml():
    complete = yaml.safe_load(
        (REPO / "bundles/alice_pretrain/configs/train.yaml").read_text(encoding="utf-8")
    )
    check_keys(complete, yaml.safe_load(blocks()["yaml"]), "the guide")
