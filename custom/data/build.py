"""Build a store from scans: read, check, orient, resample, compress; resumable, with a report of what was refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from custom.data.body import body_mask
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
    scans = list(source) if isinstance(source, (list, tuple)) else list_scans(source, patient_pattern)  # type: ignore[arg-type]
    store = Path(store)
    settings = {"spacing": [float(s) for s in spacing], "orientation": "RAS", "units": "HU"}
    records = _existing(store, settings, scans)
    todo = [scan for scan in scans if not _is_built(store, records.get(scan.name), scan)]
    faults: dict[str, str] = {}
    store.mkdir(parents=True, exist_ok=True)
    if todo:
        logger.info("Building %d of %d volumes in %s.", len(todo), len(scans), store)
    for outcome in tqdm(
        _build_all(todo, store, settings, workers),
        total=len(todo),
        desc="build",
        disable=not progress or not todo,
    ):
        if outcome.record is not None:
            records[outcome.name] = outcome.record
        else:
            faults[outcome.name] = str(outcome.fault)
    records = {
        scan.name: records[scan.name] for scan in scans if scan.name in records and scan.name not in faults
    }
    write_index(store, settings, records)
    write_text(store / "report.json", json.dumps({"taken": sorted(records), "refused": faults}, indent=1))
    if len(faults) > bad_scans_allowed:
        listed = "\n  ".join(faults.values())
        raise ScanError(
            f"{len(faults)} of {len(scans)} scans cannot be used, {bad_scans_allowed} allowed:\n  {listed}\n"
            f"Mend or remove them, or set bad_scans_allowed to {len(faults)}. Good scans are kept in {store}."
        )
    if not records:
        raise ScanError(f"{store}: no usable scan among {len(scans)}. See {store / 'report.json'}.")
    for fault in faults.values():
        logger.warning("Skipped: %s", fault)
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


def _existing(store: Path, settings: dict, scans: Sequence[Scan]) -> dict[str, VolumeRecord]:
    """Records of volumes that an earlier build finished: each wrote its own file last."""
    if (store / "index.json").is_file() and (found := read_index(store)["settings"]) != settings:
        raise StoreError(
            f"{store}: was built with {found}, now {settings} is asked for. Choose another store_dir."
        )
    records = {}
    for scan in scans:
        path = store / "volumes" / f"{scan.name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("settings") == settings:
                records[scan.name] = VolumeRecord(**content)
    return records


def _is_built(store: Path, record: VolumeRecord | None, scan: Scan) -> bool:
    if (
        record is None
        or record.patient != scan.patient
        or (scan.label is not None) != bool(record.label_sha256)
    ):
        return False
    kinds = ["hu", "body"] + (["label"] if scan.label else [])
    return (
        all(volume_path(store, scan.name, kind).is_file() for kind in kinds)
        and scan.image.is_file()
        and record.source_sha256 == sha256_of_file(scan.image)
    )


def _build_all(scans: list[Scan], store: Path, settings: dict, workers: int):
    if workers <= 1 or len(scans) <= 1:
        for scan in scans:
            yield _build_one(scan, store, settings)
        return
    with ProcessPoolExecutor(min(workers, len(scans)), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_build_one, scan, store, settings) for scan in scans]
        for job in as_completed(jobs):
            yield job.result()


def _build_one(scan: Scan, store: Path, settings: dict) -> Built:
    try:
        return Built(scan.name, record=_convert(scan, store, settings))
    except ScanError as error:
        return Built(scan.name, fault=str(error))


def _convert(scan: Scan, store: Path, settings: dict) -> VolumeRecord:
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
