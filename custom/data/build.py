"""Build a store from scans: read, check, orient, resample, compress; resumable, with a report of what was refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from custom.data.body import body_mask
from custom.data.dicom import read_series
from custom.data.manifest import Manifest
from custom.data.resample import resample, spacing_of, to_ras
from custom.data.scans import Scan, ScanError, check_hu, list_scans, read_volume
from custom.data.store import (
    StoreError,
    VolumeRecord,
    VolumeStore,
    read_index,
    sha256_of_array,
    sha256_of_file,
    volume_path,
    write_array,
    write_index,
    write_text,
)
from custom.processes import rank, wait_for_all

logger = logging.getLogger(__name__)


@dataclass
class Built:
    """One scan's outcome: a record, or what was wrong with it."""

    name: str
    record: VolumeRecord | None = None
    fault: str | None = None


def build_store(
    source: str | Path | Sequence[Scan],
    store: str | Path,
    spacing: Sequence[float] = (1.5, 1.5, 2.0),
    bad_scans_allowed: int = 0,
    workers: int = 1,
    patient_pattern: str | None = None,
    progress: bool = True,
) -> VolumeStore:
    """Bring every scan of a folder or datalist onto one grid.

    A volume that is there already, from the same file and settings, is kept, so a build that was interrupted
    goes on where it stopped.

    Args:
        source: folder, datalist JSON, or a list of scans.
        store: folder to write; made if missing.
        spacing: mm along x, y, z.
        bad_scans_allowed: how many scans may be unusable before the build is refused.
        workers: processes that read and resample.
        patient_pattern: see ``list_scans``.
        progress: show a bar.

    Returns:
        The finished store. ``report.json`` beside its index names every refused scan and why.

    Raises:
        ScanError: if more scans are unusable than allowed, or none is left; what is good stays built.
        StoreError: if the folder holds a store with other settings.
        ValueError: for a spacing that is no spacing.
    """
    if len(spacing) != 3 or not all(0.1 <= s <= 20 for s in spacing):
        raise ValueError(f"spacing must be three numbers of mm between 0.1 and 20, got {list(spacing)}.")
    store = Path(store)
    settings = {"spacing": [float(s) for s in spacing], "orientation": "RAS", "units": "HU"}
    known = _known(store, settings)
    if isinstance(source, (list, tuple)):
        scans = list(source)
    else:  # a store remembers how its patients were told apart
        patient_pattern = patient_pattern or known.get("patient_pattern")
        scans = _listed(Path(str(source)), patient_pattern)
    faults: dict[str, dict] = {n: f for n, f in known.get("refused", {}).items() if _same_file(f, n, scans)}
    tolerated = set(faults)
    records = _existing(store, settings, scans)
    todo = [s for s in scans if s.name not in tolerated and not _is_built(store, records.get(s.name), s)]
    store.mkdir(parents=True, exist_ok=True)
    for leftover in store.rglob("*.tmp"):  # of a build that was killed
        leftover.unlink(missing_ok=True)
    if todo:
        logger.info("Building %d of %d volumes in %s.", len(todo), len(scans), store)
    images = {scan.name: scan.image for scan in scans}
    hide = not progress or not todo
    for outcome in tqdm(
        _build_all(todo, store, settings, workers), total=len(todo), desc="build", disable=hide
    ):
        if outcome.record is not None:
            records[outcome.name] = outcome.record
        else:
            faults[outcome.name] = {"why": str(outcome.fault), **_stamp(images[outcome.name])}
    records = {s.name: records[s.name] for s in scans if s.name in records and s.name not in faults}
    for scan in scans:
        if scan.name in records:
            records[scan.name].patient = scan.patient
    reasons = {name: fault["why"] for name, fault in faults.items()}
    write_text(store / "report.json", json.dumps({"taken": sorted(records), "refused": reasons}, indent=1))
    fresh = {name: why for name, why in reasons.items() if name not in tolerated}
    if len(faults) > bad_scans_allowed and fresh:
        listed = "\n  ".join(reasons.values())
        raise ScanError(
            f"{len(faults)} of {len(scans)} scans cannot be used, {bad_scans_allowed} allowed:\n  {listed}\n"
            f"Mend or remove them, or set bad_scans_allowed to {len(faults)}. Good scans are kept in {store}."
        )
    if not records:
        raise ScanError(f"{store}: no usable scan among {len(scans)}. See {store / 'report.json'}.")
    write_index(store, settings, records, {"patient_pattern": patient_pattern, "refused": faults})
    for why in reasons.values():
        logger.warning("Skipped: %s", why)
    return VolumeStore(store)


def require_patients(store: VolumeStore, count: int) -> None:
    """Refuse a store with fewer patients than pairs need.

    Raises:
        ScanError: saying how many there are.
    """
    patients = sorted({store.patient(name) for name in store.names})
    if len(patients) < count:
        raise ScanError(
            f"{store.path}: {len(patients)} patient(s) ({', '.join(patients[:3])}), at least {count} are needed, since "
            "a pair is two different patients' scans. Add scans, or set patient_pattern if file names hide the patient."
        )


def _listed(source: Path, patient_pattern: str | None) -> list[Scan]:
    """The scans of a folder, a datalist, or a manifest that ``alice scan`` wrote."""
    if source.is_file() and '"alice-manifest' in source.read_text(encoding="utf-8", errors="replace")[:4096]:
        return Manifest.load(source).scans()
    return list_scans(source, patient_pattern)


def _known(store: Path, settings: dict) -> dict:
    """What the index of an earlier build says, if it was built alike."""
    if not (store / "index.json").is_file():
        return {}
    index = read_index(store)
    if index["settings"] != settings:
        raise StoreError(
            f"{store}: was built with {index['settings']}, now {settings} is asked for. Choose another store_dir."
        )
    return index


