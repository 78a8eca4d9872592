"""The ``alice`` command: chores that are no bundle workflow."""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire
import torch
from tqdm import tqdm

from custom.preflight import plain_message
from custom.processes import default_workers

if TYPE_CHECKING:
    from custom.alice.run_folder import Run
    from custom.data.store import VolumeStore
    from custom.transfer.bundle_network import Deployable


def phantom(
    folder: str,
    n: int = 24,
    seed: int = 0,
    size: str = "standard",
    canonical: bool = True,
    labels: str = "flare22",
) -> None:
    """Write a cohort of synthetic CT-like torsos with labels and exact correspondence.

    Args:
        folder: to write, in the layout of the labels' data set (images/, labels/; or imagesTr/, labelsTr/).
        n: subjects.
        seed: of the whole cohort.
        size: standard, or small for trials.
        canonical: also write the dense correspondence of every subject.
        labels: flare22 or btcv, whose organs are labelled, in whose order.
    """
    from custom.data.phantom import write_cohort

    with tqdm(total=n, desc="phantoms") as bar:
        write_cohort(
            Path(folder),
            n,
            seed,
            size=size,
            canonical=canonical,
            labels=labels,
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
    workers: int | None = None,
) -> None:
    """Say what is in a folder: which scans can be used, which cannot and why; resumable. Exit code 0, 3 or 4 (1: it failed).

    Args:
        folder: of NIfTI, NRRD, MetaImage, and DICOM.
        o: the manifest to write.
        report: an HTML page to write.
        against: other manifests or datalists to check for leakage.
        profile: of intensities, ct, mr or zscore.
        min_slices: fewer make no volume.
        patient_pattern: regular expression on the path; its first group is the patient.
        hash_ids: write salted hashes instead of patients' identifiers.
        salt: of those hashes, to compare manifests.
        workers: processes; by default as many as there are cores, at least 2, at most 4.
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
        workers=default_workers() if workers is None else workers,
    )
    print(summary(made))
    if report:
        from custom.data.intake_page import intake_page

        intake_page(made).write(report)
    sys.exit(exit_code(made))


def build(
    source: str | None = None,
    store: str | None = None,
    spacing: Sequence[float] = (1.5, 1.5, 2.0),
    bad_scans_allowed: int = 0,
    workers: int | None = None,
    patient_pattern: str | None = None,
    check: bool | str = False,
    o: str | None = None,
    profile: str | None = None,
    crop_body: bool | None = None,
    margin_mm: float | None = None,
    remove_table: bool | None = None,
    part: str | None = None,
    check_disk: bool = True,
) -> None:
    """Bring a folder of scans (or a datalist JSON) onto one grid, ready to be read crop by crop; resumable.

    Args:
        source: folder, datalist, or manifest of alice scan.
        store: folder to write.
        spacing: mm along x, y, z, as "[1.5,1.5,2.0]".
        bad_scans_allowed: unusable scans to skip.
        workers: processes; by default as many as there are cores, at least 2, at most 4.
        patient_pattern: regular expression on the path; its first group is the patient.
        check: decode every volume (afterwards) and compare checksums; alice build --check STORE builds nothing.
        o: the same as store.
        profile: of intensities, ct, mr or zscore; the manifest's by default.
        crop_body: cut volumes to the body's box; the default.
        margin_mm: of air kept around that box; 10 by default.
        remove_table: make air of what lies off the body.
        part: i/n, to build on n machines; the last one, or a plain build, writes the index.
        check_disk: refuse a disk that is too small before anything is written.
    """
    from custom.data.build import build_part, build_store
    from custom.data.store import VolumeStore

    store = store or o
    only = check if isinstance(check, str) else source if check and source and not store else None
    if only is not None and not (isinstance(check, str) and source and store):
        if source and only != source:
            raise ValueError(f"--check {only} builds nothing; leave out {source}.")
        _check_store(VolumeStore(only))
        return
    if not source or not store:
        raise ValueError(
            "Give what to build and where: alice build SCANS STORE; or alice build --check STORE."
        )
    asked: dict[str, Any] = {
        "profile": profile,
        "crop_body": crop_body,
        "margin_mm": margin_mm,
        "remove_table": remove_table,
    }
    if part is None:
        made: VolumeStore | None = build_store(
            source,
            store,
            spacing,
            bad_scans_allowed,
            default_workers() if workers is None else workers,
            patient_pattern,
            check_disk=check_disk,
            **asked,
        )
    else:
        made = build_part(
            source,
            store,
            str(part),
            spacing,
            bad_scans_allowed,
            default_workers() if workers is None else workers,
            patient_pattern,
            check_disk=check_disk,
            **asked,
        )
    if made is None:
        print(f"{store}: part {part} is done; the index is written when the other parts are.")
        return
    patients = {made.patient(name) for name in made.names}
    print(f"{store}: {len(made)} volumes of {len(patients)} patients at {list(made.spacing)} mm.")
    if check:
        _check_store(made)


def _check_store(store: VolumeStore) -> None:
    """Print what is wrong, by file; exit code 1 if anything is."""
    number = 0
    for _, fault in tqdm(store.faults(), desc="check", unit=" fault", disable=None):
        number += 1
        print(fault)
    print(
        f"{store.path}: {len(store)} volumes, {f'{number} damaged file(s)' if number else 'all as they were written'}."
    )
    if number:
        sys.exit(1)


def embed(
    scans: str,
    out: str,
    weights: str = "bundles/sam_landmarks/models/model.safetensors",
    device: str = "cpu",
    overwrite: bool = False,
    allow_profile: bool = False,
    bits: int | None = None,
) -> None:
    """Write one compact embedding per scan, for the aligner ``sam``; resumable.

    Args:
        scans: a store (of alice build), a folder of scans, or a datalist.
        out: folder to write.
        weights: a .safetensors of ours, or the authors' SAM.pth.
        device: cpu or cuda.
        overwrite: replace what was made with other weights or from other voxels.
        allow_profile: embed a store of another profile than ct, which SAM was not trained on.
        bits: 4 to 8 bits a number; by default 4 of the published network's 128, 7 of a compact one's 32, and what is there
            already stays.
    """
    from custom.data.remote import is_url
    from custom.data.store import VolumeStore, sha256_of_file
    from custom.landmarks.embeddings import embed_folder, embed_store
    from custom.landmarks.weights import load_sam_weights, read_sam_metadata
    from custom.transfer.official import load_sam

    ours = weights.endswith(".safetensors")
    network = (load_sam_weights(weights) if ours else load_sam(weights)).to(device)
    threshold = read_sam_metadata(weights).get("threshold") if ours else None
    # of the tensors: a threshold noted later leaves embeddings valid
    digest = read_sam_metadata(weights)["sha256"] if ours else sha256_of_file(Path(weights))
    if is_url(scans) or (Path(scans) / "index.json").is_file():
        written = embed_store(
            network,
            digest,
            VolumeStore(scans),
            out,
            threshold=threshold,
            overwrite=overwrite,
            allow_profile=allow_profile,
            fine_bits=bits,
        )
    else:
        written = embed_folder(
            network, digest, scans, out, threshold=threshold, overwrite=overwrite, fine_bits=bits
        )
    for saved in written:
        print(
            f"{saved.path}: {saved.num_bytes / 2**20:.1f} MiB, cosine to float32 {saved.mean_cosine:.5f} on average, "
            f"{saved.lowest_cosine:.5f} at worst"
        )
    print(f"{out}: {len(written)} written.")


def calibrate(
    store: str,
    embeddings: str,
    held_back: str,
    weights: str | None = None,
    pairs: int = 60,
    points: int = 25,
    reach_mm: float = 10.0,
    share: float = 0.9,
    seed: int = 0,
) -> None:
    """Find the score that a match of ``sam`` must have, on scans held back from its training; and keep it.

    Args:
        store: of alice build.
        embeddings: of alice embed; the score is kept with them,
        held_back: regular expression on the names of the scans to use.
        weights: and noted in this .safetensors, if it is given.
        pairs: ordered pairs of scans.
        points: in each of them.
        reach_mm: how far from its start a match may come back.
        share: of the matches of any score above it that must come back so near.
        seed: of the draws.
    """
    from custom.data.store import VolumeStore
    from custom.landmarks.aligners import SamAligner, calibrate_threshold
    from custom.landmarks.embedding_folder import EmbeddingFolder
    from custom.landmarks.weights import note_in_weights, read_sam_metadata

    volumes, made = VolumeStore(store), EmbeddingFolder(embeddings)
    if weights and read_sam_metadata(weights)["sha256"] != made.weights_sha256:
        raise ValueError(f"{embeddings}: made with other weights than {weights}.")
    names = [name for name in volumes.names if re.search(held_back, name)]
    if len({volumes.patient(name) for name in names}) < 2:
        raise ValueError(
            f"{store}: {held_back!r} is in the names of {len(names)} scans, and a score is calibrated on pairs of two patients'. "
            f"Scans are called {', '.join(volumes.names[:3])}, ... (alice scan --hash_ids False keeps the files' names)."
        )
    found = calibrate_threshold(
        SamAligner(volumes, made, threshold=0.0),
        volumes,
        names,
        num_pairs=pairs,
        num_points=points,
        reach_mm=reach_mm,
        share=share,
        seed=seed,
    )
    print(f"| score | accepted | come back within {reach_mm:g} mm | points |\n|---|---|---|---|")
    for row in found.rows:
        if row["points"]:
            print(f"| {row['score']:.3f} | {row['accepted']:.0%} | {row['within']:.0%} | {row['points']} |")
    if found.threshold is None:
        raise ValueError(
            f"No score makes {share:.0%} of the matches come back within {reach_mm:g} mm: nothing was kept. Ask for less "
            "(share, reach_mm), or train the network longer."
        )
    made.keep_threshold(found.threshold)
    if weights:
        note_in_weights(
            weights,
            {"threshold": found.threshold, "threshold_share": share, "threshold_reach_mm": reach_mm},
        )
    print(f"threshold {found.threshold}, kept in {embeddings}{f' and {weights}' if weights else ''}")


def check_alignment(
    store: str,
    out: str,
    embeddings: str | None = None,
    aligners: Sequence[str] = ("affine", "coordinate", "random"),
    pairs: int = 20,
    points: int = 20,
    seed: int = 0,
    phantoms: str | None = None,
    landmarks: str | None = None,
    names: Sequence[str] | None = None,
    warps: int = 0,
    weights: str = "bundles/sam_landmarks/models/model.safetensors",
) -> None:
    """Measure aligners on a store: label transfer, centroids, cycle error, and what truth there is; with a gallery.

    Args:
        store: of alice build.
        out: folder for table.csv, index.html and pictures.
        embeddings: of alice embed; adds the aligners sam and sam_nearest.
        aligners: among affine (a registration of each pair, seconds), coordinate, random.
        pairs: of scans.
        points: in each of them.
        seed: of all draws.
        phantoms: the cohort the store was built from, for its exact correspondence.
        landmarks: CSV of scan,landmark,x,y,z in mm.
        names: scans to draw from.
        warps: so many of the scans are deformed by a known smooth map too, and each aligner has to find the way back:
            a truth that needs no label.
        weights: of SAM, to embed the deformed scans; those of ``embeddings``.
    """
    from custom.data.store import VolumeStore
    from custom.landmarks import quality
    from custom.landmarks.aligners import Aligner, make_aligner
    from custom.landmarks.alignment_page import table_cells
    from custom.landmarks.embedding_folder import EmbeddingFolder
    from custom.landmarks.truth import phantom_truth
    from custom.landmarks.weights import read_sam_metadata

    volumes = VolumeStore(store)
    asked = dict.fromkeys([*(("sam", "sam_nearest") if embeddings else ()), *_words(aligners)])
    names = _words(names) if names is not None else None

    def made(scans: VolumeStore, embedded: str | Path | None) -> dict[str, Aligner]:
        return {
            name: make_aligner(name, scans, embedded if name.startswith("sam") else None) for name in asked
        }

    chosen = made(volumes, embeddings)
    more = []
    if (
        warps
        and embeddings
        and read_sam_metadata(weights)["sha256"] != EmbeddingFolder(embeddings).weights_sha256
    ):
        raise ValueError(
            f"{embeddings}: made with other weights than {weights}, which would embed the deformed scans: give --weights."
        )
    if warps:
        deformed = (volumes.names if names is None else names)[:warps]
        more = quality.warp_rows(
            volumes, deformed, made, out, weights if embeddings else None, num_points=5 * points, seed=seed
        )
    truth = phantom_truth(volumes, Path(phantoms)) if phantoms else None
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
        more=more,
    )
    headers, cells = table_cells(rows)
    for line in (headers, *cells):
        print(" | ".join(str(cell) for cell in line))
    print(f"{Path(out) / 'index.html'}")


def _words(value: str | Sequence[str]) -> list[str]:
    """Of a list, or of text with commas: fire makes a list only of words without hyphens."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


