"""How a volume is laid out on disk: number type, block shape, and the coarse picture of its foreground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nnssl_ext.fingerprint.foreground import count_in_blocks

StorageType = Literal["float16", "float32"]
BLOCK_VOXELS = 32**3
"""Voxels that are compressed together: what a crop decodes beyond itself grows with it, the ratio shrinks below it."""
CHUNK_BLOCKS = 4
"""Blocks per edge of a chunk. Blocks are read one by one, so this only bounds the size of the offset tables."""
MAX_CELLS = 1 << 15
"""Cells of the foreground grid: 4 kB of bits, so that opening a file stays fast."""
SMALLEST_CELL = 4
MAX_CLAMPED_SHARE = 1e-4
"""Share of voxels beyond float16 that may be clamped; above it the case is refused."""


def to_storage(data: npt.NDArray[np.float32], dtype: StorageType) -> tuple[npt.NDArray[Any], int]:
    """Casts voxels to the type on disk; what float16 cannot hold is clamped to its largest value, 65504.

    Args:
        data: Finite values (C, Z, Y, X).
        dtype: Type on disk.

    Returns:
        The array, C-contiguous, and how many voxels were clamped.

    Raises:
        ValueError: If a value is not finite, or more than a share of 1e-4 of the voxels would have to be clamped.
    """
    low, high = float(data.min()), float(data.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("the preprocessed array has values that are not finite")
    limit = float(np.finfo(dtype).max)
    clamped = 0
    if low < -limit or high > limit:
        clamped = int(np.count_nonzero(np.abs(data) > limit))
        if clamped > MAX_CLAMPED_SHARE * data.size:
            raise ValueError(
                f"{clamped} of {data.size} voxels are beyond {limit:g} (values from {low:g} to {high:g}): they do not "
                f"fit {dtype}. Choose a normalisation scheme that scales them, or preprocess with --dtype float32."
            )
        data = np.clip(data, -limit, limit)
    return np.ascontiguousarray(data, dtype=dtype), clamped


def block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Blocks of 32³ voxels; where an axis is shorter, the others grow (doubling) to hold about as many.

    Args:
        shape: (Z, Y, X).
    """
    edge = round(BLOCK_VOXELS ** (1 / 3))
    block = [min(edge, size) for size in shape]
    while True:
        growing = [axis for axis in range(len(shape)) if block[axis] < shape[axis]]
        if not growing:
            return tuple(block)
        axis = min(growing, key=lambda candidate: block[candidate])
        longer = min(2 * block[axis], shape[axis])
        if longer * int(np.prod(block)) // block[axis] > BLOCK_VOXELS:
            return tuple(block)
        block[axis] = longer


def chunk_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Chunks of at most 4 blocks an edge.

    Args:
        shape: (Z, Y, X).
    """
    return tuple(min(CHUNK_BLOCKS * edge, size) for edge, size in zip(block_shape(shape), shape, strict=True))


def occupancy_grid(foreground: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], tuple[int, int, int]]:
    """A coarse picture of the foreground: a cell is True when at least half of its voxels are.

    Args:
        foreground: (Z, Y, X).

    Returns:
        The grid, and the edges of a cell in voxels (cells at the far border may be clipped by the volume).
    """
    doublings = SMALLEST_CELL.bit_length() - 1
    while math.prod(-(-size // 2**doublings) for size in foreground.shape) > MAX_CELLS:
        doublings += 1
    edge = 2**doublings
    lengths = [np.minimum(edge, size - np.arange(0, size, edge)) for size in foreground.shape]
    volume = np.multiply.outer(np.multiply.outer(lengths[0], lengths[1]), lengths[2])
    z, y, x = (min(edge, size) for size in foreground.shape)
    return 2 * count_in_blocks(foreground, doublings).astype(np.int64) >= volume, (z, y, x)