def _existing(store: Path, settings: dict, scans: Sequence[Scan]) -> dict[str, VolumeRecord]:
    """Records of volumes that an earlier build finished: each wrote its own file last."""
    records = {}
    for scan in scans:
        path = store / "volumes" / f"{scan.name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("settings") == settings:
                records[scan.name] = VolumeRecord(**content)
    return records


def _stamp(path: Path) -> dict[str, int]:
    """Size and time of a file: enough to see that it is the one of before without reading it."""
    try:
        found = path.stat()
    except OSError:
        return {"size": -1, "mtime_ns": -1}
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _same_file(fault: dict, name: str, scans: Sequence[Scan]) -> bool:
    image = next((scan.image for scan in scans if scan.name == name), None)
    return image is not None and _stamp(image) == {"size": fault["size"], "mtime_ns": fault["mtime_ns"]}


def _is_built(store: Path, record: VolumeRecord | None, scan: Scan) -> bool:
    if record is None or (scan.label is not None) != bool(record.label_sha256) or not scan.image.is_file():
        return False
    kinds = ["hu", "body"] + (["label"] if scan.label else [])
    if not all(volume_path(store, scan.name, kind).is_file() for kind in kinds):
        return False
    return record.source_stamp == _stamp(scan.image) or record.source_sha256 == sha256_of_file(scan.image)


def _build_all(scans: list[Scan], store: Path, settings: dict, workers: int) -> Iterator[Built]:
    if workers <= 1 or len(scans) <= 1:
        for scan in scans:
            yield _build_one(scan, store, settings)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(scans)),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        jobs = [pool.submit(_build_one, scan, store, settings) for scan in scans]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _build_one(scan: Scan, store: Path, settings: dict) -> Built:
    try:
        return Built(scan.name, record=_convert(scan, store, settings))
    except ScanError as error:
        return Built(scan.name, fault=str(error))
    except StoreError:
        raise  # the disk, not the scan
    except Exception as error:  # one odd file must not end the build of thousands; it is named and counted
        return Built(scan.name, fault=f"{scan.image}: cannot be converted ({type(error).__name__}: {error}).")


def _convert(scan: Scan, store: Path, settings: dict) -> VolumeRecord:
    if files := scan.extra.get("files"):  # a DICOM series
        raw, raw_affine = read_series([Path(file) for file in files])
    else:
        raw, raw_affine = read_volume(scan.image)
    hu, affine = to_ras(check_hu(scan.image, raw), raw_affine)
    hu, affine = resample(hu, affine, settings["spacing"])
    body, steps = body_mask(hu, tuple(settings["spacing"]))
    if not body.any():
        raise ScanError(f"{scan.image}: no body found (nothing above -500 HU). Leave it out.")
    label, labels = None, []
    if scan.label is not None:
        label = _read_label(scan, raw.shape, raw_affine, settings["spacing"], hu.shape)
        labels = [int(v) for v in np.unique(label) if v]
        write_array(volume_path(store, scan.name, "label"), label)
    write_array(volume_path(store, scan.name, "body"), body.astype(np.uint8))
    write_array(volume_path(store, scan.name, "hu"), hu)
    cells = np.argwhere(body)
    low, high = cells.min(axis=0) * steps, (cells.max(axis=0) + 1) * steps
    record = VolumeRecord(
        name=scan.name,
        patient=scan.patient,
        shape=list(hu.shape),
        affine=affine.tolist(),
        body_box=[low.tolist(), np.minimum(high, hu.shape).tolist()],
        body_step=list(steps),
        source=scan.image.name,
        source_sha256=sha256_of_file(scan.image),
        source_stamp=_stamp(scan.image),
        voxels_sha256=sha256_of_array(hu),
        label_sha256=None if label is None else sha256_of_array(label),
        labels=labels,
    )
    write_text(store / "volumes" / f"{scan.name}.json", json.dumps(asdict(record) | {"settings": settings}))
    return record


def _read_label(
    scan: Scan, shape: tuple, affine: np.ndarray, spacing: list[float], target: tuple
) -> np.ndarray:
    assert scan.label is not None
    label, label_affine = read_volume(scan.label)
    if label.shape != shape or not np.allclose(label_affine, affine, atol=0.01 * spacing_of(affine).min()):
        raise ScanError(
            f"{scan.label}: shape {label.shape} or position differs from its image {scan.image} {shape}."
        )
    values = np.unique(label)
    if values.min() < 0 or values.max() > 255 or not np.array_equal(values, np.rint(values)):
        raise ScanError(
            f"{scan.label}: labels must be whole numbers from 0 to 255, found {values.min():g} to {values.max():g}."
        )
    turned, turned_affine = to_ras(label.astype(np.uint8), label_affine)
    resampled, _ = resample(turned, turned_affine, spacing, nearest=True)
    assert resampled.shape == tuple(target)
    return resampled


def shared_store(source: str | Path, store: str | Path, **options) -> VolumeStore:
    """The store for one run of one or many processes: the first builds it, the others wait.

    Args and errors as :func:`build_store`; fewer than two patients are refused too. A store that is complete is
    opened as it is, even if the scans it came from are no longer there.
    """
    if rank() == 0:
        if not Path(source).expanduser().exists() and (Path(store) / "index.json").is_file():
            logger.warning("%s is not there; the store %s is used as it is.", source, store)
        else:
            build_store(source, store, **options)
    wait_for_all()
    opened = VolumeStore(store)
    require_patients(opened, 2)
    return opened
