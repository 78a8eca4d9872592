"""The manifest: every scan, label and refused file of a folder, as JSON that is checked when it is read."""

from __future__ import annotations

import json
import os
import posixpath
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from custom.data.errors import ManifestError, ScanError
from custom.data.formats.dicom_volume import read_series
from custom.data.formats.open_scan import open_scan
from custom.data.formats.reasons import ACCEPTED, REJECTED, WARNED, Fault, Reason, status_of
from custom.data.formats.voxels import MOST_BYTES
from custom.data.intake.scan_record import ScanRecord
from custom.data.remote import RemoteFolder, is_url
from custom.data.scans import Scan
from custom.files import decoded, is_plain_name, parse_json, read_text, stays_inside, write_text

FORMAT = "alice-manifest-1"
_PLAIN = {"str": (str,), "str | None": (str,), "float | None": (int, float), "int": (int,)}


@dataclass
class Manifest:
    """Every scan, label and refused file of a folder.

    Attributes:
        folder: the scanned folder; for a manifest at a URL, the folder for copies of its files.
        records: in the order of their paths.
        rules: of the examination, without the salt.
        others: how many files of which suffix were ignored, because they hold no scan.
        remote: for a manifest at a URL, the folder of the scans there.
    """

    folder: Path
    records: list[ScanRecord] = field(default_factory=list)
    rules: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    remote: RemoteFolder | None = None

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
        """The records of each reason, the most frequent reason first."""
        found: dict[Reason, list[ScanRecord]] = defaultdict(list)
        for record in self.records:
            for code in record.reasons:
                found[Reason(code)].append(record)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0].value)))

    def path_of(self, name: str) -> Path:
        """The path of a file of the scanned folder; for a folder at a URL, of its copy, which is fetched when first needed.

        Raises:
            StoreError: if it cannot be fetched.
        """
        return self.folder / name if self.remote is None else self.remote.fetch(name)

    def read(self, record: ScanRecord) -> tuple[np.ndarray, np.ndarray]:
        """Values (X, Y, Z) of a record, scaled as its header says, and affine (4, 4), voxel to RAS mm.

        Raises:
            ScanError: if it can no longer be read.
        """
        most_bytes = int(self.rules.get("most_bytes", MOST_BYTES))
        if record.format == "dicom":
            return read_series([self.path_of(name) for name in record.files], most_bytes)
        path = self.path_of(record.path)
        try:
            voxels = open_scan(path, self.folder, most_bytes)
        except Fault as fault:
            raise ScanError(f"{path}: {fault}") from fault
        return voxels.scaled(voxels.raw), voxels.affine

    def scans(self, fetch: bool = True) -> list[Scan]:
        """The usable images, to build a store from. A near-duplicate gets the patient of the scan that it repeats.

        A DICOM series has its first slice as ``image``, and all slices in order under ``extra["files"]``. ``extra`` also
        holds what :func:`custom.data.store.build_cost.build_cost` needs.

        Args:
            fetch: for a manifest at a URL, fetch every usable file; False only gives the paths of the copies.
        """
        patients = {record.id: record.patient for record in self.records}
        place = self.path_of if fetch else self.folder.joinpath
        found = []
        for record in self.usable:
            extra: dict[str, Any] = {"profile": record.profile, "modality": record.modality}
            extra |= {"shape": record.shape, "spacing_mm": record.spacing_mm, "body_mm": record.body_mm}
            if record.format == "dicom":
                extra["files"] = [place(name) for name in record.files]
            image = extra["files"][0] if record.format == "dicom" else place(record.path)
            patient = patients.get(record.duplicate_of or "", record.patient)
            label = place(record.label) if record.label else None
            found.append(Scan(record.id, image, patient, label, extra))
        return found

    def save(self, path: str | Path) -> Path:
        """Write the manifest.

        Raises:
            ManifestError: if it cannot be written, for example on a full disk. An earlier file stays.
        """
        path = Path(path)
        content = {
            "format": FORMAT,
            "folder": _relative(self.folder, path.parent),
            "rules": self.rules,
            "others": dict(sorted(self.others.items())),
            "records": [sparse(record) for record in self.records],
        }
        # ASCII keeps names that are not valid UTF-8 as they are
        text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
        write_text(path, text, sync=True, error=ManifestError, advice="Choose another place.")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read and check a manifest.

        Args:
            path: a file, or a URL that fsspec reads, such as ``s3://bucket/manifest.json``. Paths in a manifest are
                relative to its own folder.

        Raises:
            ManifestError: if the file is missing, is not a manifest, has another format or a field of another type, or
                names a path outside the folder.
        """
        url = str(path) if is_url(str(path)) else ""
        if url.startswith(("file://", "local://")):
            path, url = fsspec.core.strip_protocol(url), ""
        path = Path(path) if not url else path
        make_one = "Make one: alice scan FOLDER"
        text = _read_url(url, make_one) if url else read_text(path, error=ManifestError, advice=make_one)
        content = parse_json(text, path, error=ManifestError, advice="Scan the folder again.")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise ManifestError(
                f"{path}: format {found!r}, this version reads {FORMAT!r}. Scan the folder again."
            )
        for key, kind in (("folder", str), ("rules", dict), ("others", dict), ("records", list)):
            if not isinstance(content.get(key), kind):
                raise ManifestError(f"{path}: {key!r} must be a {kind.__name__}. Scan the folder again.")
        records = [record_of(path, index, entry) for index, entry in enumerate(content["records"])]
        if url:
            remote = RemoteFolder(_url_beside(url, content["folder"]))
            return cls(remote.folder, records, content["rules"], content["others"], remote)
        folder = Path(os.path.normpath(Path(path).resolve().parent / content["folder"]))
        return cls(folder, records, content["rules"], content["others"])


def is_manifest(path: str | Path) -> bool:
    """Whether a file says at its start that it is a manifest."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:  # UTF-16 has a zero beside every letter
        return b'"alice-manifest' in file.read(4096).replace(b"\0", b"")