def export(
    run: str,
    to: str = "encoder.safetensors",
    half: bool = False,
    o: str | None = None,
    weights: str | None = None,
    config: Sequence[str] = (),
    tolerance: float | None = None,
    img_size: Sequence[int] | None = None,
) -> None:
    """Write a run's encoder for stock MONAI networks, or a bundle's network as TorchScript, ONNX or OpenVINO.

    Args:
        run: a run's output_dir, or one of its checkpoints; or a bundle's folder.
        to: a .safetensors (with metadata inside) or .pt file (with a .json beside it) for the encoder of a run;
            torchscript, onnx or openvino for a whole network: a bundle's, or a run's encoder as a map of features.
        half: store float16 (encoder, openvino), for a file of half the size.
        o: the file for torchscript (.ts), onnx (.onnx), openvino (.xml); by default in the bundle's models/.
        weights: other than the bundle's models/model.pt.
        config: files on top of the bundle's inference config, as swin_unetr.yaml.
        tolerance: largest difference to the original network, over its largest output; 1e-3, or 1e-2 with half.
        img_size: of the encoder: crops of fine-tuning, "[96,96,96]"; its position table is interpolated to them, as
            ``pretrained`` of the segmentation bundles needs it.
    """
    from custom.transfer import bundle_network, deploy

    folder = Path(run)
    if to not in deploy.SUFFIXES:
        if bundle_network.is_bundle(folder):
            raise ValueError(f"{run}: is a bundle; export it with --to torchscript, onnx or openvino.")
        if o or weights or config or tolerance is not None:
            raise ValueError(
                f"-o, --weights, --config and --tolerance go with --to torchscript, onnx or openvino, not {to!r}."
            )
        _export_encoder(run, to, half, img_size)
        return
    if img_size is not None:
        raise ValueError("--img_size goes with an encoder's weights (--to encoder.pt), which have positions.")
    if bundle_network.is_bundle(folder):
        overrides = [config] if isinstance(config, str) else list(config)
        network = bundle_network.read_bundle(folder, weights, overrides)
        models, stem = folder / "models", "model"
    elif weights or config:
        raise ValueError(
            f"{run}: is no bundle, and a run knows its network: leave --weights and --config out."
        )
    else:
        network, models, stem = _run_network(run), folder.parent if folder.is_file() else folder, "encoder"
    path = Path(o) if o else models / f"{stem}{deploy.SUFFIXES[to]}"
    found = deploy.export_network(network, to, path, half=half, tolerance=tolerance)
    print(f"{path}: {found}; weights sha256 {network.metadata['sha256'][:16]}...")


