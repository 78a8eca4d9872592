"""Build a store from scans: read, check, orient, resample, compress; resumable, with a report of what was refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from custom.data.arguments import number, voxel_size, whole_number
from custom.data.errors import ScanError
from custom.data.grid.profiles import profile_of
from custom.data.intake.scan_folder import Manifest
from custom.data.remote import is_url
from custom.data.scans import Scan, list_scans
from custom.data.store.convert import convert, record_path, stamp
from custom.data.store.needs import MARGIN_MM, SPACING, needs_of
from custom.data.store.parts import faults_of_parts, save_faults, share
from custom.data.store.volume_store import (
    StoreError,
    VolumeRecord,
    VolumeStore,
    read_index,
    store_text,
    volume_path,
    write_index,
)
from custom.errors import AliceError
from custom.files import sha256_of_file
from custom.processes import rank, wait_for_all

logger = logging.getLogger(__name__)

_SETTINGS = "build.json"  # of a build that is not finished


@dataclass
class Built:
    """One scan's outcome: a record, or what was wrong with it."""

    name: str
    record: VolumeRecord | None = None
    fault: str | None = None


def build_store(
    source: str | Path | Sequence[Scan],
    store: str | Path,
    spacing: Sequence[float] = SPACING,
    bad_scans_allowed: int = 0,
    workers: int = 1,
    patient_pattern: str | None = None,
    progress: bool = True,
    *,
    profile: str | None = None,
    crop_body: bool | None = None,
    margin_mm: float | None = None,
    remove_table: bool | None = None,
    check_disk: bool = True,
) -> VolumeStore:
    """Bring every scan of a folder, datalist or manifest onto one grid.

    A volume that is there already, from the same file and settings, is kept, so a build that was interrupted
    goes on where it stopped. Settings left at None are those of the store that is there.

    Args:
        source: folder, datalist JSON, manifest of ``alice scan``, or a list of scans.
        store: folder to write; made if missing.
        spacing: mm along x, y, z.
        bad_scans_allowed: how many scans may be unusable before the build is refused.
        workers: processes that read and resample.
        patient_pattern: see ``list_scans``.
        progress: show a bar.
        profile: of intensities: ct, mr or zscore; None takes the manifest's, or ct.
        crop_body: cut volumes to the body's box (default), so that air costs nothing.
        margin_mm: kept around that box (default: 10).
        remove_table: make air of what lies off the largest piece of tissue (default: no).
        check_disk: refuse a disk that is too small before anything is written.

    Returns:
        The finished store. ``report.json`` beside its index names every refused scan and why.

    Raises:
        ScanError: if more scans are unusable than allowed, or none is left; what is good stays built.
        StoreError: if the folder holds a store with other settings, or the disk is too small.
        ValueError: for a spacing, profile or margin that is none.
    """
    asked = {"profile": profile, "crop_body": crop_body, "margin_mm": margin_mm, "remove_table": remove_table}
    run = _Build(source, store, spacing, asked, patient_pattern)
    run.work(None, bad_scans_allowed, workers, progress, check_disk)
    run.finish(bad_scans_allowed)
    return VolumeStore(store)


def build_part(
    source: str | Path | Sequence[Scan],
    store: str | Path,
    part: str,
    spacing: Sequence[float] = SPACING,
    bad_scans_allowed: int = 0,
    workers: int = 1,
    patient_pattern: str | None = None,
    progress: bool = True,
    *,
    check_disk: bool = True,
    **asked: Any,
) -> VolumeStore | None:
    """One machine's part of a build; every part is given the same source, store and settings.

    Parts share no file that two of them write: a volume's record lies beside it, and the index is written by the
    part that finds every volume done, or by :func:`build_store` afterwards, which then has nothing else to do.

    Args:
        part: ``i/n``: this is the i-th of n.

    Other arguments and errors as :func:`build_store`.

    Returns:
        The store, if it is complete now.
    """
    run = _Build(source, store, spacing, asked, patient_pattern)
    run.work(part, bad_scans_allowed, workers, progress, check_disk)
    left = run.left()
    if left:
        logger.info("Part %s is done; %d of %d volumes are left to others.", part, left, len(run.scans))
        return None
    run.finish(bad_scans_allowed)
    return VolumeStore(store)


