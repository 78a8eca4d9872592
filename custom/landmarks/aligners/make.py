"""Make an aligner by its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from custom.errors import AliceError
from custom.landmarks.aligners.affine import AffineAligner
from custom.landmarks.aligners.protocol import Aligner
from custom.landmarks.aligners.sam import SamAligner
from custom.landmarks.aligners.simple import CoordinateAligner, RandomAligner
from custom.landmarks.embeddings.folder import EmbeddingFolder

logger = logging.getLogger(__name__)


def make_aligner(
    name: str,
    scans: Any,
    embeddings: EmbeddingFolder | str | Path | None = None,
    *,
    threshold: float | None = None,
    max_cycle_mm: float | None = None,
) -> Aligner:
    """Make an aligner by its name in the config.

    Args:
        name: coordinate, random, affine, sam, or sam_nearest, which uses single matches as SAM's authors do.
        scans: the ``VolumeStore``.
        embeddings: folder that ``alice embed`` wrote; for sam and sam_nearest.
        threshold: see :class:`SamAligner`.
        max_cycle_mm: see :class:`SamAligner`.

    Raises:
        AliceError: for another name, or if sam lacks embeddings.
    """
    if name in ("sam", "sam_nearest"):
        if embeddings is None:
            store = getattr(scans, "path", "STORE")
            raise AliceError(
                f"aligner {name!r} needs the scans' embeddings. Make them with: alice embed {store} EMBEDDINGS, and give "
                "that folder; or take aligner 'coordinate', which needs none."
            )
        made = SamAligner(scans, embeddings, threshold, max_cycle_mm=max_cycle_mm, consensus=name == "sam")
        logger.info(
            "Pairs are aligned by %s, with embeddings in %s of weights %s; a match scores %g at least.",
            name,
            made.embeddings.path,
            made.embeddings.weights_sha256[:12],
            made.threshold,
        )
        return made
    makers: dict[str, Any] = {
        "coordinate": CoordinateAligner,
        "random": RandomAligner,
        "affine": AffineAligner,
    }
    if name not in makers:
        raise AliceError(
            f"aligner must be one of {', '.join([*makers, 'sam', 'sam_nearest'])}; got {name!r}."
        )
    logger.info("Pairs are aligned by %s.", name)
    return makers[name](scans)
