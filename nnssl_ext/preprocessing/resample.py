"""Spline resampling, one axis after another, with the numbers of nnU-Net's `resample_data_or_seg_to_shape`.

Spline interpolation on a grid is separable and linear. So the prefilter and the interpolation along an axis are
together one small matrix, and resizing a volume is three float32 matrix products instead of 64 double-precision taps
per voxel. A row of the matrix decays by a factor of 3.7 per voxel; what is below 1e-9 is zero here (as subnormal
numbers it would slow the products 15 times), which leaves a narrow band, and only the band is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

SPLINE_FUNCTION = "resample_data_or_seg_to_shape"
NO_RESAMPLING_FUNCTION = "no_resampling_hack"
ANISOTROPY_THRESHOLD = 3.0
"""Ratio of the largest to the smallest spacing above which slices are resampled on their own (nnU-Net's value)."""
NEGLIGIBLE = 1e-9
"""Weights below this are zero; float32 resolves 6e-8 of the largest."""
BAND_ROWS = 32
"""Output rows that share one product with the columns they reach."""
SPLINE_ORDERS = (0, 1, 3)
KEYWORDS = ("is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold")

Float32 = npt.NDArray[np.float32]


def new_shape(shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]) -> tuple[int, ...]:
    """Shape that covers the same millimetres at another spacing, rounded to whole voxels as nnU-Net rounds.

    Args:
        shape: (Z, Y, X).
        spacing: In mm, (Z, Y, X).
        new_spacing: In mm, (Z, Y, X).

    Raises:
        ValueError: If an axis would be left with no voxel.
    """
    result = tuple(round(old / new * size) for old, new, size in zip(spacing, new_spacing, shape, strict=True))
    if min(result) < 1:
        raise ValueError(
            f"resampling shape {tuple(shape)} from spacing {tuple(spacing)} to {tuple(new_spacing)} leaves no voxel "
            "on an axis; correct the image's spacing or plan with a finer one"
        )
    return result


def separate_axis(
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    threshold: float = ANISOTROPY_THRESHOLD,
    force: bool | None = None,
) -> int | None:
    """The axis that is too coarse to be interpolated together with the others, if there is one.

    It is the axis of the largest spacing, before resampling or else after it, when that exceeds the smallest by more
    than the threshold, and when no second axis is as coarse.

    Args:
        spacing: In mm, (Z, Y, X), before.
        new_spacing: In mm, (Z, Y, X), after.
        threshold: Ratio of largest to smallest spacing.
        force: Always (True) or never (False) separate; None decides by the threshold.
    """
    if force is False:
        return None
    deciding = [spacing] if force else [spacing, new_spacing]
    for edges in deciding:
        if force or max(edges) / min(edges) > threshold:
            coarse = [axis for axis, edge in enumerate(edges) if edge == max(edges)]
            return coarse[0] if len(coarse) == 1 else None
    return None


@lru_cache(maxsize=64)
def interpolation_matrix(size: int, new_size: int, order: int) -> Float32:
    """What spline interpolation of an axis does to it, as a matrix (new_size, size).

    Voxel centres are spread over the same extent (no aligned corners) and the border voxel continues outwards:
    `skimage.transform.resize(mode="edge", anti_aliasing=False)` along one axis. Its columns are scipy's answers to unit
    impulses.

    Args:
        size: Voxels before.
        new_size: Voxels after.
        order: 1 (linear) or 3 (cubic).
    """
    impulses = np.eye(size)
    matrix = ndimage.zoom(impulses, (new_size / size, 1), order=order, mode="nearest", grid_mode=True)
    matrix[np.abs(matrix) < NEGLIGIBLE] = 0
    return matrix.astype(np.float32)


def nearest_indices(size: int, new_size: int) -> npt.NDArray[np.intp]:
    """The voxel that each new voxel's centre falls into; a centre on an edge goes to the upper one, as in scipy."""
    centres = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    return np.clip(np.floor(centres + 0.5).astype(np.intp), 0, size - 1)


