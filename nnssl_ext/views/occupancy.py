"""Where a view holds anything: background is what is flat, in air as in padding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

NEIGHBOURHOOD = 5
"""Voxels, along each axis, of the box whose deviation tells whether it is flat."""


def occupied_cells(data: Tensor, valid: Tensor, cell: Sequence[int], least_std: float, least_share: float) -> Tensor:
    """Cells of which that share is real and textured.

    Args:
        data: (B, C, *size).
        valid: (B, 1, *size), bool.
        cell: Voxels of a cell per axis, which divide the size.
        least_std: Deviation, in any channel, from which on a voxel's neighbourhood is textured.
        least_share: In [0, 1]; of a cell, and never none.

    Returns:
        (B, 1, *cells), bool.
    """
    pool = functional.avg_pool3d if data.ndim == 5 else functional.avg_pool2d
    reach = NEIGHBOURHOOD // 2
    mean, square = (
        pool(each.float(), NEIGHBOURHOOD, 1, reach, count_include_pad=False) for each in (data, data.square())
    )
    textured = (square - mean.square() > least_std**2).any(1, keepdim=True) & valid
    grid = [edge // step for edge, step in zip(data.shape[2:], cell, strict=True)]
    share = functional.interpolate(textured.float(), size=grid, mode="area")
    return (share >= least_share) & (share > 0)
