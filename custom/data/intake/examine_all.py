"""Examine scans in worker processes; a file that crashes its reader is reported, not fatal. An interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from custom.data.errors import ManifestError
from custom.data.formats.reasons import Reason, status_of
from custom.data.intake.examine import run_job
from custom.data.intake.manifest import Manifest, record_of, sparse
from custom.data.intake.scan_record import Job, Rules, ScanRecord
from custom.processes import end_with_parent

logger = logging.getLogger(__name__)


def examine_all(
    jobs: list[Job],
    rules: Rules,
    known: dict[tuple, list[ScanRecord]],
    output: Path | None,
    workers: int,
    progress: bool,
) -> Iterator[ScanRecord]:
    """Examine every job that is not known yet; finished ones are noted beside ``output``.

    Args:
        jobs: from ``find_files``.
        rules: of the examination.
        known: records of an earlier run, from :func:`known_records`.
        output: the manifest that will be written; None notes nothing.
        workers: processes.
        progress: show a progress bar.
    """
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
        for job, records, more in run_jobs(todo, rules, workers):
            yield from records
            bar.total += len(more)
            bar.update(1)
            if job.kind in ("folder", "series"):  # a folder is finished when all its series are
                done[job.path] += records
                left[job.path] += len(more) - (job.kind == "series")
                if left[job.path] == 0:
                    log.note(job.path, "dicom", job.source_key, done.pop(job.path))
            else:
                log.note(job.path, "file", job.source_key, records)


def _format(job: Job) -> str:
    return "dicom" if job.kind in ("folder", "series") else "file"


def run_jobs(
    jobs: list[Job], rules: Rules, workers: int
) -> Iterator[tuple[Job, list[ScanRecord], list[Job]]]:
    """Do jobs in worker processes. Yields each job with its records and new jobs, in the order of completion.

    A job that kills its process is tried once more, alone. If the process dies again, the scan is refused.
    """
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
        with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
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
    """Finished jobs, one line each, in a file beside the manifest: a run that was killed goes on from there."""

    def __init__(self, output: Path | None, rules: Rules) -> None:
        self.path = partial_of(output) if output else None
        self.head = json.dumps(shown(rules), sort_keys=True)

    def note(self, path: str, kind: str, source_key: str, records: list[ScanRecord]) -> None:
        if self.path is None:
            return
        line = json.dumps([self.head, path, kind, source_key, [sparse(record) for record in records]])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # not fatal: the file only makes a later run faster
            logger.warning(
                "%s: cannot be written (%s). If this run is killed, the next one starts from the beginning.",
                self.path,
                error,
            )
            self.path = None


def known_records(output: Path | None, manifest: Manifest) -> dict[tuple, list[ScanRecord]]:
    """Records of an earlier or interrupted run, by path, kind and source key, before they were compared with others."""
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
    partial = partial_of(output)
    if partial.is_file():
        head = json.dumps(manifest.rules, sort_keys=True)
        for line in partial.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rules, path, kind, source_key, records = json.loads(line)
                if rules == head:
                    known[(path, kind, source_key)] = [record_of(partial, 0, record) for record in records]
            except (ValueError, TypeError, RecursionError):
                continue  # the line that was being written when the run was killed
    return known


def _alone(record: ScanRecord) -> ScanRecord:
    """The record without what came from comparing it with others."""
    reasons = [code for code in record.reasons if not Reason(code).relational]
    record.reasons, record.status = reasons, status_of(Reason(code) for code in reasons)
    record.label, record.duplicate_of, record.leaks = None, None, []
    return record


def shown(rules: Rules) -> dict[str, Any]:
    """Rules as written to a manifest. The salt is replaced by a short check value, which tells whether two salts are equal."""
    check = hashlib.blake2b(b"alice", digest_size=4, key=rules.salt.encode()[:64]).hexdigest()
    return {k: v for k, v in asdict(rules).items() if k != "salt"} | {"salt": check}


def partial_of(output: Path) -> Path:
    """Where an interrupted run keeps its finished jobs."""
    return output.with_name(f"{output.name}.partial")
