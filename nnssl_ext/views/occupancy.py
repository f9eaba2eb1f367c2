"""Where a view holds anything: background is what is flat, in air as in padding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

NEIGHBOURHOOD = 5
"""Voxels, along each axis, of the box whose deviation tells whether it is flat."""


def textured(data: Tensor, valid: Tensor, least_std: float) -> Tensor:
    """Real voxels around which intensities deviate by that much, in any channel.

    What is not real takes no part in the deviation, so that flat air beside padding stays flat.

    Args:
        data: (B, C, *size).
        valid: (B, 1, *size), bool.
        least_std: Deviation on a voxel's neighbourhood.

    Returns:
        (B, 1, *size), bool.
    """
    pool = functional.avg_pool3d if data.ndim == 5 else functional.avg_pool2d
    data, real = data.float().masked_fill(~valid, 0), valid.float()
    mean, square, share = (
        pool(each, NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False)
        for each in (data, data.square(), real)
    )
    deviates = square / share - (mean / share).square() > least_std**2  # 0 / 0 where nothing is real: False
    return deviates.any(1, keepdim=True) & valid


def occupied_cells(data: Tensor, valid: Tensor, cell: Sequence[int], least_std: float, least_share: float) -> Tensor:
    """Cells of which that share is real and `textured`.

    Args:
        data: (B, C, *size).
        valid: (B, 1, *size), bool.
        cell: Voxels of a cell per axis, which divide the size.
        least_std: Deviation from which on a voxel is textured.
        least_share: In [0, 1]; of a cell, and never none.

    Returns:
        (B, 1, *cells), bool.
    """
    grid = [edge // step for edge, step in zip(data.shape[2:], cell, strict=True)]
    share = functional.interpolate(textured(data, valid, least_std).float(), size=grid, mode="area")
    return (share >= least_share) & (share > 0)
