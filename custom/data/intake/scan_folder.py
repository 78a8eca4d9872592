"""Scan a folder: find every scan in it, and make a manifest of those that can be used and those that are refused."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import fsspec

from custom.data.arguments import whole_number, worker_count
from custom.data.errors import ManifestError
from custom.data.formats.dicom_series import MIN_SLICES
from custom.data.formats.reasons import REJECTED
from custom.data.formats.voxels import MOST_BYTES
from custom.data.intake.duplicates import mark_duplicates, mark_leaks, mark_spread
from custom.data.intake.examine_all import examine_all, known_records, partial_of, shown
from custom.data.intake.find_files import find_files
from custom.data.intake.ids_and_labels import name_all, pair_labels
from custom.data.intake.manifest import Manifest
from custom.data.intake.scan_record import PROFILES, Rules
from custom.data.remote import is_url


def exit_code(manifest: Manifest) -> int:
    """Exit code for scripts: 0 if every image can be used, 3 if some were rejected, 4 if none can be used.

    Warnings, labels and files without a volume do not count. Codes 1 and 2 mean that the command failed, or was called
    wrongly.
    """
    if not manifest.usable:
        return 4
    rejected = any(record.kind == "image" and record.status == REJECTED for record in manifest.records)
    return 3 if rejected else 0


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
    workers: int | None = 1,
    progress: bool = True,
) -> Manifest:
    """Find every scan under a folder, examine it, and decide whether it can be used.

    Args:
        folder: of NIfTI, NRRD, MetaImage and raw DICOM, in any order and depth.
        output: where to save the manifest. Files that an earlier manifest there, or an interrupted run (``.partial``),
            knows with the same path, size and time are not read again.
        against: manifests (or their URLs), datalists or folders that must not share scans with this one (a leakage check).
        profile: ``ct``, ``mr`` or ``zscore``; images of other modalities are refused (``other_modality``).
        min_slices: scans with fewer slices along Superior are refused.
        most_bytes: scans with more bytes of voxels are refused before they are read.
        patient_pattern: regular expression that finds the patient in the relative path, as its first group or as the
            whole match. None takes DICOM's PatientID, TCGA barcodes, BIDS subjects, or folder and file names.
        hash_ids: write salted hashes of scans and patients; False writes the names themselves.
        salt: secret of the hashes. Manifests with the same salt can be compared by patient. None takes the one kept
            beside ``output`` (``.salt``, which only its owner can read), or draws one.
        workers: processes; None takes :func:`custom.data.arguments.default_workers`.
        progress: show a bar.

    Returns:
        The manifest, saved if ``output`` was given. No error comes from the content of files.

    Raises:
        AliceError: if ``min_slices``, ``most_bytes`` or ``workers`` is not a whole number, or too small.
        ManifestError: if the folder does not exist, the profile is unknown, the pattern is not a regular expression, or
            ``output`` or ``against`` cannot be used.
    """
    folder, output = _local(folder), _local(output) if output else None
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder.")
    if profile not in PROFILES:
        raise ManifestError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}.")
    try:
        pattern = re.compile(patient_pattern) if patient_pattern else None
    except re.error as error:
        raise ManifestError(
            f"patient_pattern {patient_pattern!r} is not a regular expression: {error}."
        ) from error
    whole_number("min_slices", min_slices, 1)
    whole_number("most_bytes", most_bytes, 1)
    workers = worker_count(workers)
    salt = salt or _kept_salt(output)
    rules = Rules(profile, min_slices, most_bytes, salt, hash_ids, patient_pattern or "")
    manifest = Manifest(folder.resolve(), rules=shown(rules))
    jobs, problems, manifest.others = find_files(manifest.folder, _ours(output))
    known = known_records(output, manifest)
    manifest.records = problems + list(examine_all(jobs, rules, known, output, workers, progress))
    name_all(manifest.records, rules, pattern)
    pair_labels(manifest.records)
    mark_spread(manifest.records)
    mark_duplicates(manifest.records)
    for other in against:
        mark_leaks(manifest, other, rules, workers, progress)
    manifest.records.sort(key=lambda record: (record.path, record.files[:1]))
    if output:
        manifest.save(output)
        partial_of(output).unlink(missing_ok=True)
    return manifest


def _local(path: str | Path) -> Path:
    """A path; a ``file://`` URL becomes one."""
    if is_url(str(path)) and not str(path).startswith(("file://", "local://")):
        raise ManifestError(
            f"{path}: a folder at a URL cannot be scanned. Copy or mount the folder, and scan it there."
        )
    return Path(fsspec.core.strip_protocol(str(path)) if is_url(str(path)) else path).expanduser()


def _ours(output: Path | None) -> list[Path]:
    """The files that a scan writes."""
    return [output, partial_of(output), _salt_file(output)] if output else []


def _salt_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.salt")


def _kept_salt(output: Path | None) -> str:
    """The salt beside a manifest; drawn if there is none."""
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
