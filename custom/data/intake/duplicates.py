"""Find scans that are there twice, or that are also in data which must stay separate (leaks)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from custom.data.errors import ManifestError, ScanError
from custom.data.formats.reasons import Reason
from custom.data.intake.examine_all import run_jobs, shown
from custom.data.intake.fingerprint import near_pairs
from custom.data.intake.manifest import Manifest
from custom.data.intake.scan_record import Job, Rules, ScanRecord
from custom.data.remote import is_url
from custom.data.scans import list_scans
from custom.files import read_json

# 1 - correlation of body hashes. Measured on 86 CTs: two patients differ by at least 0.043. The same scan
# differs by at most 0.013 after noise of 30 HU, and by at most 0.032 after resampling.
NEAR = 0.03


def mark_duplicates(records: list[ScanRecord]) -> None:
    """Refuse repeated scans. One with a label stays, else the first in the order of paths."""
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


def mark_spread(records: list[ScanRecord]) -> None:
    """Refuse a series whose slices lie in several folders, since each holds only a part. Whole copies are duplicates."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        if record.format == "dicom" and record.kind == "image" and record.series:
            found[record.series][record.path].add(record.content_hash)
    for record in records:
        contents = list(found.get(record.series, {}).values()) if record.series else []
        # a series that was refused before its pixels were read has no hash: it may or may not be a copy
        parts = any(one != contents[0] or "" in one for one in contents)
        if len(contents) > 1 and parts and record.kind == "image":
            record.add(Reason.SPREAD_SERIES, f"{len(contents)} folders")


def _near(
    some: Sequence[ScanRecord], others: Sequence[ScanRecord]
) -> Iterator[tuple[ScanRecord, ScanRecord]]:
    """Pairs of scans whose bodies look the same and have the same size. Within one list, each pair comes once."""
    ours = [record for record in some if record.body_hash]
    theirs = [record for record in others if record.body_hash]
    for i, j, _ in near_pairs([r.body_hash for r in ours], [r.body_hash for r in theirs], NEAR):
        if some is others and i >= j:
            continue
        sizes = np.array([ours[i].body_mm, theirs[j].body_mm])
        if ours[i].modality == theirs[j].modality and (np.ptp(sizes, axis=0) <= 15 + 0.03 * sizes[0]).all():
            yield ours[i], theirs[j]


def mark_leaks(manifest: Manifest, source: str | Path, rules: Rules, workers: int, progress: bool) -> None:
    """Mark images that are also in another manifest (or its URL), datalist or folder."""
    short = Path(str(source)).name
    theirs, comparable = _records_of(source, rules, workers, progress)
    ours = manifest.usable
    by_hash = {record.content_hash: record for record in theirs}
    patients = {record.patient for record in theirs} if comparable else set()
    for record in ours:
        if record.content_hash in by_hash:
            record.leaks.append(f"{short}: {by_hash[record.content_hash].id}")
            record.add(Reason.LEAK)
        elif record.patient in patients:
            record.add(Reason.PATIENT_LEAK)
    exact = {record.id for record in ours if Reason.LEAK.value in record.reasons}
    for record, other in _near(ours, theirs):
        if record.id not in exact:
            record.leaks.append(f"{short}: {other.id}")
            record.add(Reason.NEAR_LEAK)


def _records_of(
    source: str | Path, rules: Rules, workers: int, progress: bool
) -> tuple[list[ScanRecord], bool]:
    """Images of a manifest, datalist or folder; True if their patients' hashes can be compared with ours."""
    if is_url(str(source)):
        return _images_of(Manifest.load(source), rules)
    source = Path(source)
    if source.is_file():
        content = read_json(source, error=ManifestError, advice="Give a manifest, a datalist or a folder.")
        if isinstance(content, dict) and str(content.get("format", "")).startswith("alice-manifest"):
            return _images_of(Manifest.load(source), rules)
    try:
        scans = list_scans(source)
    except ScanError as error:
        raise ManifestError(str(error)) from error
    jobs = [Job(scan.image.parent.resolve(), scan.image.name, "file", "") for scan in scans]
    images = []
    with tqdm(total=len(jobs), desc=f"against {source.name}", unit="scan", disable=not progress) as bar:
        for job, records, _ in run_jobs(jobs, rules, workers):
            bar.update(1)
            for record in records:
                record.id = rules.hidden(job.path, "s")
                images.append(record)
    return [record for record in images if record.content_hash], False


def _images_of(other: Manifest, rules: Rules) -> tuple[list[ScanRecord], bool]:
    images = [record for record in other.records if record.kind == "image" and record.content_hash]
    return images, other.rules.get("salt") == shown(rules)["salt"]
