"""Build a store from scans. A build can be interrupted at any time and goes on; unusable scans are reported."""

from __future__ import annotations

import contextlib
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

from custom.data.arguments import worker_count
from custom.data.errors import ScanError, StoreError
from custom.data.intake.manifest import Manifest, is_manifest
from custom.data.remote import is_url
from custom.data.scans import Scan, list_scans
from custom.data.store.build_cost import build_cost
from custom.data.store.build_parts import faults_of_parts, parse, save_faults, share
from custom.data.store.convert import convert, record_path, stamp
from custom.data.store.records import VolumeRecord
from custom.data.store.settings import SPACING, BuildSettings
from custom.data.store.volume_store import (
    VolumeStore,
    read_index,
    store_text,
    volume_path,
    write_index,
)
from custom.errors import shown
from custom.files import read_json, sha256_of_file
from custom.processes import end_with_parent, locked, rank, wait_for_all

logger = logging.getLogger(__name__)

_SETTINGS = "build.json"  # settings of a build that is not finished


@dataclass
class Built:
    """The outcome for one scan: its record, or what is wrong with it."""

    name: str
    record: VolumeRecord | None = None
    fault: str | None = None


def build_store(
    source: str | Path | Sequence[Scan],
    store: str | Path,
    spacing: Sequence[float] = SPACING,
    *,
    wait: bool = False,
    **options: Any,
) -> VolumeStore:
    """Bring every scan of a folder, datalist or manifest onto one grid.

    Volumes that were built already, from the same file and with the same settings, are kept. So an interrupted build
    goes on where it stopped.

    Args:
        source: folder, datalist JSON, manifest of ``alice scan`` (or its URL), or a list of scans.
        store: folder to write; made if it is missing.
        spacing: voxel size in mm along x, y, z.
        wait: if another process builds this store, wait until it has ended; else this is refused.
        options: the other fields of :class:`BuildSettings`, by keyword.

    Returns:
        The finished store. ``report.json`` beside its index names every scan that was refused, with the reason.

    Raises:
        ScanError: if more scans are unusable than allowed, or none is left. The good ones stay built.
        StoreError: if the folder holds a store with other settings, if another process builds it, or if the disk is too small.
        AliceError: for a setting that cannot be used.
    """
    asked = BuildSettings(spacing, **options)
    with _alone_in(store, None, wait):
        run = _Build(source, store, asked)
        run.work(None)
        run.finish()
    return VolumeStore(store)


def build_part(
    source: str | Path | Sequence[Scan],
    store: str | Path,
    part: str,
    spacing: Sequence[float] = SPACING,
    **options: Any,
) -> VolumeStore | None:
    """Build one machine's part of a store. Give every part the same source, store and settings.

    No two parts write the same file, except the index. The part that finds every volume done writes it, or a later
    :func:`build_store`, which then has nothing else to do.

    Args:
        part: ``i/n``: this is part i of n.

    Other arguments and errors as :func:`build_store`.

    Returns:
        The store if it is complete now, else None.
    """
    asked = BuildSettings(spacing, **options)
    with _alone_in(store, part):
        run = _Build(source, store, asked)
        run.work(part)
        left = run.left()
        if left:
            logger.info(
                "Part %s is done; %d of %d volumes are left to the other parts.", part, left, len(run.scans)
            )
            return None
        run.finish()
    return VolumeStore(store)


def shared_store(source: str | Path, store: str | Path, **options: Any) -> VolumeStore:
    """The store of a run with one or many processes: the first process builds it, the others wait.

    If another run builds the same store now, this one waits for it. A complete store is opened as it is if the scans it
    was built from are gone.

    Args and errors as :func:`build_store`. A store with fewer than two patients is refused too.
    """
    BuildSettings(**options)  # refused on every process alike
    if rank() == 0 and not is_url(str(store)):  # a store at a URL is finished
        scans_gone = not is_url(str(source)) and not Path(source).expanduser().exists()
        if scans_gone and (Path(store) / "index.json").is_file():
            logger.warning("%s does not exist; the store %s is used as it is.", source, store)
        else:
            build_store(source, store, wait=True, **options)
    wait_for_all()
    opened = VolumeStore(store)
    require_patients(opened, 2)
    return opened


def require_patients(store: VolumeStore, count: int) -> None:
    """Refuse a store with too few patients to draw pairs from.

    Raises:
        ScanError: saying how many there are.
    """
    patients = sorted({store.patient(name) for name in store.names})
    if len(patients) < count:
        raise ScanError(
            f"{store.path}: {len(patients)} patient(s) ({', '.join(patients[:3])}), at least {count} are needed, because "
            "a pair is two scans of different patients. Add scans, or set patient_pattern if file names hide the patient."
        )