def _export_encoder(run: str, to: str, half: bool, img_size: Sequence[int] | None) -> None:
    """The online encoder's weights, ready for ``load_encoder``."""
    from custom.alice.run_folder import load_run
    from custom.transfer.encoder_weights import resize_encoder, save_encoder

    loaded = load_run(run)
    encoder, about = loaded.student.encoder.encoder, _shareable(loaded)
    if img_size is not None:
        encoder = resize_encoder(encoder, about["network"], img_size)
        about |= {"network": about["network"] | {"img_size": list(img_size)}}
    written = save_encoder(to, encoder, about, half)
    print(
        f"{to}: {written['network_type']} after {loaded.iteration} iterations, sha256 {written['sha256'][:16]}..."
    )


def _run_network(run: str) -> Deployable:
    """The online encoder of a run as a network of its own."""
    from custom.alice.run_folder import load_run
    from custom.encoders.features import FeatureMap
    from custom.transfer.bundle_network import Deployable
    from custom.transfer.encoder_weights import sha256_of

    loaded = load_run(run)
    encoder = loaded.student.encoder.encoder
    channels = loaded.summary["network"].get("in_channels", 1)
    about = _shareable(loaded) | {"sha256": sha256_of(encoder.state_dict())}
    return Deployable(FeatureMap(encoder).eval(), (channels, *loaded.summary["crop_size"]), about)


