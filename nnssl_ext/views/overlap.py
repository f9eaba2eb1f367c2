"""What two views of one crop have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nnssl_ext.views.transform import SpatialTransform, columns


def shown_by(other: SpatialTransform, view: SpatialTransform) -> Tensor:
    """Which voxels of a view another view of the same crop shows as well, up to the other's elastic deformation.

    Args:
        other: Where the other view looks.
        view: Where the view looks.

    Returns:
        (B, 1, *size of the view), bool.
    """
    dims = len(view.size)
    offset = replace(view, centre=view.centre - other.centre).coordinates()
    inverse = torch.linalg.inv_ex(other.matrix).inverse
    voxel = torch.stack([columns(row, dims).mul(offset).sum(1) for row in inverse.unbind(1)], 1)
    half = columns(torch.tensor(other.size, device=offset.device)[None] / 2, dims)
    return (voxel.abs() <= half).all(1, keepdim=True)
