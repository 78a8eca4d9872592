"""One NIfTI, NRRD or MetaImage file opened with suspicion: sizes are checked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from custom.data.formats.metaimage import open_metaimage
from custom.data.formats.nifti import open_nifti
from custom.data.formats.nrrd import open_nrrd
from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import MOST_BYTES, Voxels, check_grid


def open_scan(
    path: Path, root: Path | None = None, most_bytes: int = MOST_BYTES, any_grid: bool = False
) -> Voxels:
    """Read and check one file.

    Args:
        path: NIfTI, NRRD or MetaImage, told by its suffix.
        root: detached data (.nhdr, .mhd) must lie in it; the file's own folder by default.
        most_bytes: voxel data above this are refused unread.
        any_grid: take a grid that no patient would lie in: a slice, a phantom of millimetres, a slant.

    Raises:
        Fault: with the reason; whatever the file holds, no other error is meant to come out.
    """
    name = path.name.lower()
    try:
        if path.stat().st_size == 0:
            raise Fault(Reason.EMPTY_FILE)
        if name.endswith((".nii", ".nii.gz")):
            voxels = open_nifti(path, most_bytes)
        else:
            parse = open_nrrd if name.endswith((".nrrd", ".nhdr")) else open_metaimage
            voxels = parse(path, root or path.parent, most_bytes)
        if not any_grid:
            voxels.warnings += check_grid(voxels.affine, voxels.raw.shape)
        return voxels
    except OSError as error:
        raise Fault(Reason.UNREADABLE, type(error).__name__) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Fault(Reason.BAD_HEADER, type(error).__name__) from error
