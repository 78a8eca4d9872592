"""The ``alice`` command: chores that are no bundle workflow."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from tqdm import tqdm

from custom.preflight import plain_message


def phantom(folder: str, n: int = 24, seed: int = 0, size: str = "standard", canonical: bool = True) -> None:
    """Write a cohort of synthetic CT-like torsos with labels and exact correspondence.

    Args:
        folder: to write, in FLARE22's layout (images/, labels/).
        n: subjects.
        seed: of the whole cohort.
        size: standard, or small for trials.
        canonical: also write the dense correspondence of every subject.
    """
    from custom.data.phantom import write_cohort

    with tqdm(total=n, desc="phantoms") as bar:
        write_cohort(
            Path(folder),
            n,
            seed,
            size=size,
            canonical=canonical,
            progress=lambda done, total: bar.update(done - bar.n),
        )


def scan(
    folder: str,
    o: str = "manifest.json",
    report: str | None = None,
    against: Sequence[str] = (),
    profile: str = "ct",
    min_slices: int = 16,
    patient_pattern: str | None = None,
    hash_ids: bool = True,
    salt: str | None = None,
    workers: int = 4,
) -> None:
    """Say what is in a folder: which scans can be used, which cannot and why; resumable. Exit code 0, 1 or 2.

    Args:
        folder: of NIfTI, NRRD, MetaImage, and DICOM.
        o: the manifest to write.
        report: an HTML page to write.
        against: other manifests or datalists to check for leakage.
        profile: of intensities, ct or mr.
        min_slices: fewer make no volume.
        patient_pattern: regular expression on the path; its first group is the patient.
        hash_ids: write salted hashes instead of patients' identifiers.
        salt: of those hashes, to compare manifests.
        workers: processes.
    """
    from custom.data.manifest import exit_code, scan_folder, summary

    made = scan_folder(
        folder,
        output=o,
        against=[against] if isinstance(against, str) else list(against),
        profile=profile,
        min_slices=min_slices,
        patient_pattern=patient_pattern,
        hash_ids=hash_ids,
        salt=salt,
        workers=workers,
    )
    print(summary(made))
    if report:
        from custom.data.intake_page import intake_page

        intake_page(made).write(report)
    sys.exit(exit_code(made))


def build(
    source: str,
    store: str,
    spacing: Sequence[float] = (1.5, 1.5, 2.0),
    bad_scans_allowed: int = 0,
    workers: int = 4,
    patient_pattern: str | None = None,
    check: bool = False,
) -> None:
    """Bring a folder of scans (or a datalist JSON) onto one grid, ready to be read crop by crop; resumable.

    Args:
        source: folder, datalist, or manifest of alice scan.
        store: folder to write.
        spacing: mm along x, y, z, as "[1.5,1.5,2.0]".
        bad_scans_allowed: unusable scans to skip.
        workers: processes.
        patient_pattern: regular expression on the path; its first group is the patient.
        check: decode every volume afterwards and compare checksums.
    """
    from custom.data.build import build_store

    made = build_store(source, store, spacing, bad_scans_allowed, workers, patient_pattern)
    patients = {made.patient(name) for name in made.names}
    print(f"{store}: {len(made)} volumes of {len(patients)} patients at {list(made.spacing)} mm.")
    if check and (faults := made.check()):
        raise ValueError("Damaged: " + "; ".join(f"{name}: {fault}" for name, fault in faults.items()))


def embed(
    scans: str,
    out: str,
    weights: str = "bundles/sam_landmarks/models/model.safetensors",
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Write one compact embedding per scan, for the aligner ``sam``; resumable.

    Args:
        scans: a store (of alice build), a folder of scans, or a datalist.
        out: folder to write.
        weights: a .safetensors of ours, or the authors' SAM.pth.
        device: cpu or cuda.
        overwrite: replace what was made with other weights or from other voxels.
    """
    from custom.data.store import VolumeStore, sha256_of_file
    from custom.landmarks.embeddings import embed_folder, embed_store
    from custom.landmarks.weights import load_sam_weights, read_sam_metadata
    from custom.transfer.official import load_sam

    ours = weights.endswith(".safetensors")
    network = (load_sam_weights(weights) if ours else load_sam(weights)).to(device)
    threshold = read_sam_metadata(weights).get("threshold") if ours else None
    digest = sha256_of_file(Path(weights))
    if (Path(scans) / "index.json").is_file():
        written = embed_store(
            network, digest, VolumeStore(scans), out, threshold=threshold, overwrite=overwrite
        )
    else:
        written = embed_folder(network, digest, scans, out, threshold=threshold, overwrite=overwrite)
    for saved in written:
        print(
            f"{saved.path}: {saved.num_bytes / 2**20:.1f} MiB, mean cosine to float32 {saved.mean_cosine:.5f}"
        )
    print(f"{out}: {len(written)} written.")


