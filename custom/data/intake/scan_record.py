"""What a manifest says about a scan; the rules and jobs of an examination."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from custom.data.formats.dicom_series import MIN_SLICES, Series
from custom.data.formats.reasons import REJECTED, Reason, status_of
from custom.data.formats.voxels import MOST_BYTES

PROFILES = {
    "ct": ("CT",),
    "mr": ("MR",),
    "zscore": ("CT", "MR", "PT"),
}  # intensity profile -> modalities it takes
HISTOGRAM_HU = (-1024, 3072, 64)  # first and last edge, bins


@dataclass
class ScanRecord:
    """What a manifest says about one scan, label or refused file. Paths are relative to the scanned folder."""

    path: str  # the file, or the folder of a DICOM series
    format: str  # nifti, nrrd, metaimage, dicom, or other
    kind: str  # image, label, or other (not a volume)
    id: str = ""
    patient: str = ""  # salted hash, unless names were asked for
    files: list[str] = field(default_factory=list)  # a DICOM series' slices, in order
    modality: str = ""
    profile: str = ""  # intensity profile that fits: ct, mr, zscore
    shape: list[int] = field(default_factory=list)
    spacing_mm: list[float] = field(default_factory=list)
    orientation: str = ""  # of the axes as stored, such as LPS
    affine: list[list[float]] = field(default_factory=list)  # voxel to world, RAS mm
    values: dict[str, float] = field(default_factory=dict)  # min, max, mean, std, p01, p50, p99 of a sample
    histogram: list[float] = field(default_factory=list)  # shares in HISTOGRAM_HU's bins, of CT
    padding: float | None = None  # the value outside the reconstruction
    body_mm: list[float] = field(default_factory=list)  # extent of the body along R, A, S
    content_hash: str = ""  # of the values turned to RAS: the same in every file format
    body_hash: str = ""  # of the body's coarse appearance: similar after resampling
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    label: str | None = None
    duplicate_of: str | None = None  # the id of the scan that it repeats
    leaks: list[str] = field(default_factory=list)  # "list: id" of scans in other data that it repeats
    bytes: int = 0
    series: str = ""  # salted hash of a DICOM series' UID and patient
    source_key: str = ""  # of names, sizes and times of the files that it was read from

    @property
    def usable(self) -> bool:
        """An image that was accepted, with a warning or without."""
        return self.kind == "image" and self.status != REJECTED

    def add(self, reason: Reason, detail: str = "") -> None:
        """Add a reason, unless it is there already, and update the status."""
        if reason.value not in self.reasons:
            self.reasons.append(reason.value)
            self.detail = "; ".join(part for part in (self.detail, detail) if part)
        self.status = status_of(Reason(code) for code in self.reasons)


@dataclass(frozen=True)
class Rules:
    """Settings of an examination. Records that were made with other rules are not reused."""

    profile: str = "ct"
    min_slices: int = MIN_SLICES
    most_bytes: int = MOST_BYTES
    salt: str = field(default="", repr=False)
    hash_ids: bool = True
    patient_pattern: str = ""

    def hidden(self, identity: str, prefix: str) -> str:
        """A salted hash of what could identify a patient; the text itself if ``hash_ids`` is False."""
        return self.hashed(identity, prefix) if self.hash_ids else identity

    def hashed(self, identity: str, prefix: str) -> str:
        """A salted hash, also if ``hash_ids`` is False."""
        key = self.salt.encode()[:64]
        digest = hashlib.blake2b(
            identity.strip().upper().encode("utf-8", "surrogatepass"), digest_size=8, key=key
        )
        return f"{prefix}-{digest.hexdigest()}"


@dataclass(frozen=True)
class Job:
    """What one process examines: a file, the DICOM files of a folder, or one series among them."""

    root: Path
    path: str
    kind: str  # file, label, folder, series
    source_key: str
    files: tuple[str, ...] = ()
    series: Series | None = None
