"""Acceptance test of a segmentation bundle with the real MONAI Label server, over HTTP, as its viewers talk to it.

python tests/label/accept.py BUNDLE [--beside BUNDLE] [--studies FOLDER] [--images 2] [--epochs 1] [--keep FOLDER]

BUNDLE is an unpacked release zip, or a bundle of a checkout after ``make bundles``. With ``--beside`` the same server
serves another bundle, too.

Runs in the environment of ``setup.sh``, where nothing of this project is installed. Prints one line per fact; exit
status 1 if one does not hold. The bundle itself is copied, never changed. ``--epochs 0`` leaves fine-tuning out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from answers import (
    check_beside,
    check_description,
    check_masks,
    check_refusals,
    check_same_as_bundle_run,
)
from facts import Facts, check_weights
from server import LabelServer
from studies import write_studies
from training import check_after_training, check_training


def accept(
    bundle: Path, beside: Path | None, studies: Path | None, images: int, epochs: int, scratch: Path
) -> list[str]:
    """Run everything in ``scratch``; returns the facts that do not hold."""
    facts = Facts()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    channels = next(iter(metadata["network_data_format"]["outputs"].values()))["channel_def"]
    labels = {v.lower(): int(k) for k, v in channels.items() if v.lower() != "background"}
    served = scratch / "studies"
    if studies is None:
        write_studies(served)
    else:
        served.mkdir()
        for file in studies.glob("*.nii*"):
            shutil.copy(file, served)
    with LabelServer(bundle, served, scratch, beside) as server:
        facts(True, f"the server starts with {bundle.name}")
        check_description(facts, server, labels, metadata)
        check_weights(facts, server.bundle, "model.pt")
        chosen = sorted(served.glob("*.nii*"))[:images]
        answers = {image: check_masks(facts, server, image, labels, scratch) for image in chosen}
        masks = {image: mask for image, mask in answers.items() if mask}
        check_refusals(facts, server, scratch)
        if facts(bool(masks), "there are masks to compare"):
            check_same_as_bundle_run(facts, server, masks, scratch)
            if beside:
                check_beside(facts, server, beside.name, masks, labels, scratch)
            if epochs and check_training(facts, server, labels, epochs, scratch):
                check_after_training(facts, server, *next(iter(masks.items())), scratch)
        mismatch = [
            line for line in server.log.read_text(errors="replace").splitlines() if "keys don't match" in line
        ]
        facts(not mismatch, "the server never complains about the weights' names", mismatch[:1])
        if facts.failed:
            print(f"--- the server's last lines\n{server.last_lines()}")
    return facts.failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--beside", type=Path, help="another bundle for the same server")
    parser.add_argument("--studies", type=Path, help="folder of NIfTI scans; default: small synthetic ones")
    parser.add_argument("--images", type=int, default=2, help="how many scans to segment")
    parser.add_argument(
        "--epochs", type=int, default=1, help="epochs of fine-tuning on made-up labels, 0: none"
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    for weights in (b / "models" / "model.pt" for b in (bundle, options.beside) if b):
        if not weights.is_file():
            sys.exit(
                f"{weights}: no such file, so MONAI Label would leave the bundle out without a word. In a checkout: "
                "make bundles"
            )
    if options.studies and not any(options.studies.glob("*.nii*")):
        sys.exit(f"{options.studies}: no .nii or .nii.gz in this folder.")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.keep or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        failed = accept(
            bundle, options.beside, options.studies, options.images, options.epochs, scratch.resolve()
        )
    sys.exit(f"{bundle.name}: {len(failed)} facts do not hold" if failed else 0)


if __name__ == "__main__":
    main()
