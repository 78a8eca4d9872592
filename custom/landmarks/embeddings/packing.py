"""Round vectors to a few bits for each number, and pack them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.errors import AliceError

# Bits for each number. The fewer numbers a vector has, the more each of them matters; the SAM bundle's README
# has measurements. Entropy coding (zstd) saves nothing more and makes searches ten times slower.
FEW_NUMBERS = 64
BITS_OF_FEW, BITS_OF_MANY = 7, 4
BITS = (4, 7, 8)
_STEPS_AN_OCTAVE, _SMALLEST = 24, 2.0**-8  # codes for the largest number of a row


def bits_for(dim: int, asked: int | None = None) -> int:
    """Bits for each number of a fine vector: those asked for; by default 4 if ``dim`` is above 64, else 7.

    Raises:
        AliceError: if the bits asked for are not 4, 7 or 8.
    """
    if asked is None:
        return BITS_OF_FEW if dim <= FEW_NUMBERS else BITS_OF_MANY
    if asked not in BITS:
        raise AliceError(f"fine_bits (--bits of alice embed) must be 4, 7 or 8, got {asked}.")
    return asked


def quantise(vectors: NDArray[np.float32], levels: int) -> NDArray[np.int8]:
    """Round vectors (N, C) to ``levels`` steps to each side of zero, the largest number at the last step."""
    largest = np.maximum(np.abs(vectors).max(axis=-1, keepdims=True), 1e-12)
    return np.rint(vectors * (levels / largest)).astype(np.int8)


def quantise_sized(vectors: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """As :func:`quantise`, but keeps lengths: also returns a code (N,) for the value of the last step.

    That value is the largest number, rounded up to the next of 24 values in an octave; :func:`largest_of`
    decodes it.
    """
    largest = np.maximum(np.abs(vectors).max(axis=-1), _SMALLEST)
    code = np.ceil(_STEPS_AN_OCTAVE * np.log2(largest / _SMALLEST)).clip(0, 255).astype(np.uint8)
    scale = (levels / largest_of(code))[:, None]
    return np.rint((vectors * scale).clip(-levels, levels)).astype(np.int8), code


def largest_of(code: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The value of the last step from its code; see :func:`quantise_sized`."""
    return _LARGEST[code]


_LARGEST = (_SMALLEST * 2.0 ** (np.arange(256) / _STEPS_AN_OCTAVE)).astype(np.float32)


def levels_of(bits: int) -> int:
    """Number of steps to each side of zero that fit into so many bits."""
    return (1 << (bits - 1)) - 1


def pack(steps: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack numbers (N, C): 8 bits as bytes; else the low 4 bits of two in a byte, further bits as bit planes."""
    raised = (steps.astype(np.int16) + levels_of(bits)).astype(np.uint8)
    if bits == 8:
        return raised
    half = -(-raised.shape[1] // 2)
    low = raised[:, :half] & 15
    low[:, : raised.shape[1] - half] |= (raised[:, half:] & 15) << 4
    planes = [np.packbits((raised >> bit) & 1, axis=1) for bit in range(4, bits)]
    return np.concatenate([low, *planes], axis=1)


def unpack(packed: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.float32]:
    """The inverse of :func:`pack`: (N, C) float32."""
    if bits == 8:
        return packed.astype(np.float32) - levels_of(bits)
    half, plane = -(-dim // 2), -(-dim // 8)
    raised = np.empty((len(packed), 2 * half), np.uint8)
    np.bitwise_and(packed[:, :half], 15, out=raised[:, :half])
    np.right_shift(packed[:, :half], 4, out=raised[:, half:])
    raised = raised[:, :dim]
    for bit in range(4, bits):
        start = half + (bit - 4) * plane
        raised |= np.unpackbits(packed[:, start : start + plane], axis=1, count=dim) << bit
    out = raised.astype(np.float32)
    out -= levels_of(bits)
    return out


def row_lengths(rows: NDArray[Any]) -> NDArray[np.float32]:
    rows = rows.astype(np.float32, copy=False)
    return np.maximum(np.sqrt(np.einsum("nc,nc->n", rows, rows)), 1e-12)
