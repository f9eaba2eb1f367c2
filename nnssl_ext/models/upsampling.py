"""From the cells of a feature map to voxels: linearly, or along the edges of the image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from torch.nn import functional

Upsampling = Literal["linear", "bilateral"]
SPATIAL_SIGMA = 1.0
"""In cells: how far away a cell still counts."""
RANGE_SIGMA = 0.5
"""In units of the z-scored image: how different a cell may be and still count."""


def upsampled(
    cells: torch.Tensor, image: torch.Tensor, stride: Sequence[int], how: Upsampling = "linear"
) -> torch.Tensor:
    """Features of every voxel.

    Args:
        cells: (B, D, *size / stride).
        image: (B, C, *size), what the features are of.
        stride: Voxels of a cell per axis.
        how: `linear`, or `bilateral`; see `joint_bilateral`.

    Returns:
        (B, D, *size), float32.
    """
    if how == "bilateral":
        return joint_bilateral(cells, image, stride)
    mode = "trilinear" if len(stride) == 3 else "bilinear"
    return functional.interpolate(cells.float(), scale_factor=[float(step) for step in stride], mode=mode)


def joint_bilateral(cells: torch.Tensor, image: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """A mean over the nearest cells, of which those count that are near and look alike (Kopf et al. 2007).

    A voxel looks at its own cell and all that touch it. A cell's weight is a Gaussian of the distance to its middle,
    times one of the difference between the voxel and the cell's mean intensity. So borders of features follow those of
    the image.

    Args:
        cells: (B, D, *size / stride).
        image: (B, C, *size).
        stride: Voxels of a cell per axis.

    Returns:
        (B, D, *size), float32.
    """
    cells, image = cells.float(), image.float()
    dims, grid = len(stride), cells.shape[2:]
    pool = functional.avg_pool3d if dims == 3 else functional.avg_pool2d
    known = torch.cat([pool(image, tuple(stride)), torch.ones_like(cells[:, :1])], 1)
    parts = functional.pad(torch.cat([cells, known], 1), [1] * (2 * dims))  # what is beyond is not known
    width, channels = cells.shape[1], image.shape[1]
    total, weights = torch.zeros(1, device=cells.device), torch.zeros(1, device=cells.device)
    for offset in product((-1, 0, 1), repeat=dims):
        moved = parts[(slice(None), slice(None), *(slice(1 + o, 1 + o + n) for o, n in zip(offset, grid, strict=True)))]
        for axis, step in enumerate(stride, start=2):
            moved = moved.repeat_interleave(step, axis)
        features, mean, there = moved.split([width, channels, 1], 1)
        unlike = (image - mean).square().mean(1, keepdim=True) / RANGE_SIGMA**2
        weight = torch.exp(-(unlike + _distance(offset, grid, stride, cells.device) / SPATIAL_SIGMA**2) / 2) * there
        total, weights = total + weight * features, weights + weight
    return total / weights.clamp(min=torch.finfo(torch.float32).tiny)


def _distance(offset: Sequence[int], grid: Sequence[int], stride: Sequence[int], device: torch.device) -> torch.Tensor:
    """Squared distance, in cells, of every voxel from the middle of the cell that lies so many further: (*size)."""
    total = torch.zeros((), device=device)
    for axis, (o, number, step) in enumerate(zip(offset, grid, stride, strict=True)):
        inside = ((torch.arange(step, device=device) + 0.5) / step - 0.5).repeat(number)
        total = total + (inside - o).square().view(-1, *[1] * (len(grid) - 1 - axis))
    return total