def check_alignment(
    store: str,
    out: str,
    embeddings: str | None = None,
    aligners: Sequence[str] = ("coordinate", "random"),
    pairs: int = 20,
    points: int = 20,
    seed: int = 0,
    phantoms: str | None = None,
    landmarks: str | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Measure aligners on a store: label transfer, centroids, cycle error, and what truth there is; with a gallery.

    Args:
        store: of alice build.
        out: folder for table.csv, index.html and pictures.
        embeddings: of alice embed; adds the aligner sam.
        aligners: among coordinate, affine, random.
        pairs, points: scan pairs, and points in each.
        seed: of all draws.
        phantoms: the cohort the store was built from, for its exact correspondence.
        landmarks: CSV of scan,landmark,x,y,z in mm.
        names: scans to draw from.
    """
    from custom.data.store import VolumeStore
    from custom.landmarks import quality
    from custom.landmarks.aligners import make_aligner

    volumes = VolumeStore(store)
    chosen = {
        name: make_aligner(name, volumes) for name in ([aligners] if isinstance(aligners, str) else aligners)
    }
    if embeddings:
        chosen = {"sam": make_aligner("sam", volumes, embeddings)} | chosen
    truth = quality.phantom_truth(volumes, Path(phantoms)) if phantoms else None
    rows = quality.check_alignment(
        volumes,
        chosen,
        out,
        pairs=pairs,
        points=points,
        seed=seed,
        names=names,
        truth=truth,
        landmark_csv=landmarks,
    )
    headers, cells = quality.table_cells(rows)
    for line in (headers, *cells):
        print(" | ".join(str(cell) for cell in line))
    print(f"{Path(out) / 'index.html'}")


def export(run: str, to: str = "encoder.safetensors", half: bool = False) -> None:
    """Write the online encoder of a run, ready for ``load_encoder`` and stock MONAI networks.

    Args:
        run: the run's output_dir, or one of its checkpoints.
        to: a .safetensors (with metadata inside) or .pt file (with a .json beside it).
        half: store float16, for a file of half the size.
    """
    from custom.alice.run_folder import load_run
    from custom.transfer.encoder_weights import save_encoder

    loaded = load_run(run)
    private = ("held_back", "store_dir")  # names of scans and folders stay with the run
    metadata = {k: v for k, v in loaded.summary.items() if k not in private} | {
        "trained_iterations": loaded.iteration
    }
    written = save_encoder(to, loaded.student.encoder.encoder, metadata, half)
    print(
        f"{to}: {written['network_type']} after {loaded.iteration} iterations, sha256 {written['sha256'][:16]}..."
    )


def probe(
    run: str, store: str | None = None, names: Sequence[str] | None = None, device: str = "cpu"
) -> None:
    """Measure a run's frozen encoder on held-back scans, beside an untrained twin.

    Args:
        run: the run's output_dir, or one of its checkpoints.
        store: other than the one it was trained from.
        names: scans to measure on; the run's held-back ones by default.
        device: cpu or cuda.
    """
    from custom.alice.run_folder import load_run
    from custom.data.store import VolumeStore
    from custom.encoders.tokens import token_encoder
    from custom.evaluation.probe import encoder_probe
    from custom.transfer.encoder_weights import build_encoder

    loaded = load_run(run)
    volumes = VolumeStore(store or loaded.summary["store_dir"])
    chosen = list(names or loaded.summary["held_back"])
    measure = encoder_probe(
        volumes,
        chosen,
        crop_size=loaded.summary["crop_size"],
        window_hu=loaded.summary["window_hu"],
        device=device,
    )
    if measure is None:
        raise ValueError(
            f"{chosen or 'No scan'}: a probe needs scans of two patients. Name some with --names."
        )
    torch.manual_seed(loaded.summary["seed"])
    untrained = token_encoder(build_encoder(loaded.summary)).eval().to(device)
    rows = {
        "untrained": measure(untrained),
        f"step {loaded.iteration}": measure(loaded.student.encoder.to(device)),
    }
    for name, values in rows.items():
        print(f"{name:<14}" + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(json.dumps(rows))


def picture(run: str, to: str = "picture.png") -> None:
    """Draw what a run has learnt: curves, a reconstruction, and one place found in another patient.

    Args:
        run: the run's output_dir.
        to: the PNG to write.
    """
    from custom.alice.branch import StudentBranch
    from custom.alice.picture import run_picture
    from custom.alice.run_folder import load_run
    from custom.alice.run_log import read_log
    from custom.data.pairs import PairDataset
    from custom.data.store import VolumeStore
    from custom.data.views import Masking
    from custom.landmarks.aligners import make_aligner

    loaded = load_run(run)
    summary, store = loaded.summary, VolumeStore(loaded.summary["store_dir"])
    if not isinstance(loaded.student, StudentBranch):
        raise ValueError(f"{run}: the official preset has no token decoder to draw from; use alice probe.")
    names = summary["held_back"] if len({store.patient(n) for n in summary["held_back"]}) > 1 else store.names
    pairs = PairDataset(
        store,
        make_aligner("coordinate", store),
        summary["crop_size"],
        summary["window_hu"],
        names=names,
        max_offset=0.0,
    )
    pair = pairs[0]
    units = loaded.student.encoder.units(tuple(summary["crop_size"]))
    hidden = Masking(summary["hidden_ratio"])(torch.tensor([0]), units)
    figure = run_picture(
        loaded.student, read_log(loaded.folder), pair["crop_q"][None], pair["crop_k"][None], hidden
    )
    figure.suptitle(
        f"{summary['network_type']} after {loaded.iteration} of {summary['iterations']} iterations, {summary['scans']} scans"
    )
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)
    print(f"{to}: {pair['scan_q']} and {pair['scan_k']}")


def profile(config: str | Sequence[str], steps: int = 8, **overrides: Any) -> None:
    """Time the parts of a training step: loader, transfer, views, online, decoder, target, losses, backward, ...

    Args:
        config: a bundle's train.yaml, or "['train.yaml','smoke.yaml']".
        steps: steps to time, after two of warm-up.
        overrides: of the config, as in ``monai.bundle run`` (--dataset_dir DIR --batch_size 4).
    """
    from monai.bundle import ConfigParser, ConfigWorkflow

    from custom.alice.profile import StepProfile
    from custom.preflight import check_keys

    files = [config] if isinstance(config, str) else list(config)
    check_keys(ConfigParser.load_config_file(files[0]), overrides, "the command line")
    with tempfile.TemporaryDirectory() as folder:
        asked = ConfigWorkflow(files, workflow_type="train", logging_file=False, **overrides)
        store = overrides.get("store_dir") or asked.parser.get_parsed_content("store_dir")
        quiet = {
            "output_dir": folder,
            "store_dir": store,
            "iterations": steps + 2,
            "warmup": 0,
            "checkpoint_every": 0,
        }
        quiet |= {"probe_every": steps + 9, "monitor_every": steps + 9, "probe": None, "resume": False}
        workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **(overrides | quiet))
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train::trainer")
        timed = StepProfile(skip=2)
        timed.attach(trainer)
        trainer.run()
    print(f"{'section':<10}{'ms a step':>12}{'share':>8}")
    for name, (milliseconds, share) in timed.shares().items():
        print(f"{name:<10}{milliseconds:>12.1f}{share:>8.1%}")


COMMANDS: dict[str, Any] = {
    "phantom": phantom,
    "scan": scan,
    "build": build,
    "embed": embed,
    "check-alignment": check_alignment,
    "export": export,
    "probe": probe,
    "picture": picture,
    "profile": profile,
}


def main() -> None:
    """Run a command; what a user can mend is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        fire.Fire(COMMANDS, name="alice")
    except Exception as error:
        message = plain_message(error)
        if message is None:
            raise
        print(f"alice: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
