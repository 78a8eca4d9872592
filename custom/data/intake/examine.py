"""Examine one scan: what it holds, and what is wrong with it."""

from __future__ import annotations

import re

from custom.data.formats.dicom_header import SliceHeader, is_dicom, read_header
from custom.data.formats.dicom_series import Series, sort_series
from custom.data.formats.dicom_volume import stack
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import REJECTED, Fault, Reason, status_of
from custom.data.formats.voxels import Voxels, check_grid
from custom.data.intake.describe import describe
from custom.data.intake.scan_record import Job, Rules, ScanRecord

_NOBODY = re.compile(
    r"^(|anon.*|unknown|none|n/?a|[0x\-]+|patient)$", re.IGNORECASE
)  # patient ids that name nobody


def run_job(job: Job, rules: Rules) -> tuple[list[ScanRecord], list[Job]]:
    """Do one job. Returns records, and new jobs (the series of a folder). No error comes from the content of files."""
    record = ScanRecord(
        job.path, _format_of(job), "label" if job.kind == "label" else "image", files=list(job.files)
    )
    try:
        if job.kind == "folder":
            return _plan_folder(job, rules)
        if job.kind == "series":
            assert job.series is not None
            _examine_series(record, job, job.series, rules)
        else:
            record.bytes = (job.root / job.path).stat().st_size
            describe(record, open_scan(job.root / job.path, job.root, rules.most_bytes), rules)
    except Fault as fault:
        record.add(fault.reason, fault.detail)
    except MemoryError:
        record.add(Reason.BOMB, "out of memory")
    except Exception as error:  # an error here would end the whole scan
        record.add(Reason.READER_FAILED, type(error).__name__)
    record.status = status_of(Reason(code) for code in record.reasons)
    record.source_key = job.source_key
    return [record], []


def _format_of(job: Job) -> str:
    if job.kind in ("folder", "series"):
        return "dicom"
    name = job.path.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    return "nrrd" if name.endswith(("rrd", "hdr")) else "metaimage"


def _plan_folder(job: Job, rules: Rules) -> tuple[list[ScanRecord], list[Job]]:
    headers: list[SliceHeader] = []
    faults: dict[Reason, list[tuple[str, str]]] = {}
    for name in job.files:
        path = job.root / name
        try:
            if not path.name.lower().endswith((".dcm", ".dicom", ".ima")) and not is_dicom(path):
                continue
            headers.append(read_header(path))
        except Fault as fault:
            faults.setdefault(fault.reason, []).append((name, fault.detail))
        except OSError as error:
            faults.setdefault(Reason.UNREADABLE, []).append((name, type(error).__name__))
    records = []
    for reason, damaged in faults.items():
        kind = "other" if reason in (Reason.NO_PIXELS, Reason.NOT_AN_IMAGE) else "image"
        record = ScanRecord(
            job.path, "dicom", kind, files=[name for name, _ in damaged], source_key=job.source_key
        )
        record.add(reason, f"{len(damaged)} files; {damaged[0][1]}".strip("; "))
        records.append(record)
    jobs = []
    for series in sort_series(headers, rules.min_slices):
        if any(record.kind == "image" for record in records):
            series.reasons.append(Reason.DAMAGED_SLICES)
        files = tuple(path.relative_to(job.root).as_posix() for path in series.files)
        jobs.append(Job(job.root, job.path, "series", job.source_key, files, series))
    return records, jobs


def _examine_series(record: ScanRecord, job: Job, series: Series, rules: Rules) -> None:
    first = series.slices[0]
    record.modality = first.modality
    record.series = rules.hashed(f"{first.series} {first.patient_id}", "r") if first.series else ""
    record.detail = series.detail
    for reason in series.reasons:
        record.add(reason)
    identity = first.study if _NOBODY.match(first.patient_id) else first.patient_id
    record.patient = rules.hidden(identity, "p") if identity else ""
    record.shape = [first.columns, first.rows, len(series.slices)]
    record.bytes = sum((job.root / name).stat().st_size for name in job.files)
    if first.modality not in ("CT", "MR", "PT"):
        record.kind = "other"
        raise Fault(Reason.UNSUPPORTED, "not CT, MR or PET")
    if record.status != REJECTED:
        raw, affine = stack(series, rules.most_bytes)
        voxels = Voxels(raw, affine, warnings=check_grid(affine, raw.shape), modality=first.modality)
        describe(record, voxels, rules)