@contextlib.contextmanager
def _alone_in(store: str | Path, part: str | None, wait: bool = False) -> Iterator[None]:
    """Keep other builds out of a store; parts exclude only themselves and a build of the whole."""
    if is_url(store):
        raise StoreError(
            f"{store}: a store must be built in a folder. Build it there, then copy it to the URL."
        )
    if Path(store).exists() and not Path(store).is_dir():
        raise StoreError(f"{store}: is a file; a store is a folder. Choose another place.")
    name, excluded = "build.lock", "build*.lock"
    if part is not None:
        number, parts = parse(part)
        name, excluded = f"build-{number}-of-{parts}.lock", "build.lock"
    with locked(Path(store) / name, "a build", excludes=excluded, wait=wait, error=StoreError):
        yield


class _Build:
    """The scans to build, the volumes that are there, and the scans that were refused."""

    def __init__(self, source: str | Path | Sequence[Scan], store: str | Path, asked: BuildSettings) -> None:
        self.store, self.asked, profile = (store := Path(store)), asked, None
        index = read_index(store) if (store / "index.json").is_file() else {}
        self.patient_pattern = asked.patient_pattern
        if not isinstance(source, str | Path):
            self.scans = list(source)
        else:  # a store remembers how its patients were told apart
            self.patient_pattern = self.patient_pattern or index.get("patient_pattern")
            self.scans, profile = _listed(source, self.patient_pattern)
        self.settings = asked.stored(store, index.get("settings") or _begun(store), profile)
        refused = faults_of_parts(store) | index.get("refused", {})
        self.faults = {n: f for n, f in refused.items() if _same_file(f, n, self.scans)}
        self.reported = set(self.faults)  # by an earlier build
        self.records = _existing(store, self.settings, self.scans)

    def work(self, part: str | None) -> None:
        """Build what is missing, of all scans or of one part."""
        store, workers = self.store, worker_count(self.asked.workers)
        mine = share(self.scans, part)
        todo = [
            scan
            for scan in mine
            if scan.name not in self.reported and not _is_built(store, self.records.get(scan.name), scan)
        ]
        if todo:
            cost = build_cost(todo, store, self.settings["spacing"], self.settings["crop_margin_mm"], workers)
            logger.info("%s: %s", store, cost)
            if self.asked.check_disk:
                cost.refuse_small_disk(store)
        if not (store / _SETTINGS).is_file() and not (store / "index.json").is_file():
            store_text(store / _SETTINGS, json.dumps(self.settings))
        starts = tuple(f"{scan.name}." for scan in todo)
        for leftover in store.rglob("*.tmp"):  # of a build that was killed; other parts may be at work
            if part is None or leftover.name.startswith(starts):
                leftover.unlink(missing_ok=True)
        images = {scan.name: scan.image for scan in todo}
        outcomes = _build_all(todo, store, self.settings, workers, self.asked.most_bytes)
        for outcome in tqdm(
            outcomes, total=len(todo), desc="build", disable=not self.asked.progress or not todo
        ):
            if outcome.record is not None:
                self.records[outcome.name] = outcome.record
            else:
                self.faults[outcome.name] = {"why": str(outcome.fault), **stamp(images[outcome.name])}
        if part is not None:
            own = {scan.name for scan in mine}
            self.records = _existing(store, self.settings, self.scans)  # other parts have built more by now
            refused = {n: f for n, f in faults_of_parts(store).items() if _same_file(f, n, self.scans)}
            self.faults |= {name: fault for name, fault in refused.items() if name not in own}
            self.refuse()
            save_faults(store, part, {n: f for n, f in self.faults.items() if n in own})

    def left(self) -> int:
        """How many scans are neither built nor refused."""
        return sum(
            scan.name not in self.faults and not (scan.name in self.records and _has_files(self.store, scan))
            for scan in self.scans
        )

    def refuse(self) -> None:
        """Stop if more scans are unusable than allowed."""
        reasons, allowed = (
            {name: fault["why"] for name, fault in self.faults.items()},
            self.asked.bad_scans_allowed,
        )
        if len(reasons) > allowed and set(reasons) - self.reported:
            listed = "\n  ".join(reasons.values())
            raise ScanError(
                f"{len(reasons)} of {len(self.scans)} scans cannot be used, {allowed} allowed:\n  {listed}\n  "
                f"Mend or remove them, or set bad_scans_allowed to {len(reasons)}. Good scans are kept in {self.store}."
            )

    def finish(self) -> None:
        """Write the report and the index."""
        store = self.store
        built = {s.name: self.records[s.name] for s in self.scans
                 if s.name in self.records and s.name not in self.faults}  # fmt: skip
        for scan in self.scans:
            if scan.name in built:
                built[scan.name].patient = scan.patient
        repeated = _repeated(self.scans, built)
        for name in repeated:
            del built[name]
        reasons = {name: fault["why"] for name, fault in self.faults.items()}
        report = {"taken": sorted(built), "refused": reasons, "duplicates": repeated}
        store_text(store / "report.json", json.dumps(report, indent=1))
        self.refuse()
        if not built:
            raise ScanError(f"{store}: no usable scan among {len(self.scans)}. See {store / 'report.json'}.")
        extra = {"patient_pattern": self.patient_pattern, "refused": self.faults}
        write_index(store, self.settings, built, extra)
        (store / _SETTINGS).unlink(missing_ok=True)
        for why in [*reasons.values(), *repeated.values()]:
            logger.warning("Skipped: %s", shown(why))


