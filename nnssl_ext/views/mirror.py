"""Where the other half of a symmetric body lies: places reflected on a known mid-plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_ext.loading.batch import Batch
from nnssl_ext.views.places import across, read_at
from nnssl_ext.views.transform import SpatialTransform


def reflected(where: Tensor, batch: Batch, axis: int, mid_plane: float) -> Tensor:
    """Places of a batch's crops on the other side of the mid-plane, which may lie outside of the crop.

    Args:
        where: (B, P, D), in mm from the crops' first voxel.
        batch: The crops; how they lie within their raw images decides.
        axis: Which axis the plane cuts, from 0.
        mid_plane: Where it does, in mm from the border of the raw image.

    Returns:
        (B, P, D), in mm from the crops' first voxel.
    """
    begins = torch.tensor([origin[axis] for origin in batch.origin], device=where.device)
    plane = mid_plane - begins - (batch.lower[:, axis] + 0.5) * batch.spacing[:, axis]
    other = where.clone()
    other[:, :, axis] = 2 * plane[:, None] - where[:, :, axis]
    return other


def seen_at(transform: SpatialTransform, places: Tensor) -> Tensor:
    """Where a view shows places of its crop: (B, P, D), from -1 to 1 across the view, beyond that outside of it.

    Args:
        transform: Where the view looks, without elastic deformation.
        places: (B, P, D), in voxels of the crop.
    """
    inverse = torch.linalg.inv_ex(transform.matrix).inverse
    offset = places - transform.centre[:, None]
    return across((inverse[:, None] * offset[:, :, None]).sum(3), transform.size)


def shown_at(asked: Tensor, there: Tensor, size: Sequence[int]) -> Tensor:
    """Whether views show places, not at their very border, and these are asked for: (B, P), bool.

    Args:
        asked: (B, 1, *size), bool.
        there: (B, P, D), from -1 to 1 across the view.
        size: Voxels of the view per axis.
    """
    half = torch.tensor([(edge - 1) / edge for edge in size], device=there.device)
    return (there.abs() <= half).all(2) & (read_at(asked.float(), there)[:, :, 0] > 0.5)
