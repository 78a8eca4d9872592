"""From a folder of anything to a manifest: every scan in it, what we took, what we refused and why."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import posixpath
import re
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from custom.data.dicom import MIN_SLICES, read_series
from custom.data.fingerprint import PROFILES, Job, Rules, ScanRecord, near_pairs, run_job
from custom.data.intake import MOST_BYTES, open_scan
from custom.data.reasons import ACCEPTED, REJECTED, WARNED, Fault, Reason, status_of
from custom.data.scans import _TCGA, IMAGE_SUFFIXES, Scan, ScanError, _is_label, _pair_key, list_scans, stem
from custom.data.store import write_text

logger = logging.getLogger(__name__)

FORMAT = "alice-manifest-1"
# 1 - correlation of body hashes. Measured on the 86 CTs of shared/data: two patients differ by 0.043 at least; one
# scan with noise of 30 HU by 0.013 at most, resampled to 1.5 x 1.5 x 2 mm or by 1.3 by 0.032 at most.
NEAR = 0.03
_OTHER_SUFFIXES = {".npz", ".npy", ".h5", ".hdf5", ".mat", ".mgz", ".mgh", ".mnc", ".hdr", ".zip", ".tar", ".tgz",
                   ".7z", ".rar", ".bz2", ".xz", ".zst", ".gz", ".gipl", ".vtk", ".b2nd", ".zarr"}  # fmt: skip
_DICOM_SUFFIX = re.compile(r"^(\.dcm|\.dicom|\.ima|\.\d*|)$", re.IGNORECASE)  # a UID ends in digits
_PLAIN_NAME = re.compile(
    r"^(ct|mr|mri|pet|image|imaging|img|scan|volume|vol|data|t[12]w?|flair|dwi|adc)([_\-. ]?\d{0,4})$",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")  # BIDS


class ManifestError(ValueError):
    """A manifest or folder that cannot be used; the message names the file and the way out."""


@dataclass
class Manifest:
    """Every scan, label and refused file of a folder.

    Attributes:
        folder: that was scanned.
        records: in the order of their paths.
        rules: that they were examined by, without the salt.
        others: how many files of which suffix were passed over, since they hold no scan.
    """

    folder: Path
    records: list[ScanRecord] = field(default_factory=list)
    rules: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> list[ScanRecord]:
        """Images that were accepted, with a warning or without."""
        return [record for record in self.records if record.usable]

    def counts(self) -> dict[str, dict[str, int]]:
        """How many records of each kind have each status."""
        found: dict[str, dict[str, int]] = {}
        for record in self.records:
            kind = found.setdefault(record.kind, {ACCEPTED: 0, WARNED: 0, REJECTED: 0})
            kind[record.status] += 1
        return found

    def by_reason(self) -> dict[Reason, list[ScanRecord]]:
        """Records under each reason that was given, the most frequent reason first."""
        found: dict[Reason, list[ScanRecord]] = defaultdict(list)
        for record in self.records:
            for code in record.reasons:
                found[Reason(code)].append(record)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0].value)))

    def read(self, record: ScanRecord) -> tuple[np.ndarray, np.ndarray]:
        """Values (X, Y, Z) as stored (scaled, if the header scales) and affine (4, 4) in RAS mm of a record.

        Raises:
            ScanError: if it can no longer be read.
        """
        if record.format == "dicom":
            return read_series([self.folder / name for name in record.files])
        path = self.folder / record.path
        try:
            voxels = open_scan(path, self.folder, int(self.rules.get("most_bytes", MOST_BYTES)))
        except Fault as fault:
            raise ScanError(f"{path}: {fault}") from fault
        return voxels.scaled(voxels.raw), voxels.affine

    def scans(self) -> list[Scan]:
        """What a store is built from: usable images, a near-duplicate under the patient of what it repeats.

        A DICOM series has its first slice as ``image`` and all of them, in order, under ``extra["files"]``.
        """
        patients = {record.id: record.patient for record in self.records}
        found = []
        for record in self.usable:
            extra: dict[str, Any] = {"profile": record.profile, "modality": record.modality}
            if record.format == "dicom":
                extra["files"] = [self.folder / name for name in record.files]
            image = extra["files"][0] if record.format == "dicom" else self.folder / record.path
            patient = patients.get(record.duplicate_of or "", record.patient)
            label = self.folder / record.label if record.label else None
            found.append(Scan(record.id, image, patient, label, extra))
        return found

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all.

        Raises:
            ManifestError: if it cannot be written (a full disk, say); what was there before stays.
        """
        path = Path(path)
        content = {
            "format": FORMAT,
            "folder": _relative(self.folder, path.parent),
            "rules": self.rules,
            "others": dict(sorted(self.others.items())),
            "records": [_sparse(record) for record in self.records],
        }
        try:
            # ASCII keeps names that are no valid UTF-8 as they are
            write_text(path, json.dumps(content, indent=1, ensure_ascii=True) + "\n")
        except OSError as error:
            raise ManifestError(
                f"{path}: cannot be written ({error.strerror}). Choose another place."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read and check one.

        Raises:
            ManifestError: naming what is wrong: no such file, no manifest, another format, a field of another type,
                or a path that leaves the folder.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ManifestError(
                f"{path}: cannot be read ({error.strerror}). Make one: alice scan FOLDER"
            ) from error
        except ValueError as error:
            raise ManifestError(f"{path}: no readable JSON ({error}). Scan the folder again.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise ManifestError(
                f"{path}: format {found!r}, this version reads {FORMAT!r}. Scan the folder again."
            )
        for key, kind in (("folder", str), ("rules", dict), ("others", dict), ("records", list)):
            if not isinstance(content.get(key), kind):
                raise ManifestError(f"{path}: {key!r} must be a {kind.__name__}. Scan the folder again.")
        records = [_record(path, index, entry) for index, entry in enumerate(content["records"])]
        folder = Path(os.path.normpath(path.resolve().parent / content["folder"]))
        return cls(folder, records, content["rules"], content["others"])


def exit_code(manifest: Manifest) -> int:
    """For scripts: 0 if every image can be used, 1 if some were rejected, 2 if none can be used.

    A warning does not count, nor do labels and files that hold no volume.
    """
    if not manifest.usable:
        return 2
    return int(any(record.kind == "image" and record.status == REJECTED for record in manifest.records))


def scan_folder(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    against: Sequence[str | Path] = (),
    profile: str = "ct",
    min_slices: int = MIN_SLICES,
    most_bytes: int = MOST_BYTES,
    patient_pattern: str | None = None,
    hash_ids: bool = True,
    salt: str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Manifest:
    """Find, examine and judge every scan under a folder.

    Args:
        folder: of NIfTI, NRRD, MetaImage and raw DICOM, in any order and depth.
        output: where to save the manifest. An earlier one there, or what a run that was killed left beside it
            (``.partial``), is taken up: files of the same path, size and time are not read again.
        against: manifests, datalists or folders that must not share scans with this one (a leakage check).
        profile: ``ct``, ``mr`` or ``zscore``; images of other modalities are set aside (``other_modality``).
        min_slices: along Superior; fewer are refused.
        most_bytes: of voxels in one scan; a header that promises more is refused unread.
        patient_pattern: regular expression on the relative path; its first group (or the whole match) is the patient.
            None takes DICOM's PatientID, TCGA barcodes, BIDS subjects, or folder and file names.
        hash_ids: write salted hashes for scans and patients; False writes names from the paths, and the patients
            as they are.
        salt: secret of the hashes; equal salts make patients comparable between manifests. None takes the one kept
            beside ``output`` (``.salt``, readable to its owner only), or draws one.
        workers: processes.
        progress: show a bar.

    Returns:
        The manifest, saved if ``output`` was given. Whatever the files hold, no error comes from them.

    Raises:
        ManifestError: for a folder that is none, an unknown profile, a pattern that is none, or an ``output`` or
            ``against`` that cannot be used.
    """
    folder, output = Path(folder).expanduser(), Path(output) if output else None
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder.")
    if profile not in PROFILES:
        raise ManifestError(f"profile {profile!r} is none of {', '.join(PROFILES)}.")
    try:
        pattern = re.compile(patient_pattern) if patient_pattern else None
    except re.error as error:
        raise ManifestError(
            f"patient_pattern {patient_pattern!r} is no regular expression: {error}."
        ) from error
    salt = salt or _kept_salt(output)
    rules = Rules(profile, min_slices, most_bytes, salt, hash_ids, patient_pattern or "")
    manifest = Manifest(folder.resolve(), rules=_shown(rules))
    jobs, problems, manifest.others = _walk(manifest.folder, output)
    known = _known_records(output, manifest)
    manifest.records = problems + list(_examine(jobs, rules, known, output, workers, progress))
    _name_all(manifest.records, rules, pattern)
    _pair_labels(manifest.records)
    _mark_duplicates(manifest.records)
    for other in against:
        _mark_leaks(manifest, Path(other), rules, workers, progress)
    manifest.records.sort(key=lambda record: (record.path, record.files[:1]))
    if output:
        manifest.save(output)
        _partial(output).unlink(missing_ok=True)
    return manifest


# -- the walk -------------------------------------------------------------------------------------------


def _walk(root: Path, output: Path | None) -> tuple[list[Job], list[ScanRecord], dict[str, int]]:
    """Work to do, records of what cannot be walked or read, and what was passed over."""
    jobs: list[Job] = []
    problems: list[ScanRecord] = []
    others: Counter[str] = Counter()
    skipped = {p.resolve() for p in (output, _partial(output), _salt_file(output))} if output else set()

    def problem(path: Path, reason: Reason, kind: str = "other") -> None:
        record = ScanRecord(path.relative_to(root).as_posix(), "other", kind)
        record.add(reason)
        problems.append(record)

    open_folders: deque[tuple[Path, tuple[Path, ...]]] = deque([(root, (root.resolve(),))])
    visited = {root.resolve()}
    while open_folders:
        here, above = open_folders.popleft()
        slices: list[os.DirEntry] = []
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            problem(here, Reason.UNREADABLE)
            continue
        for entry in listed:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                others["hidden"] += 1
                continue
            try:
                if entry.is_symlink():
                    target = path.resolve(strict=True)
                    if not target.is_relative_to(root.resolve()):
                        problem(path, Reason.LEAVES_FOLDER)
                        continue
                if entry.is_dir():
                    real = path.resolve()
                    if real in above:
                        problem(path, Reason.SYMLINK_LOOP)
                    elif real in visited:
                        others["linked folder"] += 1
                    else:
                        visited.add(real)
                        open_folders.append((path, (*above, real)))
                    continue
                if not entry.is_file():
                    problem(path, Reason.UNREADABLE)
                    continue
                if path.resolve() in skipped:
                    continue
                name, suffix = entry.name.lower(), path.suffix.lower()
                if name.endswith(IMAGE_SUFFIXES):
                    relative = path.relative_to(root)
                    kind = "label" if _is_label(relative) else "file"
                    jobs.append(Job(root, relative.as_posix(), kind, _key([entry])))
                elif _DICOM_SUFFIX.match(suffix) or re.search(r"\.\d+$", name):
                    slices.append(entry)
                elif suffix in _OTHER_SUFFIXES:
                    problem(path, Reason.UNSUPPORTED)
                else:
                    others[suffix or "no suffix"] += 1
            except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
                loop = isinstance(error, RuntimeError) or getattr(error, "errno", 0) == errno.ELOOP
                problem(path, Reason.SYMLINK_LOOP if loop else Reason.UNREADABLE)
        if slices:
            files = tuple(Path(entry.path).relative_to(root).as_posix() for entry in slices)
            where = here.relative_to(root).as_posix()
            jobs.append(Job(root, where, "folder", _key(slices), files))
    return jobs, problems, dict(others)


def _key(entries: Sequence[os.DirEntry]) -> str:
    """Changes when a file is added, removed, or written to."""
    digest = hashlib.sha256()
    for entry in entries:
        status = entry.stat()
        digest.update(repr((os.fsencode(entry.name), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


# -- the work -------------------------------------------------------------------------------------------


def _examine(
    jobs: list[Job],
    rules: Rules,
    known: dict[tuple, list[ScanRecord]],
    output: Path | None,
    workers: int,
    progress: bool,
) -> Iterator[ScanRecord]:
    todo = []
    for job in jobs:
        key = (job.path, _format(job), job.source_key)
        if key in known:
            yield from known[key]
        else:
            todo.append(job)
    if not todo:
        return
    log = _Log(output, rules)
    with tqdm(total=len(todo), desc="scan", unit="scan", disable=not progress) as bar:
        done: dict[str, list[ScanRecord]] = defaultdict(list)
        left: Counter[str] = Counter()
        for job, records, more in _run(todo, rules, workers):
            yield from records
            bar.total += len(more)
            bar.update(1)
            if job.kind in ("folder", "series"):  # a folder is noted when all its series are
                done[job.path] += records
                left[job.path] += len(more) - (job.kind == "series")
                if left[job.path] == 0:
                    log.note(job.path, "dicom", job.source_key, done.pop(job.path))
            else:
                log.note(job.path, "file", job.source_key, records)


def _format(job: Job) -> str:
    return "dicom" if job.kind in ("folder", "series") else "file"


def _run(jobs: list[Job], rules: Rules, workers: int) -> Iterator[tuple[Job, list[ScanRecord], list[Job]]]:
    """Outcomes as they come, from processes; what kills its process is tried once more alone, then refused."""
    waiting = deque(jobs)
    if workers <= 1:
        while waiting:
            job = waiting.popleft()
            records, more = run_job(job, rules)
            waiting.extendleft(reversed(more))
            yield job, records, more
        return
    suspects: deque[Job] = deque()
    while waiting or suspects:
        alone = bool(suspects)
        queue, count = (suspects, 1) if alone else (waiting, min(workers, len(jobs)))
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            running: dict[Future, Job] = {}
            broken = False
            while (queue or running) and not broken:
                while queue and len(running) < (1 if alone else 2 * count):
                    job = queue.popleft()
                    running[pool.submit(run_job, job, rules)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        records, more = future.result()
                    except BrokenProcessPool:
                        broken = True
                        if alone:
                            record = ScanRecord(job.path, _format(job), "image", files=list(job.files))
                            record.format = "dicom" if job.kind in ("folder", "series") else "other"
                            record.source_key = job.source_key
                            record.add(Reason.READER_FAILED, "its process died")
                            yield job, [record], []
                        else:
                            suspects.append(job)
                        continue
                    waiting.extendleft(reversed(more))
                    yield job, records, more
            suspects.extend(running.values())


class _Log:
    """Finished work beside the manifest, a line each, so that a run that was killed goes on."""

    def __init__(self, output: Path | None, rules: Rules) -> None:
        self.path = _partial(output) if output else None
        self.head = json.dumps(_shown(rules), sort_keys=True)

    def note(self, path: str, kind: str, source_key: str, records: list[ScanRecord]) -> None:
        if self.path is None:
            return
        line = json.dumps([self.head, path, kind, source_key, [_sparse(record) for record in records]])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # only what makes the next run faster
            logger.warning(
                "%s: cannot be written (%s); a run that is killed will start anew.", self.path, error
            )
            self.path = None


def _known_records(output: Path | None, manifest: Manifest) -> dict[tuple, list[ScanRecord]]:
    """Records of an earlier or interrupted run by what they were read from, as they left their process."""
    known: dict[tuple, list[ScanRecord]] = defaultdict(list)
    if output is None:
        return known
    if output.is_file():
        try:
            earlier = Manifest.load(output)
        except ManifestError as error:
            raise ManifestError(f"{error} Or save to another file than {output}.") from error
        if earlier.rules == manifest.rules and earlier.folder == manifest.folder:
            for record in earlier.records:
                if record.source_key:
                    kind = "dicom" if record.format == "dicom" else "file"
                    known[(record.path, kind, record.source_key)].append(_alone(record))
    partial = _partial(output)
    if partial.is_file():
        head = json.dumps(manifest.rules, sort_keys=True)
        for line in partial.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rules, path, kind, source_key, records = json.loads(line)
                if rules == head:
                    known[(path, kind, source_key)] = [_record(partial, 0, record) for record in records]
            except (ValueError, TypeError):
                continue  # the line that was being written when the run was killed
    return known


def _alone(record: ScanRecord) -> ScanRecord:
    """A record as it was before it was held against others."""
    reasons = [code for code in record.reasons if not Reason(code).relational]
    record.reasons, record.status = reasons, status_of(Reason(code) for code in reasons)
    record.label, record.duplicate_of, record.leaks = None, None, []
    return record


# -- names and labels -----------------------------------------------------------------------------------


def _name_all(records: list[ScanRecord], rules: Rules, pattern: re.Pattern | None) -> None:
    """Ids and patients; a patient that a DICOM tag named stays unless a pattern was asked for."""
    taken: dict[str, ScanRecord] = {}
    for record in sorted(records, key=lambda one: (one.path, one.files[:1], one.format)):
        name = _identity(record)
        named = record.format == "dicom" and record.patient  # by a tag
        if not named or (pattern and pattern.search(record.path)):
            record.patient = rules.hidden(_patient(record, pattern), "p")
        plain = rules.hidden(name, "s") if rules.hash_ids else re.sub(r"[^\w.\-]+", "_", name)
        record.id, number = plain, 1
        while record.id in taken:
            number += 1
            record.id = f"{plain}-{number}"
        if number > 1 and record.kind != "other" and record.kind == taken[plain].kind:
            for one in (record, taken[plain]):
                one.add(Reason.DUPLICATE_ID)
        taken[record.id] = record


def _identity(record: ScanRecord) -> str:
    """The relative path without its suffix; of one part of a series, with its first slice."""
    if record.kind == "other":
        return record.path
    if record.format == "dicom":
        return f"{record.path}/{Path(record.files[0]).name}" if record.files else record.path
    path = Path(record.path)
    return path.with_name(stem(path)).as_posix()


def _patient(record: ScanRecord, pattern: re.Pattern | None) -> str:
    found = (pattern.search(record.path) if pattern else None) or _TCGA.search(record.path)
    found = found or _SUBJECT.search(record.path)
    if found:
        return found.group(1) if found.groups() else found.group(0)
    path = Path(record.path)
    if record.format == "dicom":
        return record.path
    name = re.sub(
        r"([_\-. ](ct|mri?|image|img|\d{4}|labels?|seg|segmentation|mask))+$",
        "",
        stem(path),
        flags=re.IGNORECASE,
    )
    return path.parent.as_posix() if _PLAIN_NAME.match(name) and path.parent.name else name


def _pair_labels(records: list[ScanRecord]) -> None:
    labels = {_pair_key(Path(record.path)): record for record in records if record.kind == "label"}
    images = [record for record in records if record.kind == "image" and record.format != "dicom"]
    left = sorted(images, key=lambda image: image.path)
    for cut_tail in (
        False,
        True,
    ):  # as list_scans pairs: by the whole name, then without _ct, _0000 and the like
        alone = []
        for image in left:
            label = labels.pop(_pair_key(Path(image.path), cut_tail=cut_tail), None)
            if label is None:
                alone.append(image)
            else:
                _join(image, label)
        left = alone
    for label in labels.values():
        label.add(Reason.ORPHAN_LABEL)


def _join(image: ScanRecord, label: ScanRecord) -> None:
    """Give an image its label, if their grids are one."""
    label.patient = image.patient
    if image.status == REJECTED or not image.affine:
        return
    if label.status != REJECTED and not _same_grid(image, label):
        label.add(Reason.LABEL_MISMATCH, f"{label.shape} for {image.shape}")
    if label.status == REJECTED:
        image.add(Reason.LABEL_UNUSABLE)
    else:
        image.label = label.path


def _same_grid(image: ScanRecord, label: ScanRecord) -> bool:
    return image.shape == label.shape and np.allclose(
        image.affine, label.affine, atol=0.01 * min(image.spacing_mm)
    )


# -- the same scan twice --------------------------------------------------------------------------------


def _mark_duplicates(records: list[ScanRecord]) -> None:
    """The first of equals stays: one with a label, else the first path."""
    images = sorted(
        (record for record in records if record.usable),
        key=lambda one: (one.label is None, one.path, one.files[:1]),
    )
    first: dict[str, ScanRecord] = {}
    for record in images:
        kept = first.setdefault(record.content_hash, record)
        if kept is not record:
            record.duplicate_of = kept.id
            record.add(Reason.DUPLICATE)
    different = list(first.values())
    for kept, record in _near(different, different):
        if record.duplicate_of is None and kept.duplicate_of is None:
            record.duplicate_of = kept.id
            record.add(Reason.NEAR_DUPLICATE)


def _near(
    some: Sequence[ScanRecord], others: Sequence[ScanRecord]
) -> Iterator[tuple[ScanRecord, ScanRecord]]:
    """Pairs (from some, from others) whose bodies look the same and are of one size; of one list, each pair once."""
    ours = [record for record in some if record.body_hash]
    theirs = [record for record in others if record.body_hash]
    for i, j, _ in near_pairs([r.body_hash for r in ours], [r.body_hash for r in theirs], NEAR):
        if some is others and i >= j:
            continue
        sizes = np.array([ours[i].body_mm, theirs[j].body_mm])
        if ours[i].modality == theirs[j].modality and (np.ptp(sizes, axis=0) <= 15 + 0.03 * sizes[0]).all():
            yield ours[i], theirs[j]


def _mark_leaks(manifest: Manifest, source: Path, rules: Rules, workers: int, progress: bool) -> None:
    """Hold a manifest's usable images against those of another manifest, datalist or folder."""
    theirs, comparable = _records_of(source, rules, workers, progress)
    ours = manifest.usable
    by_hash = {record.content_hash: record for record in theirs}
    patients = {record.patient for record in theirs} if comparable else set()
    for record in ours:
        if record.content_hash in by_hash:
            record.leaks.append(f"{source.name}: {by_hash[record.content_hash].id}")
            record.add(Reason.LEAK)
        elif record.patient in patients:
            record.add(Reason.PATIENT_LEAK)
    exact = {record.id for record in ours if Reason.LEAK.value in record.reasons}
    for record, other in _near(ours, theirs):
        if record.id not in exact:
            record.leaks.append(f"{source.name}: {other.id}")
            record.add(Reason.NEAR_LEAK)


def _records_of(source: Path, rules: Rules, workers: int, progress: bool) -> tuple[list[ScanRecord], bool]:
    """Images of a manifest, datalist or folder, and whether their patients can be compared with ours."""
    if source.is_file():
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ManifestError(f"{source}: no readable manifest or datalist ({error}).") from error
        if isinstance(content, dict) and str(content.get("format", "")).startswith("alice-manifest"):
            other = Manifest.load(source)
            images = [record for record in other.records if record.kind == "image" and record.content_hash]
            return images, other.rules.get("salt") == _shown(rules)["salt"]
    try:
        scans = list_scans(source)
    except ScanError as error:
        raise ManifestError(str(error)) from error
    jobs = [Job(scan.image.parent.resolve(), scan.image.name, "file", "") for scan in scans]
    images = []
    with tqdm(total=len(jobs), desc=f"against {source.name}", unit="scan", disable=not progress) as bar:
        for job, records, _ in _run(jobs, rules, workers):
            bar.update(1)
            for record in records:
                record.id = rules.hidden(job.path, "s")
                images.append(record)
    return [record for record in images if record.content_hash], False


# -- as JSON --------------------------------------------------------------------------------------------


def _shown(rules: Rules) -> dict[str, Any]:
    """Rules as they may be written: of the salt only enough to tell whether another is the same."""
    check = hashlib.blake2b(b"alice", digest_size=4, key=rules.salt.encode()[:64]).hexdigest()
    return {k: v for k, v in asdict(rules).items() if k != "salt"} | {"salt": check}


def _sparse(record: ScanRecord) -> dict[str, Any]:
    """A record without what is empty."""
    return {
        k: v for k, v in asdict(record).items() if v not in (None, "", [], {}) or k in ("status", "reasons")
    }


_PLAIN = {"str": (str,), "str | None": (str,), "float | None": (int, float), "int": (int,)}


def _record(path: Path, index: int, entry: Any) -> ScanRecord:
    def refuse(what: str) -> ManifestError:
        return ManifestError(f"{path}: record {index} {what}. Scan the folder again.")

    if not isinstance(entry, dict):
        raise refuse("is no object")
    known = {one.name: one.type for one in fields(ScanRecord)}
    for key, value in entry.items():
        if key not in known:
            raise refuse(f"has an unknown field {key!r}")
        kind = str(known[key])
        wanted = _PLAIN.get(kind, (dict,) if kind.startswith("dict") else (list,))
        if not isinstance(value, wanted):
            raise refuse(f"has {key!r} of another type than {kind}")
    for key in ("path", "format", "kind", "status"):
        if key not in entry:
            raise refuse(f"lacks {key!r}")
    for name in [entry["path"], *entry.get("files", []), *([entry["label"]] if "label" in entry else [])]:
        if not isinstance(name, str) or posixpath.isabs(name) or ".." in name.split("/"):
            raise refuse(f"has a path that leaves the folder: {name!r}")
    reasons = entry.get("reasons", [])
    if any(code not in Reason._value2member_map_ for code in reasons):
        raise refuse("has an unknown reason")
    if entry["status"] != status_of(Reason(code) for code in reasons):
        raise refuse(f"is {entry['status']!r} against its reasons")
    return ScanRecord(**entry)


def _relative(folder: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(folder, start.resolve())).as_posix()
    except ValueError:  # another drive
        return folder.as_posix()


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _salt_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.salt")


def _kept_salt(output: Path | None) -> str:
    """The salt beside a manifest, drawn when there is none."""
    if output is None:
        return secrets.token_hex(16)
    path = _salt_file(output)
    try:
        if path.is_file() and (salt := path.read_text(encoding="ascii").strip()):
            return salt
        salt = secrets.token_hex(16)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(salt + "\n")
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"{path}: cannot be read or written ({error}). Give a salt, or another output."
        ) from error
    return salt


def summary(manifest: Manifest) -> str:
    """A few lines for the terminal."""
    lines = [str(manifest.folder)]
    for kind, found in sorted(manifest.counts().items()):
        lines.append(f"{kind:<8}" + "  ".join(f"{number} {status}" for status, number in found.items()))
    lines.append(f"{len({record.patient for record in manifest.usable})} patients can be used")
    for reason, records in manifest.by_reason().items():
        lines.append(f"{len(records):>6}  {reason.value:<18}{reason.sentence}")
    return "\n".join(lines)
