"""What evaluation measures, and of which scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.data import MetaTensor
from monai.metrics import compute_surface_dice
from torch import Tensor


class SurfaceDice:
    """MONAI's surface Dice with sub-voxel surfaces, in mm.

    Args:
        tolerances_mm: one for each organ.
    """

    def __init__(self, tolerances_mm: Sequence[float]) -> None:
        self.tolerances_mm = list(tolerances_mm)

    def __call__(self, pred: Tensor, label: MetaTensor) -> Tensor:
        """(B, organs) of one-hot prediction and label (B, K, X, Y, Z); nan where the label has no organ."""
        spacing = label.pixdim.tolist()
        return compute_surface_dice(pred, label, self.tolerances_mm, spacing=spacing, use_subvoxels=True)


def metadata_of(batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metadata of a batch's images, from which the rows of a table take their names."""
    return [item["image"].meta for item in batch]