def _shareable(loaded: Run) -> dict[str, Any]:
    """A run's summary without the names of scans and folders, which stay with the run."""
    private = ("held_back", "store_dir")
    kept = {key: value for key, value in loaded.summary.items() if key not in private}
    return kept | {"trained_iterations": loaded.iteration}


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


def datalist(
    source: str,
    o: str = "datalist.json",
    classes: str = "flare22",
    folds: int = 5,
    seed: int = 0,
    patient_pattern: str | None = None,
    allow_empty: bool = False,
) -> None:
    """Check a folder of images and labels, and write it as a datalist with folds; nothing, if a case is faulty.

    Args:
        source: folder (FLARE22, BTCV, MSD, CASE_seg beside CASE, ...), or a datalist without folds.
        o: the JSON to write; paths in it are relative to its folder.
        classes: flare22, btcv, or names in label order, "liver,spleen".
        folds: the patients are dealt into so many; 0 deals none.
        seed: of the deal, and of the few-shot order.
        patient_pattern: regular expression on the path; its first group is the patient.
        allow_empty: let labels pass that hold no organ.
    """
    from custom.evaluation.datalists import make_datalist, write_datalist
    from custom.evaluation.rules import BTCV_ORGANS, FLARE22_ORGANS

    known = {"flare22": FLARE22_ORGANS, "btcv": BTCV_ORGANS}
    names = classes.split(",") if isinstance(classes, str) else list(classes)
    with tqdm(desc="cases") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = make_datalist(
            source,
            Path(o).parent,
            classes=known.get(str(classes), names),
            folds=folds,
            seed=seed,
            patient_pattern=patient_pattern,
            allow_empty=allow_empty,
            progress=progress,
        )
    if made.problems:
        raise ValueError("; ".join(made.problems))
    write_datalist(o, made.content)
    patients = {record["patient"] for record in made.content["training"]}
    print(f"{o}: {made.content['numTraining']} cases of {len(patients)} patients in {folds} folds.")


