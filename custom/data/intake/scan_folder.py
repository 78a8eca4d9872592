"""From a folder of anything to a manifest: every scan in it, what we took, what we refused and why."""

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
from custom.data.intake.manifest import Manifest
from custom.data.intake.names import name_all, pair_labels
from custom.data.intake.records import PROFILES, Rules
from custom.data.intake.repeats import mark_duplicates, mark_leaks, mark_spread
from custom.data.intake.walk import walk
from custom.data.intake.work import examine, known_records, partial_of, shown
from custom.data.remote import is_url


def exit_code(manifest: Manifest) -> int:
    """For scripts: 0 if every image can be used, 3 if some were rejected, 4 if none can be used.

    A warning does not count, nor do labels and files that hold no volume. 1 and 2 are left to a command that fails
    and to one that is called wrongly.
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
    """Find, examine and judge every scan under a folder.

    Args:
        folder: of NIfTI, NRRD, MetaImage and raw DICOM, in any order and depth.
        output: where to save the manifest. An earlier one there, or what a run that was killed left beside it
            (``.partial``), is taken up: files of the same path, size and time are not read again.
        against: manifests (or their URLs), datalists or folders that must not share scans with this one (a leakage check).
        profile: ``ct``, ``mr`` or ``zscore``; images of other modalities are set aside (``other_modality``).
        min_slices: along Superior; fewer are refused.
        most_bytes: of voxels in one scan; a header that promises more is refused unread.
        patient_pattern: regular expression on the relative path; its first group (or the whole match) is the patient.
            None takes DICOM's PatientID, TCGA barcodes, BIDS subjects, or folder and file names.
        hash_ids: write salted hashes for scans and patients; False writes names from the paths, and the patients
            as they are.
        salt: secret of the hashes; equal salts make patients comparable between manifests. None takes the one kept
            beside ``output`` (``.salt``, readable to its owner only), or draws one.
        workers: processes; None takes :func:`custom.data.arguments.default_workers`.
        progress: show a bar.

    Returns:
        The manifest, saved if ``output`` was given. Whatever the files hold, no error comes from them.

    Raises:
        ValueError: for a number of slices or workers that is none.
        ManifestError: for a folder that is none, an unknown profile, a pattern that is none, or an ``output`` or
            ``against`` that cannot be used.
    """
    folder, output = _local(folder), _local(output) if output else None
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
    whole_number("min_slices", min_slices, 1)
    workers = worker_count(workers)
    salt = salt or _kept_salt(output)
    rules = Rules(profile, min_slices, most_bytes, salt, hash_ids, patient_pattern or "")
    manifest = Manifest(folder.resolve(), rules=shown(rules))
    jobs, problems, manifest.others = walk(manifest.folder, _ours(output))
    known = known_records(output, manifest)
    manifest.records = problems + list(examine(jobs, rules, known, output, workers, progress))
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
    """A path, or a ``file://`` URL as one."""
    if is_url(str(path)) and not str(path).startswith(("file://", "local://")):
        raise ManifestError(
            f"{path}: scans are examined where they lie. Copy or mount the folder, and scan it there."
        )
    return Path(fsspec.core.strip_protocol(str(path)) if is_url(str(path)) else path).expanduser()


def _ours(output: Path | None) -> list[Path]:
    """What a scan writes."""
    return [output, partial_of(output), _salt_file(output)] if output else []


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
