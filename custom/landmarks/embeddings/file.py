"""The file format of a scan's embeddings: written whole or not at all, and checked when opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from custom.errors import AliceError
from custom.files import replacing
from custom.landmarks.embeddings.blocks import make_blocks
from custom.landmarks.embeddings.lattice import coarse_norm, flat_index, lattice_weights, pool
from custom.landmarks.embeddings.packing import (
    BITS,
    bits_for,
    largest_of,
    levels_of,
    pack,
    quantise,
    quantise_sized,
    row_lengths,
)
from custom.landmarks.sam.scan_grid import ScanEmbedding, Triple

FORMAT = "alice-embedding-4"
_SECTIONS = {
    "pooled": "I8",
    "pooled_norm": "F16",
    "coarse": "F16",
    "coarse_norm": "F16",
    "blocks": "I8",
    "blocks_step": "F32",
    "blocks_mm": "F32",
    "body": "U8",
    "fine": "U8",
    "fine_largest": "U8",
}
_TOGETHER = 65_536  # cells packed at a time, to bound the memory of saving
_DTYPES = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}


class EmbeddingError(AliceError):
    """Embeddings that cannot be used; the message names the file and the way out."""


@dataclass(frozen=True)
class EmbeddingHeader:
    """What a file says about itself.

    Attributes:
        name: the scan's.
        weights_sha256: of the network that made it.
        source_sha256: of the scan it was made from.
        grid: fine cells along z, y, x.
        shape: voxels of the 2 mm grid along x, y, z.
        affine: of that grid, voxel (x, y, z) to world mm (RAS).
        dim: numbers per embedding, C.
        fine_bits: per number of a fine cell.
        alternate: see :class:`Blocks`.
        content_sha256: of all sections.
    """

    name: str
    weights_sha256: str
    source_sha256: str
    grid: Sequence[int]
    shape: Sequence[int]
    affine: Sequence[Sequence[float]]
    dim: int
    fine_bits: int
    alternate: int
    content_sha256: str


class Saved(NamedTuple):
    """A written file: its size, and the effect of rounding (cosines between fine vectors before and after)."""

    path: Path
    num_bytes: int
    mean_cosine: float
    lowest_cosine: float


def save_embedding(
    path: str | Path,
    embedding: ScanEmbedding,
    weights_sha256: str,
    source_sha256: str,
    *,
    name: str | None = None,
    body: NDArray[np.bool_] | None = None,
    fine_bits: int | None = None,
) -> Saved:
    """Write a scan's embeddings, whole or not at all.

    The file is a safetensors file that is mapped into memory, so that a search reads only the cells it
    visits. It holds:

    - the means of 2 x 2 x 2 fine cells, as int8;
    - the difference of each fine vector from its mean (about a third of its length), with ``fine_bits`` for
      each number, in steps of the difference's own largest number;
    - coarse vectors, and the lengths of interpolated coarse vectors, in float16;
    - blocks of 16 mm, in steps that are the same for all of them.

    Args:
        path: to write.
        embedding: of the scan.
        weights_sha256: of the network's weights.
        source_sha256: of the scan.
        name: of the scan; by default the stem of the path.
        body: bool (z, y, x), the fine cells to store; others cannot be found. None stores all.
        fine_bits: 4, 7 or 8; None takes :func:`custom.landmarks.embeddings.packing.bits_for` the embeddings'
            length.

    Returns:
        Size and rounding error.

    Raises:
        AliceError: if ``body`` has another grid or holds nothing, or ``fine_bits`` is another number.
    """
    path = Path(path)
    rows = np.ascontiguousarray(embedding.fine.detach().float().cpu().permute(1, 2, 3, 0).numpy())
    coarse = embedding.coarse.detach().float().cpu().permute(1, 2, 3, 0).numpy().astype(np.float16)
    grid: Triple = (rows.shape[0], rows.shape[1], rows.shape[2])
    fine_bits = bits_for(rows.shape[-1], fine_bits)
    if body is None:
        body = np.ones(grid, bool)
    if body.shape != grid or not body.any():
        raise AliceError(
            f"body must be bool {grid} with something in it, got {body.shape}, {body.sum()} cells."
        )

    pooled, used = pool(rows, body)
    pooled_rows = quantise(pooled[used], 127)
    known = coarse.astype(np.float32)  # norms of the stored values, not of the given ones

    def norm_at(pooling: int) -> NDArray[np.float32]:
        return coarse_norm(known, lattice_weights(grid, known.shape[:3], pooling))

    blocks = make_blocks(pooled[used], used, known, grid, np.asarray(embedding.affine, float))
    step = np.abs(blocks.vectors).max(keepdims=True)[0] / np.float32(127)
    sections: dict[str, NDArray[Any]] = {
        "pooled": pooled_rows,
        "pooled_norm": norm_at(2)[used.reshape(-1)].astype(np.float16),
        "coarse": np.ascontiguousarray(coarse),
        "coarse_norm": norm_at(1)[body.reshape(-1)].astype(np.float16),
        "blocks": np.rint(blocks.vectors / step).astype(np.int8),
        "blocks_step": step,
        "blocks_mm": blocks.points_mm.astype(np.float32),
        "body": np.packbits(body),
    }
    sections["fine"], sections["fine_largest"], cosines = _pack_differences(
        rows, body, pooled_rows, np.cumsum(used) - 1, fine_bits
    )
    header = EmbeddingHeader(
        name=path.stem if name is None else name,
        weights_sha256=weights_sha256,
        source_sha256=source_sha256,
        grid=grid,
        shape=[int(n) for n in embedding.shape],
        affine=np.asarray(embedding.affine, float).tolist(),
        dim=rows.shape[-1],
        fine_bits=fine_bits,
        alternate=blocks.alternate,
        content_sha256=digest_of(sections),
    )
    # one entry: safetensors writes several in any order, but equal embeddings must give equal files
    metadata = {"alice": json.dumps({"format": FORMAT, **asdict(header)})}
    with replacing(path, error=EmbeddingError, failures=(OSError, SafetensorError)) as draft:
        safetensors.numpy.save_file(sections, draft, metadata)
    return Saved(path, path.stat().st_size, float(cosines.mean()), float(cosines.min()))


def _pack_differences(
    rows: NDArray[np.float32],
    body: NDArray[np.bool_],
    pooled_rows: NDArray[np.int8],
    row_of_pooled: NDArray[np.int_],
    bits: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Differences of fine vectors from their stored means: packed, their scales, and cosines to the originals."""
    cells = np.argwhere(body)
    size = tuple((n + 1) // 2 for n in body.shape)
    parts = []
    for some in np.array_split(cells, -(-len(cells) // _TOGETHER)):
        wanted = rows[tuple(some.T)]
        found = pooled_rows[row_of_pooled[flat_index(some // 2, (size[0], size[1], size[2]))]].astype(
            np.float32
        )
        found /= row_lengths(found)[:, None]
        steps, largest = quantise_sized(wanted - found, levels_of(bits))
        found += steps * (largest_of(largest) / levels_of(bits))[:, None]
        parts.append((pack(steps, bits), largest, np.einsum("nc,nc->n", wanted, found) / row_lengths(found)))
    packed, scales, cosines = (np.concatenate(part) for part in zip(*parts, strict=True))
    return packed, scales, cosines


def digest_of(sections: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(sections):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(sections[key]).tobytes())
    return digest.hexdigest()


def read_header(path: Path) -> tuple[EmbeddingHeader, dict[str, tuple[Any, tuple[int, ...], int]], int]:
    """Our header, the place of each section (dtype, shape, first byte), and the first byte of the data."""
    if not path.is_file():
        raise EmbeddingError(f"{path}: missing. Embed the scan: alice embed STORE {path.parent}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise EmbeddingError(f"{path}: no embedding, or cut short. Delete it and embed again.")
        raw = file.read(length)
    try:
        table = json.loads(raw)
        metadata = json.loads(table.pop("__metadata__")["alice"])
        found = metadata.pop("format")
        if found != FORMAT:
            raise EmbeddingError(
                f"{path}: format {found!r}, this version reads {FORMAT!r}. Embed again, with overwrite: "
                f"alice embed STORE {path.parent} --overwrite"
            )
        header = EmbeddingHeader(**metadata)
        places = {
            key: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), int(entry["data_offsets"][0]))
            for key, entry in table.items()
        }
        end = max(int(entry["data_offsets"][1]) for entry in table.values())
        right_types = all(entry["dtype"] == _SECTIONS.get(key) for key, entry in table.items())
        right_types = right_types and 1 <= header.alternate <= table["blocks"]["shape"][0]
    except EmbeddingError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise EmbeddingError(
            f"{path}: no embedding, or damaged ({error}). Delete it and embed again."
        ) from error
    if header.fine_bits not in BITS:
        raise EmbeddingError(
            f"{path}: holds {header.fine_bits} bits a number, this version reads 4, 7 or 8. Embed again, with "
            f"overwrite: alice embed STORE {path.parent} --overwrite"
        )
    if set(places) != set(_SECTIONS) or not right_types or size != 8 + length + end:
        raise EmbeddingError(f"{path}: cut short or damaged. Delete it and embed again.")
    return header, places, 8 + length