def _read_url(url: str, make_one: str) -> str:
    """A small text file at a URL.

    Raises:
        ManifestError: if it does not exist, its protocol needs a package that is not installed, or the server does not
            answer.
    """
    try:
        with fsspec.open(url, "rb") as file:
            return decoded(file.read())
    except OSError as error:
        raise ManifestError(
            f"{url}: cannot be read ({error.strerror or type(error).__name__}). {make_one}"
        ) from error
    except (ImportError, ValueError) as error:
        raise ManifestError(
            f"{url}: cannot be read ({error}). Install fsspec's package for this protocol, or copy the manifest."
        ) from error


def _url_beside(url: str, relative: str) -> str:
    """The URL of a folder that is given relative to the URL of a file.

    Raises:
        ManifestError: if it lies above the root of the URL, or is an absolute path.
    """
    protocol, _, place = url.partition("://")
    folder = posixpath.normpath(posixpath.join(posixpath.dirname(place), relative))
    if posixpath.isabs(relative) or folder == ".." or folder.startswith("../"):
        raise ManifestError(
            f"{url}: its scans lie in {relative!r}, outside of {protocol}://. Scan the folder again."
        )
    return f"{protocol}://{folder}"


def sparse(record: ScanRecord) -> dict[str, Any]:
    """A record as a dict, without its empty fields."""
    return {
        k: v for k, v in asdict(record).items() if v not in (None, "", [], {}) or k in ("status", "reasons")
    }


def record_of(path: str | Path, index: int, entry: Any) -> ScanRecord:
    """A record from its JSON; ``path`` and ``index`` are for the message.

    Raises:
        ManifestError: saying what is wrong with it.
    """

    def refuse(what: str) -> ManifestError:
        return ManifestError(f"{path}: record {index} {what}. Scan the folder again.")

    if not isinstance(entry, dict):
        raise refuse("is not an object")
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
        if not stays_inside(name):
            raise refuse(f"has a path that leaves the folder: {name!r}")
    # a refused file may be called by its whole path; only what is built becomes the name of a file
    if entry["kind"] == "image" and "id" in entry and not is_plain_name(entry["id"]):
        raise refuse(f"has an id that cannot name a file: {entry['id']!r}")
    reasons = entry.get("reasons", [])
    if any(code not in [reason.value for reason in Reason] for code in reasons):
        raise refuse("has an unknown reason")
    if entry["status"] != status_of(Reason(code) for code in reasons):
        raise refuse(f"has the status {entry['status']!r}, which its reasons contradict")
    return ScanRecord(**entry)


def _relative(folder: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(folder, start.resolve())).as_posix()
    except ValueError:  # another drive
        return folder.as_posix()
