"""Find the cells of an embedding that hold the patient's body."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from custom.data.grid.body import body_mask
from custom.landmarks.sam.scan_grid import ScanEmbedding, cell_to_world
from custom.space import to_voxels

BODY_MARGIN = 2  # fine cells kept around the body, so that points of the skin have a cell (ours)


def body_cells(
    volume_hu: NDArray[Any], affine: NDArray[np.float64], embedding: ScanEmbedding
) -> NDArray[np.bool_] | None:
    """Fine cells in or near the patient's body, bool (z, y, x); None where no body is found.

    Args:
        volume_hu: (X, Y, Z).
        affine: of the volume, voxel to world mm.
        embedding: of the volume.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    mask, steps = body_mask(volume_hu, tuple(float(s) for s in spacing))
    if not mask.any():
        return None
    grid = tuple(embedding.fine.shape[1:])
    cells = np.indices(grid).reshape(3, -1).T
    voxels = to_voxels(affine, cell_to_world(cells, embedding.affine, "fine"))
    places = np.rint((voxels - np.array(steps) // 2) / np.array(steps)).astype(int)
    places = np.clip(places, 0, np.array(mask.shape) - 1)
    found = mask[tuple(places.T)].reshape(grid)
    wider = torch.from_numpy(found).float()[None, None]
    size = 2 * BODY_MARGIN + 1
    return torch.nn.functional.max_pool3d(wider, size, 1, BODY_MARGIN)[0, 0].numpy().astype(bool)