def score(
    predictions: str,
    references: str,
    rules: str = "flare22",
    o: str = "rows.csv",
    names: str | Sequence[str] | None = None,
    tolerance: float | Sequence[float] | None = None,
    cases: str | Sequence[Any] | None = None,
    fold: int | None = None,
    split: str | None = None,
    seed: int | None = None,
) -> None:
    """Score label maps against references on the original grid, per case and organ; a missing one counts as 0.

    Args:
        predictions: folder of label maps named after their case (CASE.nii.gz, CASE_seg.nii.gz, ...).
        references: folder or datalist of label maps; decides which cases there are.
        rules: flare22, btcv or plain.
        o: the CSV to write.
        names: of plain: organs in label order, "liver,spleen", or a bundle's metadata.json.
        tolerance: of plain: mm of the NSD (2 by default), one for all or one per organ.
        cases: only these, "case1,case2", or a text file with one a line.
        fold: kept in the rows; with a split, or a datalist that has folds, only its cases are scored.
        split: a bundle's folds.json.
        seed: of the training, kept in the rows.
    """
    from custom.evaluation.rows import write_rows
    from custom.evaluation.scoring import make_rule, read_cases, score_folder, score_markdown

    rule = make_rule(rules, names, tolerance)
    with tqdm(desc="cases") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        scored = score_folder(
            predictions,
            references,
            rule,
            cases=read_cases(cases),
            fold=fold,
            split=split,
            seed=seed,
            progress=progress,
        )
    write_rows(o, scored.rows)
    print(score_markdown(scored, rule))
    print(o)


