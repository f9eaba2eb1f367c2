"""Cropping to the part of an image that is not zero, as nnU-Net does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def crop_to_box(data: npt.NDArray[np.float32], box: Sequence[tuple[int, int]]) -> npt.NDArray[np.float32]:
    """A C-contiguous copy of a box of every channel.

    Args:
        data: (C, Z, Y, X).
        box: Half-open range per axis (Z, Y, X).
    """
    return data[(slice(None), *(slice(*side) for side in box))].copy(order="C")


def nonzero_mask(data: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """True where a channel is not zero, and in zero regions that such voxels enclose.

    Equals nnU-Net's `create_nonzero_mask`, which grows the background from the border step by step. Here the zero
    regions are labelled once, and those that reach no border are holes. Holes do not change a bounding box, so the mask
    may be made after the crop, and only where a normalisation asks for it.

    Args:
        data: (C, Z, Y, X).

    Returns:
        (Z, Y, X).
    """
    mask = np.any(data, axis=0)
    regions, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, dtype=bool)
    for axis in range(mask.ndim):
        for end in (0, -1):
            outside[np.unique(np.take(regions, end, axis=axis))] = True
    outside[0] = False
    return ~outside[regions]
