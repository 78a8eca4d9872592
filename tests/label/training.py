"""Fine-tuning through the server, and what it must leave alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
from facts import Facts, check_weights
from server import LabelServer
from studies import write_label


def check_training(
    facts: Facts, server: LabelServer, labels: dict[str, int], epochs: int, scratch: Path
) -> bool:
    """Annotate all studies and fine-tune as 3D Slicer does, with every option offered and an empty run_id."""
    for image in sorted(server.studies.glob("*.nii*")):
        name = image.name.split(".nii")[0]
        write_label(image, list(labels.values()), scratch / "label.nii.gz")
        answer = server.put_label(name, scratch / "label.nii.gz")
        facts(answer.status_code == 200, f"{name}: the label is stored", answer.text[:200])
    models = server.bundle / "models"
    before = {path.name: _sha256(path) for path in models.iterdir()}
    offered = server.get("/info/").json()["trainers"][server.name]["config"]
    options = {k: v[0] if isinstance(v, list) and v else v for k, v in offered.items()}
    options |= {"device": "cpu", "max_epochs": epochs, "val_split": 0.25, "tracking": "None", "run_id": ""}
    task = server.train({**options, "model_filename": "model.pt"})
    told = [line for line in task.get("details", []) if "Error" in line] or list(task.get("details", []))[-3:]
    if not facts(task.get("status") == "DONE", "fine-tuning is done", (task.get("status"), told)):
        return False
    after = {path.name: _sha256(path) for path in models.iterdir()}
    facts(
        all(after.get(k) == v for k, v in before.items()), "what was in models/ is as before", sorted(after)
    )
    news = sorted(after.keys() - before)
    if not facts("model_finetuned.pt" in news, "fine-tuning writes model_finetuned.pt", news):
        return False
    check_weights(facts, server.bundle, "model_finetuned.pt")
    return facts(after["model_finetuned.pt"] != before["model.pt"], "model_finetuned.pt holds other weights")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_after_training(facts: Facts, server: LabelServer, image: Path, mask: Path, scratch: Path) -> None:
    """The untouched weights still answer as before, and the new ones can be chosen."""
    name = image.name.split(".nii")[0]
    again = server.infer(name, {"model_filename": "model.pt", "device": "cpu"}, output="image")
    (scratch / "again.nii.gz").write_bytes(again.content)
    same = again.ok and np.array_equal(nib.load(scratch / "again.nii.gz").dataobj, nib.load(mask).dataobj)
    facts(same, "after it, model.pt gives the same mask as before", again.status_code)
    tuned = server.infer(name, {"model_filename": "model_finetuned.pt", "device": "cpu"}, output="image")
    facts(tuned.status_code == 200, "after it, model_finetuned.pt can be chosen", tuned.text[:300])
