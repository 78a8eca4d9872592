"""The result of a scan as text for the terminal."""

from __future__ import annotations

from custom.data.formats.reasons import Reason
from custom.data.intake.manifest import Manifest
from custom.data.scans import hint_at_phases
from custom.data.store.build_cost import default_build_cost
from custom.errors import shown


def summary(manifest: Manifest) -> str:
    """A few lines for the terminal."""
    lines = [shown(manifest.folder)]
    for kind, found in sorted(manifest.counts().items()):
        lines.append(f"{kind:<8}" + "  ".join(f"{number} {status}" for status, number in found.items()))
    patients = {record.patient for record in manifest.usable}
    lines.append(f"{len(patients)} patient{'s' * (len(patients) != 1)} can be used")
    images = sum(record.kind == "image" for record in manifest.usable)
    if len(patients) == 1 and images > 1:
        lines.append(
            f"All {images} scans are taken for one patient's; pre-training pairs two patients. If they are of "
            "several, say which part of the path tells: --patient_pattern '(PATIENT)', in alice scan and in alice build."
        )
    elif not manifest.rules.get("patient_pattern"):
        files = (r for r in manifest.usable if r.kind == "image" and r.format != "dicom")
        if hint := hint_at_phases((record.path, record.patient) for record in files):
            lines.append(hint)
    if manifest.usable:
        lines.append(default_build_cost(manifest.scans(fetch=False), manifest.folder))
    for reason, records in manifest.by_reason().items():
        lines.append(f"{len(records):>6}  {reason.value:<18}{reason.sentence}")
        named = [r.path for r in records if r.status == "rejected" or reason is Reason.ORPHAN_LABEL]
        if named:
            lines.append(f"{'':>8}{', '.join(map(shown, named[:3]))}{', ...' if named[3:] else ''}")
    return "\n".join(lines)
