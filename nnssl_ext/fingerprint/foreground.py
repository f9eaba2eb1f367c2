"""What counts as foreground in an image without labels, and the box around what is not zero."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FOREGROUND_RULE = (
    "voxels above Otsu's threshold of the case (intensities clipped to the 0.1 and 99.9 percentiles), in "
    "connected parts (blocks of 2 voxels an edge that share faces) of at least 5% of the largest part's size"
)
"""The rule of `foreground_mask` in words, written into every fingerprint."""

CLIP_PERCENTILES = (0.1, 99.9)
MIN_PART = 0.05
NUM_BINS = 256
SAMPLED_VOXELS = 1 << 18
"""Voxels that decide the threshold: percentiles of so many are within 0.01 points of those of all."""


def otsu_threshold(values: NDArray[np.floating]) -> float:
    """The threshold that splits values into two classes of greatest between-class variance.

    Args:
        values: Any shape, finite.

    Returns:
        The upper edge of the histogram bin that ends the lower class; the one value itself where all are equal.

    Source: Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(low, high))
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sum_below = np.cumsum(counts * centers)[:-1]
    mean_below = sum_below / np.maximum(below, 1)
    mean_above = ((counts * centers).sum() - sum_below) / np.maximum(above, 1)
    best = int(np.argmax(below.astype(float) * above * (mean_below - mean_above) ** 2))
    return float(edges[best + 1])


def foreground_mask(image: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The foreground of one channel: bright voxels in large connected parts; see `FOREGROUND_RULE`.

    Args:
        image: (Z, Y, X) raw intensities; non-finite voxels are never foreground.

    Returns:
        (Z, Y, X) bool. All False where the finite voxels are constant.
    """
    finite = np.isfinite(image)
    sample = _sample(image)
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, CLIP_PERCENTILES) if sample.size else (0.0, 0.0)
    if low == high:  # nearly everything is one value: look at all of the range
        sample = image[finite]
        if not sample.size:
            return finite
        low, high = sample.min(), sample.max()
    threshold = otsu_threshold(np.clip(sample, low, high))
    return _without_small_parts(finite & (image > threshold))


def _sample(image: NDArray[np.floating]) -> NDArray[np.floating]:
    """Every n-th voxel of a large image, with an n that walks through all rows and columns alike."""
    step = max(1, image.size // SAMPLED_VOXELS)
    while math.gcd(step, math.prod(image.shape)) > 1:
        step += 1
    return image.reshape(-1)[::step]


def _without_small_parts(bright: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leaves out parts of less than 5% of the largest one's size. Labelling blocks costs an eighth of labelling voxels.

    Args:
        bright: (Z, Y, X); overwritten.
    """
    from scipy.ndimage import label

    counts = count_in_blocks(bright, 1)
    parts, _ = label(counts)
    sizes = np.bincount(parts.reshape(-1), weights=counts.reshape(-1))
    small = sizes < MIN_PART * sizes.max()
    if small[1:].any():
        dropped = small[parts]
        for corner in np.ndindex(2, 2, 2):
            voxels = bright[tuple(slice(start, None, 2) for start in corner)]
            voxels &= ~dropped[tuple(slice(size) for size in voxels.shape)]
    return bright


def count_in_blocks(mask: NDArray[np.bool_], doublings: int) -> NDArray[np.integer]:
    """How many voxels of each block are True.

    Args:
        mask: (Z, Y, X).
        doublings: Blocks are 2 to this power voxels an edge; those at the far border may hang over it.

    Returns:
        One count per block, in the smallest type that holds a full block's.
    """
    edge = 2**doublings
    counts: NDArray[np.integer] = np.pad(mask.view(np.uint8), [(0, -size % edge) for size in mask.shape])
    for doubling in range(1, doublings + 1):
        counts = counts.astype(np.min_scalar_type(8**doubling), copy=False)
        counts = counts[::2] + counts[1::2]
        counts = counts[:, ::2] + counts[:, 1::2]
        counts = counts[..., ::2] + counts[..., 1::2]
    return counts


def nonzero_box(data: NDArray[np.floating]) -> tuple[tuple[int, int], ...]:
    """The smallest box that holds every voxel that is not zero in some channel, as nnU-Net crops.

    Args:
        data: (C, Z, Y, X).

    Returns:
        (lower, upper) per axis, upper exclusive; the whole image where all voxels are zero.
    """
    nonzero = np.any(data != 0, axis=0)
    if not nonzero.any():
        return tuple((0, size) for size in nonzero.shape)
    box = []
    for axis in range(nonzero.ndim):
        others = tuple(other for other in range(nonzero.ndim) if other != axis)
        hit = np.flatnonzero(nonzero.any(axis=others))
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