def compare(
    a: str,
    b: str,
    o: str | None = None,
    metrics: str | Sequence[str] | None = None,
    name_a: str | None = None,
    name_b: str | None = None,
    common: bool = False,
    images: str | None = None,
    references: str | None = None,
    predictions_a: str | None = None,
    predictions_b: str | None = None,
    worst: int = 6,
) -> None:
    """Compare run B with run A: paired differences with intervals and tests, per organ and overall.

    Args:
        a, b: rows.csv of alice score, or folders holding one per fold (and seed).
        o: folder to write, with comparison.md and index.html.
        metrics: among dsc, nsd, hd95; by default all that were measured.
        name_a, name_b: what the runs are.
        common: compare what both scored, where the runs differ in cases.
        images, references, predictions_a, predictions_b: folders; all four show the worst cases on the page.
        worst: how many of them.
    """
    from custom.evaluation.comparison import compare_runs
    from custom.evaluation.worst_cases import make_pictures

    made = compare_runs(
        a,
        b,
        o,
        metrics=metrics.split(",") if isinstance(metrics, str) else metrics,
        name_a=name_a,
        name_b=name_b,
        common=common,
        pictures=make_pictures(
            o,
            images=images,
            references=references,
            predictions_a=predictions_a,
            predictions_b=predictions_b,
        ),
        worst=worst,
    )
    print(made.markdown)
    for path in made.written:
        print(path)
    if o and not images:
        print(
            "The page shows the worst cases with --images, --references, --predictions_a and --predictions_b."
        )


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


def estimate(
    config: str | Sequence[str],
    measure: bool | None = None,
    processes: int = 1,
    json: str | bool = False,
    **overrides: Any,
) -> None:
    """Say what a pre-training run will take: disk, memory, samples a second, hours; nothing is built or trained.

    Args:
        config: a bundle's train.yaml, or "['train.yaml','swin.yaml']".
        measure: time a few steps on this device; without it they are timed where that is cheap.
        processes: GPUs of the run.
        json: write it as JSON: to a file of this name, or to the terminal.
        overrides: of the config, as in ``monai.bundle run`` (--dataset_dir DIR --batch_size 4).
    """
    from custom.estimate import estimate as estimate_run
    from custom.estimate import to_json

    files = [config] if isinstance(config, str) else list(config)
    made = estimate_run(files, overrides, measure, processes)
    if json is True:
        print(to_json(made))
        return
    print(made.table())
    if json:
        Path(json).write_text(to_json(made) + "\n", encoding="utf-8")


COMMANDS: dict[str, Any] = {
    "phantom": phantom,
    "scan": scan,
    "build": build,
    "embed": embed,
    "calibrate": calibrate,
    "check-alignment": check_alignment,
    "export": export,
    "probe": probe,
    "datalist": datalist,
    "score": score,
    "compare": compare,
    "picture": picture,
    "profile": profile,
    "estimate": estimate,
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