class _Build:
    """What is to be built, what is there, and what was refused."""

    def __init__(
        self,
        source: str | Path | Sequence[Scan],
        store: str | Path,
        spacing: Sequence[float],
        asked: dict[str, Any],
        patient_pattern: str | None,
    ) -> None:
        if is_url(store):
            raise StoreError(f"{store}: a store is built in a folder; copy it to the URL afterwards.")
        wanted = voxel_size(spacing)
        if Path(store).exists() and not Path(store).is_dir():
            raise StoreError(f"{store}: is a file; a store is a folder. Choose another place.")
        self.store, profile = (store := Path(store)), None
        index = read_index(store) if (store / "index.json").is_file() else {}
        if not isinstance(source, str | Path):
            self.scans = list(source)
        else:  # a store remembers how its patients were told apart
            patient_pattern = patient_pattern or index.get("patient_pattern")
            self.scans, profile = _listed(source, patient_pattern)
        self.patient_pattern = patient_pattern
        self.settings = _settings(store, index, wanted, profile, **asked)
        refused = faults_of_parts(store) | index.get("refused", {})
        self.faults = {n: f for n, f in refused.items() if _same_file(f, n, self.scans)}
        self.tolerated = set(self.faults)  # were let pass, or reported, before
        self.records = _existing(store, self.settings, self.scans)

    def work(
        self, part: str | None, bad_scans_allowed: int, workers: int, progress: bool, check_disk: bool
    ) -> None:
        """Build what is missing, of all or of a part."""
        whole_number("workers", workers, 0)
        whole_number("bad_scans_allowed", bad_scans_allowed, 0)
        store = self.store
        todo = [
            scan
            for scan in share(self.scans, part)
            if scan.name not in self.tolerated and not _is_built(store, self.records.get(scan.name), scan)
        ]
        if todo:
            needs = needs_of(todo, store, self.settings, workers)
            logger.info("%s: %s", store, needs)
            if check_disk:
                needs.refuse_small_disk(store)
        try:
            store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{store}: cannot be made ({error.strerror}). Choose another place.") from error
        if not (store / _SETTINGS).is_file() and not (store / "index.json").is_file():
            store_text(store / _SETTINGS, json.dumps(self.settings))
        mine = tuple(f"{scan.name}." for scan in todo)
        for leftover in store.rglob("*.tmp"):  # of a build that was killed; other parts may be at work
            if part is None or leftover.name.startswith(mine):
                leftover.unlink(missing_ok=True)
        images = {scan.name: scan.image for scan in todo}
        found: dict[str, dict[str, Any]] = {}
        outcomes = _build_all(todo, store, self.settings, workers)
        for outcome in tqdm(outcomes, total=len(todo), desc="build", disable=not progress or not todo):
            if outcome.record is not None:
                self.records[outcome.name] = outcome.record
            else:
                found[outcome.name] = {"why": str(outcome.fault), **stamp(images[outcome.name])}
        self.faults |= found
        if part is not None:
            own = {scan.name for scan in share(self.scans, part)}
            self.records = _existing(store, self.settings, self.scans)  # of other parts, by now
            refused = {n: f for n, f in faults_of_parts(store).items() if _same_file(f, n, self.scans)}
            self.faults |= {name: fault for name, fault in refused.items() if name not in own}
            self.refuse(bad_scans_allowed)
            save_faults(store, part, {n: f for n, f in self.faults.items() if n in own})

    def left(self) -> int:
        """How many scans are neither built nor refused."""
        done = {scan.name for scan in self.scans if self._has_files(scan)}
        return sum(scan.name not in done and scan.name not in self.faults for scan in self.scans)

    def refuse(self, bad_scans_allowed: int) -> None:
        """Stop at more unusable scans than allowed."""
        reasons = {name: fault["why"] for name, fault in self.faults.items()}
        if len(reasons) > bad_scans_allowed and set(reasons) - self.tolerated:
            listed = "\n  ".join(reasons.values())
            raise ScanError(
                f"{len(reasons)} of {len(self.scans)} scans cannot be used, {bad_scans_allowed} allowed:\n  {listed}\n"
                f"Mend or remove them, or set bad_scans_allowed to {len(reasons)}. Good scans are kept in {self.store}."
            )

    def finish(self, bad_scans_allowed: int) -> None:
        """Write the report and the index."""
        store = self.store
        built = {s.name: self.records[s.name] for s in self.scans
                 if s.name in self.records and s.name not in self.faults}  # fmt: skip
        for scan in self.scans:
            if scan.name in built:
                built[scan.name].patient = scan.patient
        reasons = {name: fault["why"] for name, fault in self.faults.items()}
        store_text(store / "report.json", json.dumps({"taken": sorted(built), "refused": reasons}, indent=1))
        self.refuse(bad_scans_allowed)
        if not built:
            raise ScanError(f"{store}: no usable scan among {len(self.scans)}. See {store / 'report.json'}.")
        extra = {"patient_pattern": self.patient_pattern, "refused": self.faults}
        write_index(store, self.settings, built, extra)
        (store / _SETTINGS).unlink(missing_ok=True)
        for why in reasons.values():
            logger.warning("Skipped: %s", why)

    def _has_files(self, scan: Scan) -> bool:
        kinds = ["hu", "body"] + (["label"] if scan.label else [])
        return scan.name in self.records and all(
            volume_path(self.store, scan.name, kind).is_file() for kind in kinds
        )


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


