"""Places that two views of one crop both show, drawn at random, and what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.transform import SpatialTransform


def shared_places(
    asked: Tensor, there: Tensor, size: Sequence[int], random: SampleRandom, number: int
) -> tuple[Tensor, Tensor]:
    """Draws voxels of a view that another view shows too, not at its very border.

    Args:
        asked: (B, 1, *view), bool: voxels that may be drawn.
        there: (B, D, *view), where the other view shows each, in its voxels, counted from its middle.
        size: Voxels of the other view per axis.
        random: Keyed by sample.
        number: Voxels to draw.

    Returns:
        (B, number), int64, voxels of the view, the last axis fastest, no two alike; and which of them count, (B,
        number), bool: False at the end where a sample has fewer.
    """
    half = torch.tensor([(edge - 1) / 2 for edge in size], device=there.device).view(1, -1, *[1] * len(size))
    may = (asked & (there.abs() <= half).all(1, keepdim=True)).flatten(1)
    draw = torch.from_numpy(random.uniform("draw", shape=(prod(asked.shape[2:]),))).to(there.device)
    found, chosen = torch.where(may, draw, -1).topk(number, dim=1)
    return chosen, found >= 0


def unmoved(view: SpatialTransform) -> Tensor:
    """Every voxel of a view, counted from its middle: (1, D, *size)."""
    edges = [torch.arange(edge, device=view.centre.device) - (edge - 1) / 2 for edge in view.size]
    return torch.stack(torch.meshgrid(*edges, indexing="ij"))[None]


def across(offset: Tensor, size: Sequence[int]) -> Tensor:
    """Voxels counted from the middle of a view of that size, (..., D), as places from -1 to 1 across it."""
    return offset * 2 / torch.tensor(size, device=offset.device)


def picked(values: Tensor, chosen: Tensor) -> Tensor:
    """Values (B, C, *size) at voxels (B, P), the last axis fastest: (B, P, C)."""
    return values.flatten(2).gather(2, chosen[:, None].expand(-1, values.shape[1], -1)).transpose(1, 2)


def read_at(values: Tensor, there: Tensor) -> Tensor:
    """Values (B, C, *size) of views, interpolated linearly at places (B, P, D), from -1 to 1 across them: (B, P, C)."""
    grid = there.flip(2).view(*there.shape[:2], *[1] * (values.ndim - 3), values.ndim - 2)
    read = functional.grid_sample(values, grid, padding_mode="border", align_corners=False)
    return read.flatten(2).transpose(1, 2)
