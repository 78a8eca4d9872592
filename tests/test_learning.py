"""What a recipe promises to learn, on synthetic torsos that nobody trained on."""

import pytest
from conftest import REPO
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from custom.cli.main import main as alice
from custom.engine.run_log import read_log

CONFIGS = REPO / "bundles" / "alice_pretrain" / "configs"


@pytest.mark.slow
def test_sixty_steps_do_not_end_below_the_untrained_encoder(tmp_path):
    """The trial of the README's table, train.yaml and smoke.yaml as they stand: a minute on one core."""
    alice(["phantom", str(tmp_path / "scans"), "--n", "12", "--size", "small", "--canonical", "False"])
    workflow = ConfigWorkflow(
        [str(CONFIGS / "train.yaml"), str(CONFIGS / "smoke.yaml")],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "run"),
        workers=0,
    )
    workflow.initialize()
    workflow.run()
    set_determinism(None)
    probed = [line for line in read_log(tmp_path / "run") if "probe/linear" in line]
    first, last = probed[0], probed[-1]
    assert (first["step"], last["step"]) == (0, 60)
    assert last["probe/linear"] > first["probe/linear"] + 0.03  # 0.255 and 0.333 when it was written
    assert last["probe/retrieval"] >= first["probe/retrieval"]  # 0.51 and 0.57
    assert last["probe/place_mm"] < first["probe/place_mm"] + 1  # 63.2 and 61.1