def _listed(source: str | Path, patient_pattern: str | None) -> tuple[list[Scan], str | None]:
    """The scans of a folder, a datalist, or a manifest that ``alice scan`` wrote; and a manifest's profile."""
    if is_url(str(source)):
        manifest = Manifest.load(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file() or b'"alice-manifest' not in path.open("rb").read(4096):
            return list_scans(path, patient_pattern), None
        manifest = Manifest.load(path)
    return manifest.scans(), str(manifest.rules.get("profile", "ct"))


def _settings(
    store: Path,
    index: dict[str, Any],
    spacing: list[float],
    manifest_profile: str | None,
    profile: str | None = None,
    crop_body: bool | None = None,
    margin_mm: float | None = None,
    remove_table: bool | None = None,
) -> dict[str, Any]:
    """What decides every volume; a store that is there must agree.

    Raises:
        StoreError: naming what differs.
    """
    there = index.get("settings") or _begun(store)
    if margin_mm is not None:
        margin_mm = number("margin_mm", margin_mm, 0, 1000)
    if crop_body is False and margin_mm is not None:
        raise AliceError(f"margin_mm = {margin_mm} says nothing without crop_body.")
    known = there or {"crop_margin_mm": MARGIN_MM, "remove_table": False, "profile": manifest_profile or "ct"}
    margin = known["crop_margin_mm"] if crop_body is None else MARGIN_MM if crop_body else None
    if margin_mm is not None:
        margin = float(margin_mm)
    elif crop_body and known["crop_margin_mm"] is not None:
        margin = known["crop_margin_mm"]
    chosen = profile_of(profile or manifest_profile or known["profile"])
    if profile and manifest_profile and profile != manifest_profile:
        logger.warning("The manifest's profile is %s; built as %s, as asked.", manifest_profile, profile)
    settings = {
        "spacing": spacing,
        "orientation": "RAS",
        "units": chosen.units,
        "profile": chosen.name,
        "crop_margin_mm": margin,
        "remove_table": known["remove_table"] if remove_table is None else bool(remove_table),
    }
    if there and there != settings:
        differing = [key for key in settings if there.get(key) != settings[key]]
        then, now = ({key: one.get(key) for key in differing} for one in (there, settings))
        raise StoreError(
            f"{store}: was built with {then}, now {now} is asked for. Ask for that, or choose another store_dir."
        )
    return settings


def _begun(store: Path) -> dict[str, Any] | None:
    """Settings of a build that was never finished."""
    path = store / _SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _existing(store: Path, settings: dict, scans: Sequence[Scan]) -> dict[str, VolumeRecord]:
    """Records of volumes that an earlier build, or another part, finished: each wrote its own file last."""
    records = {}
    for scan in scans:
        path = record_path(store, scan.name)
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("settings") == settings:
                records[scan.name] = VolumeRecord(**content)
    return records


def _same_file(fault: dict, name: str, scans: Sequence[Scan]) -> bool:
    image = next((scan.image for scan in scans if scan.name == name), None)
    return image is not None and stamp(image) == {"size": fault["size"], "mtime_ns": fault["mtime_ns"]}


def _is_built(store: Path, record: VolumeRecord | None, scan: Scan) -> bool:
    if record is None or (scan.label is not None) != bool(record.label_sha256) or not scan.image.is_file():
        return False
    kinds = ["hu", "body"] + (["label"] if scan.label else [])
    if not all(volume_path(store, scan.name, kind).is_file() for kind in kinds):
        return False
    return record.source_stamp == stamp(scan.image) or record.source_sha256 == sha256_of_file(scan.image)


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
        return Built(scan.name, record=convert(scan, store, settings))
    except ScanError as error:
        return Built(scan.name, fault=str(error))
    except StoreError:
        raise  # the disk, not the scan
    except Exception as error:  # one odd file must not end the build of thousands; it is named and counted
        return Built(scan.name, fault=f"{scan.image}: cannot be converted ({type(error).__name__}: {error}).")


def shared_store(source: str | Path, store: str | Path, **options) -> VolumeStore:
    """The store for one run of one or many processes: the first builds it, the others wait.

    Args and errors as :func:`build_store`; fewer than two patients are refused too. A store that is complete is
    opened as it is, even if the scans it came from are no longer there.
    """
    if rank() == 0 and not is_url(str(store)):  # a URL holds a finished store
        if (
            not is_url(str(source))
            and not Path(source).expanduser().exists()
            and (Path(store) / "index.json").is_file()
        ):
            logger.warning("%s is not there; the store %s is used as it is.", source, store)
        else:
            build_store(source, store, **options)
    wait_for_all()
    opened = VolumeStore(store)
    require_patients(opened, 2)
    return opened