def resize_nearest(volume: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """Resizes a volume (Z, Y, X) of any type by taking the nearest voxel."""
    for axis, new_size in enumerate(shape):
        if volume.shape[axis] != new_size:
            volume = np.take(volume, nearest_indices(volume.shape[axis], new_size), axis=axis)
    return volume


def resize_axis(data: Float32, new_size: int, axis: int, order: int) -> Float32:
    """Resizes one of the last three axes.

    Args:
        data: (Z, Y, X), C-contiguous.
        new_size: Voxels along the axis afterwards.
        axis: 0, 1 or 2.
        order: Of the spline: 0, 1 or 3.
    """
    size = data.shape[axis]
    if size == new_size:
        return data
    if order == 0:
        return np.take(data, nearest_indices(size, new_size), axis=axis)
    matrix = interpolation_matrix(size, new_size, order)
    result = np.empty((*data.shape[:axis], new_size, *data.shape[axis + 1 :]), dtype=np.float32)
    source, target = (data.reshape(size, -1), result.reshape(new_size, -1)) if axis == 0 else (data, result)
    for start in range(0, new_size, BAND_ROWS):
        rows = slice(start, start + BAND_ROWS)
        (reached,) = np.nonzero(matrix[rows].any(axis=0))
        columns = slice(reached[0], reached[-1] + 1)
        band = matrix[rows, columns]
        if axis == 2:
            np.matmul(source[..., columns], band.T, out=target[..., rows])
        else:
            np.matmul(band, source[..., columns, :], out=target[..., rows, :])
    return result


def resize(
    volume: Float32, shape: Sequence[int], order: int, keep_separate: int | None = None, order_z: int = 0
) -> Float32:
    """Resizes a volume by splines and keeps the result within the values it came from.

    Args:
        volume: (Z, Y, X).
        shape: New shape (Z, Y, X).
        order: Of the spline: 0, 1 or 3.
        keep_separate: An axis whose slices are resized on their own (and bounded by their own extremes), before the
            axis itself is resized with `order_z`.
        order_z: Order for that axis.
    """
    if tuple(volume.shape) == tuple(shape):
        return volume
    data = np.ascontiguousarray(volume, dtype=np.float32)
    together = [axis for axis in range(data.ndim) if axis != keep_separate]
    within = tuple(together)
    low, high = data.min(axis=within, keepdims=True), data.max(axis=within, keepdims=True)
    for axis in sorted(together, key=lambda axis: shape[axis] / data.shape[axis]):
        data = resize_axis(data, shape[axis], axis, order)
    if order > 1 and data.shape != volume.shape:
        data = np.clip(data, low, high, out=data)
    if keep_separate is not None:
        data = resize_axis(data, shape[keep_separate], keep_separate, order_z)
    return data


def resample(
    data: Float32,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    function: str = SPLINE_FUNCTION,
    *,
    device: str = "cpu",
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = False,
    separate_z_anisotropy_threshold: float = ANISOTROPY_THRESHOLD,
) -> Float32:
    """Resamples every channel as the function of that name in nnU-Net does, with nnU-Net's own keyword arguments.

    Args:
        data: (C, Z, Y, X).
        shape: New shape (Z, Y, X).
        spacing: In mm, (Z, Y, X), before.
        new_spacing: In mm, (Z, Y, X), after.
        function: `resample_data_or_seg_to_shape`, or `no_resampling_hack` which returns the data.
        device: `cpu`, or a torch device that multiplies the matrices; equal within 1e-4.
        is_seg: Must be False: these are images.
        order: Of the in-plane or whole spline: 0, 1 or 3.
        order_z: Order along an axis that is kept separate.
        force_separate_z: See `separate_axis`.
        separate_z_anisotropy_threshold: See `separate_axis`.

    Raises:
        ValueError: If the function or an order is not one of those above.
    """
    if function == NO_RESAMPLING_FUNCTION:
        return data
    check_resampling(function, {"is_seg": is_seg, "order": order, "order_z": order_z})
    axis = separate_axis(spacing, new_spacing, separate_z_anisotropy_threshold, force_separate_z)
    if tuple(shape) == data.shape[1:]:
        return data
    result = np.empty((len(data), *shape), dtype=np.float32)
    for channel, target in zip(data, result, strict=True):
        if device == "cpu":
            target[...] = resize(channel, shape, order, axis, order_z)
        else:
            from nnssl_ext.preprocessing.resample_torch import resize_on_device

            target[...] = resize_on_device(channel, shape, order, axis, order_z, device)
    return result


def check_resampling(function: str, settings: Mapping[str, Any]) -> None:
    """Refuses what cannot be computed here, before hours are spent.

    Raises:
        ValueError: If the function, an order or a keyword is unknown.
    """
    if function not in (SPLINE_FUNCTION, NO_RESAMPLING_FUNCTION):
        raise ValueError(
            f"resampling_fn_data {function!r} is not supported; use {SPLINE_FUNCTION} or {NO_RESAMPLING_FUNCTION}"
        )
    unknown = set(settings) - set(KEYWORDS)
    if unknown:
        raise ValueError(f"resampling_fn_data_kwargs has unknown {', '.join(sorted(unknown))}; allowed: {KEYWORDS}")
    if settings.get("is_seg", False):
        raise ValueError(
            "resampling_fn_data_kwargs has is_seg true, but images are resampled; set it to false in the plans"
        )
    for name in ("order", "order_z"):
        if settings.get(name, 0) not in SPLINE_ORDERS:
            raise ValueError(f"resampling_fn_data_kwargs has {name} {settings[name]!r}; allowed: {SPLINE_ORDERS}")
