"""A space in which scans of different subjects share their anatomy; phantoms have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from custom.data.phantom.cohort import read_canonical
from custom.data.store.volume_store import VolumeStore
from custom.errors import AliceError
from custom.space import to_voxels, to_world

Array = NDArray[Any]


class Places(Protocol):
    """A space in which all scans that it knows share their anatomy (phantoms have one)."""

    def __contains__(self, name: str) -> bool: ...
    def at(self, name: str, points_mm: Array) -> Array: ...
    def find(self, name: str, place_mm: Array) -> Array: ...


def phantom_image(folder: str | Path, file: str) -> Path:
    """Where a cohort keeps an image: in ``images``, or in ``imagesTr`` if it is in BTCV's layout."""
    return next(
        (p for part in ("images", "imagesTr") if (p := Path(folder) / part / file).is_file()),
        Path(folder) / "images" / file,
    )


class PhantomPlaces:
    """The space that phantoms share: their canonical coordinates, linear between samples 4 to 6 mm apart.

    Args:
        folder: as ``write_cohort`` leaves it, with its ``canonical`` maps.
        store: built from it.

    Raises:
        AliceError: if the folder has no maps of the store's scans.
    """

    def __init__(self, folder: str | Path, store: VolumeStore) -> None:
        self.maps: dict[str, tuple[Tensor, Array]] = {}
        for name in store.names:
            path = Path(folder) / "canonical" / f"{name.removesuffix('_0000')}.npz"
            image = phantom_image(folder, f"{name}.nii.gz")
            if path.is_file() and image.is_file():
                canonical = read_canonical(path)[::2, ::2, ::2]
                affine = nib.load(image).affine @ np.diag([2.0, 2.0, 2.0, 1.0])
                self.maps[name] = (
                    torch.from_numpy(np.ascontiguousarray(canonical)).permute(3, 0, 1, 2)[None],
                    affine,
                )
        if not self.maps:
            raise AliceError(
                f"{folder}: no canonical maps of the scans in {store.path}. Write them: alice phantom."
            )

    def __contains__(self, name: str) -> bool:
        return name in self.maps

    def at(self, name: str, points_mm: Array) -> Array:
        """Coordinates (n, 3) in the shared space of points (n, 3) in world mm."""
        canonical, affine = self.maps[name]
        sizes = np.array(canonical.shape[2:])
        relative = 2 * to_voxels(affine, points_mm) / (sizes - 1) - 1
        grid = torch.from_numpy(relative[:, ::-1].copy()).float()[None, None, None]
        values = F.grid_sample(canonical, grid, padding_mode="border", align_corners=True)
        return values[0, :, 0, 0].T.numpy().astype(np.float64)

    def find(self, name: str, place_mm: Array) -> Array:
        """About where (within a sample) a place of the shared space lies in a scan: (3,), world mm."""
        canonical, affine = self.maps[name]
        some = canonical[0, :, ::2, ::2, ::2]
        distance = (
            (some - torch.from_numpy(np.asarray(place_mm)).float()[:, None, None, None]).square().sum(0)
        )
        voxel = 2 * np.array(np.unravel_index(int(distance.argmin()), distance.shape))
        return to_world(affine, voxel)


def phantom_places(folder: str | Path | None, store: VolumeStore) -> PhantomPlaces | None:
    """The space that the phantoms in ``folder`` share; None if there is no folder."""
    return None if folder is None else PhantomPlaces(folder, store)
