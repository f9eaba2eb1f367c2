"""Spline resampling on a GPU: the matrices of `nnssl_ext.preprocessing.resample`, multiplied there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nnssl_ext.preprocessing.resample import interpolation_matrix, nearest_indices

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]


def check_device(device: str) -> None:
    """Refuses a device that this process does not have.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); preprocess with -device cpu") from error


def resize_on_device(
    volume: Float32, shape: Sequence[int], order: int, keep_separate: int | None, order_z: int, device: str
) -> Float32:
    """Does what `resize` does, equal within 1e-4 of the volume's standard deviation.

    Args:
        volume: (Z, Y, X).
        shape: New shape (Z, Y, X).
        order: Of the spline: 0, 1 or 3.
        keep_separate: See `resize`.
        order_z: See `resize`.
        device: A torch device, such as `cuda`.
    """
    import torch

    data = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32)).to(device)
    together = [axis for axis in range(data.ndim) if axis != keep_separate]
    low, high = data.amin(together, keepdim=True), data.amax(together, keepdim=True)
    for axis in sorted(together, key=lambda axis: shape[axis] / data.shape[axis]):
        data = _resize_axis(data, shape[axis], axis, order)
    if order > 1 and data.shape != volume.shape:
        data = torch.clamp(data, low, high)
    if keep_separate is not None:
        data = _resize_axis(data, shape[keep_separate], keep_separate, order_z)
    return data.cpu().numpy()


def _resize_axis(data: torch.Tensor, new_size: int, axis: int, order: int) -> torch.Tensor:
    import torch

    size = data.shape[axis]
    if size == new_size:
        return data
    if order == 0:
        indices = torch.from_numpy(nearest_indices(size, new_size))
        return torch.index_select(data, axis, indices.to(data.device))
    matrix = torch.from_numpy(interpolation_matrix(size, new_size, order)).to(data.device)
    return torch.tensordot(matrix, data, dims=([1], [axis])).movedim(0, axis)
