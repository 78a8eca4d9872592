"""True places of points in another scan: known for warped scans and phantoms, or marked by hand."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from custom.data.phantom.cohort import read_canonical
from custom.data.phantom.correspondence import find_places
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.files import read_text
from custom.landmarks.quality.known_warp import Warp
from custom.landmarks.training.places import phantom_image
from custom.space import to_voxels

Truth: TypeAlias = Callable[[str, NDArray[np.float64], str], NDArray[np.float64]]
FAR_MM = 1.0  # a phantom's point with a larger canonical residual lies outside the scan


def warp_truth(warps: Mapping[str, Warp], store: VolumeStore) -> Truth:
    """The true places for pairs (``name~warped``, ``name``); nan outside the original's voxels."""

    def truth(scan_q: str, points_mm: NDArray[np.float64], scan_k: str) -> NDArray[np.float64]:
        found = warps[scan_q](points_mm)
        voxels = to_voxels(store.affine(scan_k), found)
        inside = np.all((voxels >= 0) & (voxels <= np.array(store.shape(scan_k)) - 1), axis=1)
        return np.where(inside[:, None], found, np.nan)

    return truth


def phantom_truth(store: VolumeStore, folder: str | Path) -> Truth:
    """The true correspondence of phantoms.

    Args:
        store: built from them.
        folder: that ``alice phantom`` wrote, with ``images`` (or ``imagesTr``) and ``canonical``.

    Raises:
        AliceError: when the returned function is called for a scan without files there.
    """
    folder = Path(folder)

    @functools.lru_cache(maxsize=6)
    def load(name: str) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        file = Path(store.records[name].source).name
        image = phantom_image(folder, file)
        path = folder / "canonical" / f"{image.name.split('.')[0].removesuffix('_0000')}.npz"
        for needed in (image, path):
            if not needed.is_file():
                raise AliceError(
                    f"{needed}: missing, and without it {name} has no known correspondence. Give the folder that alice "
                    "phantom wrote (with --canonical)."
                )
        return read_canonical(path), np.asarray(nib.load(image).affine, dtype=float)

    def truth(scan_q: str, points_mm: NDArray[np.float64], scan_k: str) -> NDArray[np.float64]:
        (canonical_q, affine_q), (canonical_k, affine_k) = load(scan_q), load(scan_k)
        voxels = to_voxels(affine_q, points_mm).T
        wanted = [
            ndimage.map_coordinates(canonical_q[..., c], voxels, order=1, mode="nearest") for c in range(3)
        ]
        found = find_places(canonical_k, affine_k, np.stack(wanted, axis=-1))
        return np.where((found.residual_mm < FAR_MM)[:, None], found.points_mm, np.nan)

    return truth


def read_landmarks(path: str | Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Landmarks by scan and name from a CSV with columns scan, landmark, x, y, z (RAS mm).

    Raises:
        AliceError: naming the line that cannot be read.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        missing = {"scan", "landmark", "x", "y", "z"} - set(reader.fieldnames or [])
        if missing:
            raise AliceError(
                f"{path}: column(s) {', '.join(sorted(missing))} missing; needed are scan, landmark, x, y, z (RAS mm)."
            )
        for line in reader:
            try:
                point = np.array([float(line[axis]) for axis in "xyz"])
            except (TypeError, ValueError) as error:
                raise AliceError(
                    f"{path}, line {reader.line_num}: not coordinates in mm ({error})."
                ) from error
            found.setdefault(line["scan"], {})[line["landmark"]] = point
    return found
