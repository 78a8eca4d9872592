"""Commands about scans: phantoms, intake, stores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from custom.errors import AliceError, shown

if TYPE_CHECKING:
    from custom.data.store.volume_store import VolumeStore


def phantom(
    folder: str,
    n: int = 24,
    seed: int = 0,
    size: str = "standard",
    canonical: bool = True,
    labels: str = "flare22",
) -> None:
    """Write a cohort of synthetic CT-like torsos with labels and exact correspondence.

    Args:
        folder: to write, in the layout of the labels' data set (images/, labels/; or imagesTr/, labelsTr/).
        n: subjects.
        seed: of the whole cohort.
        size: standard, or small for trials.
        canonical: also write the dense correspondence of every subject.
        labels: flare22 or btcv, whose organs are labelled, in whose order.
    """
    from custom.data.phantom.cohort import write_cohort

    with tqdm(total=n, desc="phantoms") as bar:
        write_cohort(
            Path(folder),
            n,
            seed,
            size=size,
            canonical=canonical,
            labels=labels,
            progress=lambda done, total: bar.update(done - bar.n),
        )


def scan(
    folder: str,
    o: str = "manifest.json",
    report: str | None = None,
    against: Sequence[str] = (),
    profile: str = "ct",
    min_slices: int = 16,
    most_bytes: int = 4_000_000_000,
    patient_pattern: str | None = None,
    hash_ids: bool = True,
    salt: str | None = None,
    workers: int | None = None,
) -> None:
    """Say what is in a folder: which scans can be used, which cannot and why; resumable. Exit code 0, 3 or 4 (1: it failed).

    Args:
        folder: of NIfTI, NRRD, MetaImage, and DICOM.
        o: the manifest to write.
        report: an HTML page to write.
        against: other manifests or datalists to check for leakage.
        profile: of intensities, ct, mr or zscore.
        min_slices: fewer make no volume.
        most_bytes: of voxels in a scan; a larger one is refused before it is read.
        patient_pattern: regular expression on the path; its first group is the patient.
        hash_ids: write salted hashes instead of patients' identifiers.
        salt: of those hashes, to compare manifests.
        workers: processes; by default as many as there are cores, at least 2, at most 4.
    """
    from custom.cli.scan_summary import summary
    from custom.data.intake.scan_folder import exit_code, scan_folder

    made = scan_folder(
        folder,
        output=o,
        against=[against] if isinstance(against, str) else list(against),
        profile=profile,
        min_slices=min_slices,
        most_bytes=most_bytes,
        patient_pattern=patient_pattern,
        hash_ids=hash_ids,
        salt=salt,
        workers=workers,
    )
    print(summary(made))
    if report:
        from custom.data.scan_page import intake_page

        intake_page(made).write(report)
    sys.exit(exit_code(made))


def build(
    source: str | None = None,
    store: str | None = None,
    spacing: Sequence[float] = (1.5, 1.5, 2.0),
    bad_scans_allowed: int = 0,
    workers: int | None = None,
    patient_pattern: str | None = None,
    check: bool | str = False,
    o: str | None = None,
    profile: str | None = None,
    crop_body: bool | None = None,
    margin_mm: float | None = None,
    remove_table: bool | None = None,
    part: str | None = None,
    check_disk: bool = True,
    most_bytes: int = 4_000_000_000,
) -> None:
    """Bring a folder of scans (or a datalist JSON) onto one grid, ready to be read crop by crop; resumable.

    Args:
        source: folder, datalist, or manifest of alice scan.
        store: folder to write.
        spacing: mm along x, y, z, as "[1.5,1.5,2.0]".
        bad_scans_allowed: unusable scans to skip.
        workers: processes; by default as many as there are cores, at least 2, at most 4.
        patient_pattern: regular expression on the path; its first group is the patient.
        check: decode every volume (afterwards) and compare checksums; alice build --check STORE builds nothing.
        o: the same as store.
        profile: of intensities, ct, mr or zscore; the manifest's by default.
        crop_body: cut volumes to the body's box; the default.
        margin_mm: of air kept around that box; 10 by default.
        remove_table: make air of what lies off the body.
        part: i/n, to build on n machines; the last one, or a plain build, writes the index.
        check_disk: refuse a disk that is too small before anything is written.
        most_bytes: of voxels in a scan, in its file and in the store; a larger one is refused before it is read.
    """
    from custom.data.store.build import build_part, build_store
    from custom.data.store.volume_store import VolumeStore

    store = store or o
    only = check if isinstance(check, str) else source if check and source and not store else None
    if only is not None and not (isinstance(check, str) and source and store):
        if source and only != source:
            raise AliceError(f"--check {only} builds nothing; leave out {source}.")
        _check_store(VolumeStore(only))
        return
    if not source or not store:
        raise AliceError(
            "Give what to build and where: alice build SCANS STORE; or alice build --check STORE."
        )
    options: dict[str, Any] = {
        "spacing": spacing,
        "bad_scans_allowed": bad_scans_allowed,
        "workers": workers,
        "patient_pattern": patient_pattern,
        "profile": profile,
        "crop_body": crop_body,
        "margin_mm": margin_mm,
        "remove_table": remove_table,
        "check_disk": check_disk,
        "most_bytes": most_bytes,
    }
    made: VolumeStore | None
    if part is None:
        made = build_store(source, store, **options)
    else:
        made = build_part(source, store, str(part), **options)
    if made is None:
        print(f"{store}: part {part} is done; the index is written when the other parts are.")
        return
    patients = {made.patient(name) for name in made.names}
    print(f"{store}: {len(made)} volumes of {len(patients)} patients at {list(made.spacing)} mm.")
    if check:
        _check_store(made)


def _check_store(store: VolumeStore) -> None:
    """Print what is wrong, by file; exit code 1 if anything is."""
    number = 0
    for _, fault in tqdm(store.faults(), desc="check", unit=" fault", disable=None):
        number += 1
        print(shown(fault))
    print(
        f"{store.path}: {len(store)} volumes, {f'{number} damaged file(s)' if number else 'all as they were written'}."
    )
    if number:
        sys.exit(1)
