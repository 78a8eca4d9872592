"""Read one NIfTI, NRRD or MetaImage file that may be damaged: sizes and grid are checked before voxels are read."""

from __future__ import annotations

from pathlib import Path

from custom.data.formats.metaimage import open_metaimage
from custom.data.formats.nifti import open_nifti
from custom.data.formats.nrrd import open_nrrd
from custom.data.formats.reasons import Fault, Reason
from custom.data.formats.voxels import MOST_BYTES, Voxels


def open_scan(
    path: Path, root: Path | None = None, most_bytes: int = MOST_BYTES, any_grid: bool = False
) -> Voxels:
    """Read and check one file.

    Args:
        path: NIfTI, NRRD or MetaImage; its suffix says which.
        root: separate data files (of .nhdr, .mhd) must lie in this folder; by default the folder of ``path``.
        most_bytes: a file with more bytes of voxels is refused before they are read.
        any_grid: also accept grids that are not of a patient: a single slice, a few millimetres, sheared axes.

    Raises:
        Fault: with the reason. No other error should come from the content of a file.
    """
    name = path.name.lower()
    try:
        if path.stat().st_size == 0:
            raise Fault(Reason.EMPTY_FILE)
        if name.endswith((".nii", ".nii.gz")):
            return open_nifti(path, most_bytes, any_grid)
        parse = open_nrrd if name.endswith((".nrrd", ".nhdr")) else open_metaimage
        return parse(path, root or path.parent, most_bytes, any_grid)
    except OSError as error:
        raise Fault(Reason.UNREADABLE, type(error).__name__) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Fault(Reason.BAD_HEADER, type(error).__name__) from error