def _listed(source: str | Path, patient_pattern: str | None) -> tuple[list[Scan], str | None]:
    """The scans of a folder, datalist or manifest, and the manifest's profile."""
    if is_url(str(source)):
        manifest = Manifest.load(source)
    else:
        path = Path(source).expanduser()
        if not is_manifest(path):
            return list_scans(path, patient_pattern), None
        manifest = Manifest.load(path)
    return manifest.scans(), str(manifest.rules.get("profile", "ct"))


def _begun(store: Path) -> dict[str, Any] | None:
    """Settings of a build that was not finished."""
    path = store / _SETTINGS
    return read_json(path, error=StoreError, advice="Delete it and build again.") if path.is_file() else None


def _existing(store: Path, settings: dict, scans: Sequence[Scan]) -> dict[str, VolumeRecord]:
    """Records of the volumes that are finished: a volume's record is the last file to be written."""
    records = {}
    for scan in scans:
        path = record_path(store, scan.name)
        if path.is_file():
            content = read_json(path, error=StoreError, advice="Delete it and build again.")
            try:
                if content.pop("settings") == settings:
                    records[scan.name] = VolumeRecord(**content)
            except (AttributeError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path}: not a volume's record ({error}). Delete it and build again."
                ) from error
    return records


def _repeated(scans: Sequence[Scan], built: dict[str, VolumeRecord]) -> dict[str, str]:
    """Scans that hold the same voxels as another: name -> what to say. As in ``alice scan``, one with a label stays, else the first."""
    order = sorted((scan for scan in scans if scan.name in built), key=lambda scan: scan.label is None)
    first: dict[tuple, Scan] = {}
    repeated = {}
    for scan in order:
        record = built[scan.name]
        kept = first.setdefault((record.voxels_sha256, *record.shape), scan)
        if kept is not scan:
            repeated[scan.name] = f"{scan.image}: the same voxels as {kept.image}. It is left out."
    return repeated


def _same_file(fault: dict, name: str, scans: Sequence[Scan]) -> bool:
    image = next((scan.image for scan in scans if scan.name == name), None)
    return image is not None and stamp(image) == {"size": fault["size"], "mtime_ns": fault["mtime_ns"]}


def _has_files(store: Path, scan: Scan) -> bool:
    kinds = ["hu", "body"] + (["label"] if scan.label else [])
    return all(volume_path(store, scan.name, kind).is_file() for kind in kinds)


def _is_built(store: Path, record: VolumeRecord | None, scan: Scan) -> bool:
    if record is None or (scan.label is not None) != bool(record.label_sha256) or not scan.image.is_file():
        return False
    same = record.source_stamp == stamp(scan.image) or record.source_sha256 == sha256_of_file(scan.image)
    return _has_files(store, scan) and same


def _build_all(
    scans: list[Scan], store: Path, settings: dict, workers: int, most_bytes: int
) -> Iterator[Built]:
    if workers <= 1 or len(scans) <= 1:
        for scan in scans:
            yield _build_one(scan, store, settings, most_bytes)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(scans)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        jobs = [pool.submit(_build_one, scan, store, settings, most_bytes) for scan in scans]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _build_one(scan: Scan, store: Path, settings: dict, most_bytes: int) -> Built:
    try:
        return Built(scan.name, record=convert(scan, store, settings, most_bytes))
    except ScanError as error:
        return Built(scan.name, fault=str(error))
    except StoreError:
        raise  # the disk is at fault, not the scan
    except Exception as error:  # one odd file must not end the build of thousands; it is named and counted
        return Built(scan.name, fault=f"{scan.image}: cannot be converted ({type(error).__name__}: {error}).")
