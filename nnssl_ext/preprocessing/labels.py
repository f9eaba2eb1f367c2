"""Resampling of label maps with the results of nnU-Net's `resample_data_or_seg_to_shape`.

nnU-Net interpolates the indicator of every label linearly and gives each voxel the label with the largest value. That
is one volume of doubles per label. But an interpolated voxel sees its eight neighbours only, and nearly everywhere they
carry one label; so here the few voxels that see several are found first, and only they are weighed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnssl_ext.preprocessing.resample import ANISOTROPY_THRESHOLD, nearest_indices, resize_nearest, separate_axis

LABEL_ORDERS = (0, 1)
SLAB_VOXELS = 1 << 18
"""Voxels of the result that are worked on together; bounds the memory."""

Labels = npt.NDArray[np.integer]


def resample_labels(
    labels: Labels,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    is_seg: bool = True,
    order: int = 1,
    order_z: int = 0,
    force_separate_z: bool | None = None,
    separate_z_anisotropy_threshold: float = ANISOTROPY_THRESHOLD,
) -> Labels:
    """Resamples label maps as nnU-Net does, with the keyword arguments of its plans (`resampling_fn_seg_kwargs`).

    Args:
        labels: (C, Z, Y, X), any integers.
        shape: New shape (Z, Y, X).
        spacing: In mm, (Z, Y, X), before.
        new_spacing: In mm, (Z, Y, X), after.
        is_seg: Must be True: these are labels.
        order: 1 for the label of the largest linear weight (ties go to the nearest voxel's label if it is among them,
            else to the smallest), 0 for the nearest voxel's label.
        order_z: The same for an axis that is kept separate; there a tie gives 0, as in nnU-Net.
        force_separate_z: See `nnssl_ext.preprocessing.resample.separate_axis`.
        separate_z_anisotropy_threshold: See there.

    Returns:
        (C, *shape), of the type of `labels`.

    Raises:
        ValueError: If an order is neither 0 nor 1, or `is_seg` is not set.
    """
    if not is_seg or order not in LABEL_ORDERS or order_z not in LABEL_ORDERS:
        raise ValueError(
            f"labels are resampled with is_seg true and orders {LABEL_ORDERS}, not with is_seg {is_seg}, order {order} "
            f"and order_z {order_z}; correct resampling_fn_seg_kwargs in the plans"
        )
    axis = separate_axis(spacing, new_spacing, separate_z_anisotropy_threshold, force_separate_z)
    result = np.empty((len(labels), *shape), dtype=labels.dtype)
    for volume, target in zip(labels, result, strict=True):
        within = tuple(volume.shape[number] if number == axis else size for number, size in enumerate(shape))
        resized = resize_nearest(volume, within) if order == 0 else _resize_linear(volume, within)
        if axis is None or order_z == 0:
            target[...] = resize_nearest(resized, shape)
        else:
            target[...] = _resize_separate(resized, shape[axis], axis)
    return result


@dataclass(frozen=True)
class _Taps:
    """The two voxels that each new voxel of an axis is interpolated from, and their weights."""

    indices: npt.NDArray[np.intp]
    """(2, new size)."""
    weights: npt.NDArray[np.float64]
    """(2, new size); exactly scipy's, since ties are decided by them."""
    nearest: npt.NDArray[np.intp]
    """(new size,): the voxel that the centre falls into."""

    @classmethod
    def of(cls, size: int, new_size: int) -> _Taps:
        matrix = ndimage.zoom(np.eye(size), (new_size / size, 1), order=1, mode="nearest", grid_mode=True)
        lower = np.argmax(matrix != 0, axis=1)
        rows = np.arange(new_size)
        indices = np.stack([lower, np.minimum(lower + 1, size - 1)])
        first = matrix[rows, lower]
        second = np.where(indices[1] > lower, matrix[rows, indices[1]], 0)
        return cls(indices, np.stack([first, second]), nearest_indices(size, new_size))


def _resize_linear(volume: Labels, shape: tuple[int, ...]) -> Labels:
    """Resizes (Z, Y, X) labels; each voxel takes the label with the largest sum of trilinear weights."""
    if volume.shape == shape:
        return volume
    taps = [_Taps.of(size, new_size) for size, new_size in zip(volume.shape, shape, strict=True)]
    volume = np.ascontiguousarray(volume)
    mixed = _mixed_cells(volume, shape)
    result = np.empty(shape, dtype=volume.dtype)
    depth = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], depth):
        slab = slice(start, start + depth)
        lower = [taps[0].indices[0, slab], taps[1].indices[0], taps[2].indices[0]]
        result[slab] = _take(volume, lower)
        places = np.nonzero(_take(mixed, lower))
        result[slab][places] = _largest_weights(volume, taps, (places[0] + start, *places[1:]))
    return result


def _take(volume: npt.NDArray[np.generic], indices: Sequence[npt.NDArray[np.intp]]) -> npt.NDArray[np.generic]:
    for axis, chosen in enumerate(indices):
        volume = np.take(volume, chosen, axis=axis)
    return volume


def _mixed_cells(volume: Labels, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Where a voxel and its next ones along the axes that change do not all carry one label."""
    low = high = volume
    for axis, (size, new_size) in enumerate(zip(volume.shape, shape, strict=True)):
        if size != new_size:
            following = np.minimum(np.arange(size) + 1, size - 1)
            low = np.minimum(low, np.take(low, following, axis=axis))
            high = np.maximum(high, np.take(high, following, axis=axis))
    return low != high


def _largest_weights(volume: Labels, taps: Sequence[_Taps], places: tuple[npt.NDArray[np.intp], ...]) -> Labels:
    """The winning labels at some places of the result, given as one index array per axis."""
    corners = list(product((0, 1), repeat=3))
    found = np.empty((len(corners), len(places[0])), dtype=volume.dtype)
    weights = np.empty(found.shape)
    for number, corner in enumerate(corners):  # products and sums in scipy's order, so that ties are its ties
        sides = list(zip(taps, corner, strict=True))
        found[number] = _gather(volume, [axis.indices[side] for axis, side in sides], places)
        z, y, x = (axis.weights[side][place] for (axis, side), place in zip(sides, places, strict=True))
        weights[number] = z * y * x
    scores = np.zeros(found.shape)
    for label, score in zip(found, scores, strict=True):
        for other, weight in zip(found, weights, strict=True):
            score += np.where(other == label, weight, 0)
    leads = scores == scores.max(axis=0)
    nearest = _gather(volume, [axis.nearest for axis in taps], places)
    smallest = np.where(leads, found, np.iinfo(volume.dtype).max).min(axis=0)
    return np.where((leads & (found == nearest)).any(axis=0), nearest, smallest).astype(volume.dtype)


def _gather(volume: Labels, indices: Sequence[npt.NDArray[np.intp]], places: Sequence[npt.NDArray[np.intp]]) -> Labels:
    return volume[tuple(index[place] for index, place in zip(indices, places, strict=True))]


def _resize_separate(volume: Labels, new_size: int, axis: int) -> Labels:
    """Resizes one axis linearly: the label that weighs more than half, or 0."""
    taps = _Taps.of(volume.shape[axis], new_size)
    along = tuple(-1 if number == axis else 1 for number in range(volume.ndim))
    first, second = (np.take(volume, indices, axis=axis) for indices in taps.indices)
    heavier_first, heavier_second = (weights.reshape(along) > 0.5 for weights in taps.weights)
    chosen = np.where(heavier_first, first, np.where(heavier_second, second, np.zeros_like(first)))
    return np.where(first == second, first, chosen)
