"""The HTML page of ``alice scan``: the scans of a folder, what was refused and why, and duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from custom.data.errors import ScanError
from custom.data.formats.reasons import REJECTED
from custom.data.intake.scan_folder import Manifest
from custom.data.intake.scan_record import HISTOGRAM_HU, ScanRecord
from custom.data.store.build_cost import default_build_cost
from custom.report import COLOUR_A, COLOUR_B, Page

_WINDOW_HU = (-160.0, 240.0)  # soft tissue
_ROWS = 200  # of a table; the manifest has all


def intake_page(manifest: Manifest, *, pictures: int = 12, pairs: int = 6) -> Page:
    """Counts, refusals by reason, voxel sizes, HU, middle slices, and duplicates side by side.

    Args:
        manifest: of a folder that still exists, since the pictures are read from it.
        pictures: number of scans to show, spread evenly over the usable ones.
        pairs: number of duplicates to show.
    """
    page = Page(f"Scans in {_printable(manifest.folder.name)}", "What was found, taken and refused.")
    counts = manifest.counts()
    facts: dict[str, Any] = {
        "usable scans": len(manifest.usable),
        "patients": len({scan.patient for scan in manifest.scans()}),
        "rejected images": counts.get("image", {}).get(REJECTED, 0),
        "labels": sum(counts.get("label", {}).values()),
        "duplicates": sum(record.duplicate_of is not None for record in manifest.records),
        "GB of usable files": sum(record.bytes for record in manifest.usable) / 1e9,
    }
    page.facts(facts)
    if manifest.usable:
        cost = default_build_cost(manifest.scans(fetch=False), manifest.folder)
        page.text(f"{cost}. A body smaller than its scan takes less.")
    page.section("Counts").table(
        ("kind", "accepted", "warned", "rejected"),
        [(kind, *found.values()) for kind, found in sorted(counts.items())],
    )
    modalities = Counter(
        (record.modality or "unknown", record.format, record.status)
        for record in manifest.records
        if record.kind == "image"
    )
    page.table(
        ("modality", "format", "status", "images"), [(*key, n) for key, n in sorted(modalities.items())]
    )
    if manifest.others:
        passed = ", ".join(f"{number} {_printable(kind)}" for kind, number in sorted(manifest.others.items()))
        page.text(f"Ignored, because they hold no scan: {passed}.")
    page.section("Why")
    reasons = manifest.by_reason()
    if not reasons:
        page.text("Nothing was refused, and there are no warnings.")
    else:
        page.table(
            ("reason", "status", "files", "what it means"),
            [(reason.value, reason.status, len(found), reason.sentence) for reason, found in reasons.items()],
        )
        listed = [record for record in manifest.records if record.reasons]
        paths = {record.id: record.path for record in manifest.records}
        page.table(
            ("path", "status", "reasons", "detail"),
            [(_printable(r.path), r.status, ", ".join(r.reasons), _detail(r, paths)) for r in listed[:_ROWS]],
            f"The first {_ROWS} of {len(listed)}; the manifest names all." if len(listed) > _ROWS else "",
        )
    if manifest.usable:
        page.section("Voxels").figure(
            spacing_figure(manifest.usable), "Voxel sizes of usable scans along Right, Anterior, Superior."
        )
        cts = [record.histogram for record in manifest.usable if record.histogram]
        if cts:
            page.figure(hu_figure(cts), f"HU of {len(cts)} usable CTs, each with the same weight.")
    repeated = [record for record in manifest.records if record.duplicate_of]
    if repeated:
        page.section("Duplicates")
        by_id = {record.id: record for record in manifest.records}
        for record in repeated[:pairs]:
            both = [by_id[record.duplicate_of or ""], record] if record.duplicate_of in by_id else [record]
            _gallery(page, manifest, both, ", ".join(record.reasons))
    shown = manifest.usable
    if shown and pictures:
        page.section("Middle slices").text(
            "The axial slice in the middle of each scan, patient's right on the left; soft-tissue window for CT."
        )
        chosen = sorted({int(i) for i in np.linspace(0, len(shown) - 1, min(pictures, len(shown)))})
        _gallery(page, manifest, [shown[i] for i in chosen], "")
    return page


def spacing_figure(records: Sequence[ScanRecord]) -> Figure:
    """Histograms of the voxel size along each axis of the body."""
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    sizes = np.array([_spacing_ras(record) for record in records])
    for axis, name in enumerate(("R", "A", "S")):
        axes = figure.add_subplot(1, 3, axis + 1)
        axes.hist(
            sizes[:, axis], bins=np.linspace(0, max(5.0, float(sizes.max())), 31).tolist(), color=COLOUR_A
        )
        axes.set_xlabel(f"mm along {name}")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def hu_figure(histograms: Sequence[Sequence[float]]) -> Figure:
    """The mean histogram of HU."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    first, last, bins = HISTOGRAM_HU
    edges = np.linspace(first, last, bins + 1)
    axes.stairs(np.mean(histograms, axis=0), edges, fill=True, color=COLOUR_B)
    axes.set_yscale("log")
    axes.set_xlabel("HU")
    axes.set_ylabel("share of voxels")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def middle_slice(manifest: Manifest, record: ScanRecord, longest: int = 192) -> np.ndarray:
    """The axial slice in the middle of a scan, as a picture in [0, 1] with square pixels and anterior on top.

    Raises:
        ScanError: if the scan can no longer be read.
    """
    volume, affine = manifest.read(record)
    flips = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(volume, flips)
    plane = np.asarray(turned[:, :, turned.shape[2] // 2], dtype=float)
    low, high = _WINDOW_HU
    if record.modality != "CT":
        low, high = np.percentile(plane, (0.2, 99.8))
    plane = np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1)
    extent = np.array(plane.shape) * _spacing_ras(record)[:2]
    size = np.maximum(1, np.round(extent * longest / extent.max())).astype(int)
    rows, columns = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(int)[::-1]
        for new, old in zip(size, plane.shape, strict=True)
    )
    return plane[np.ix_(rows, columns)].T


def _detail(record: ScanRecord, paths: dict[str, str]) -> str:
    """Details of a reason: numbers, the scan that this one repeats, and the lists that also have it."""
    repeated = (
        record.duplicate_of and f"repeats {_printable(paths.get(record.duplicate_of, record.duplicate_of))}"
    )
    return "; ".join(part for part in (record.detail, repeated, *map(_printable, record.leaks)) if part)


def _gallery(page: Page, manifest: Manifest, records: Sequence[ScanRecord], caption: str) -> None:
    images = []
    for record in records:
        try:
            picture = middle_slice(manifest, record)
        except ScanError:  # a refused scan may be shown beside the one that it repeats
            picture = np.zeros((8, 8))
        images.append((picture, _printable(record.path)))
    page.gallery(images, caption)


def _spacing_ras(record: ScanRecord) -> np.ndarray:
    flips = nib.orientations.io_orientation(np.array(record.affine))
    return np.array(record.spacing_mm)[np.argsort(flips[:, 0])]


def _printable(text: str) -> str:
    """A file name without the bytes that are not valid UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
