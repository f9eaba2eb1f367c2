"""What counts as foreground in an image without labels, and the box around what is not zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FOREGROUND_RULE = (
    "voxels above Otsu's threshold of the case (intensities clipped to the 0.1 and 99.9 percentiles), "
    "in connected parts of at least 5% of the largest part's size"
)
"""The rule of `foreground_mask` in words, written into every fingerprint."""

CLIP_PERCENTILES = (0.1, 99.9)
MIN_PART = 0.05
NUM_BINS = 256
MAX_SAMPLED_VOXELS = 1 << 22


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
    from scipy.ndimage import label

    finite = np.isfinite(image)
    values = image[finite]
    if not values.size:
        return np.zeros(image.shape, dtype=bool)
    sample = values[:: -(-values.size // MAX_SAMPLED_VOXELS)]
    low, high = np.percentile(sample, CLIP_PERCENTILES)
    if low == high:  # nearly everything is one value: look at all of the range
        low, high = values.min(), values.max()
    threshold = otsu_threshold(np.clip(sample, low, high))
    bright = finite & (image > threshold)
    parts, _ = label(bright, structure=np.ones((3,) * image.ndim))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = sizes >= max(1.0, MIN_PART * sizes.max())
    kept[0] = False
    return kept[parts]


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
