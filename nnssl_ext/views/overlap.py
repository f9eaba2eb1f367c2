"""What two views of one crop have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nnssl_ext.views.transform import SpatialTransform, columns


def place_in(other: SpatialTransform, view: SpatialTransform) -> Tensor:
    """Where another view of the same crop shows what a view shows, up to the other's elastic deformation.

    Args:
        other: Where the other view looks.
        view: Where the view looks.

    Returns:
        (B, D, *size of the view): voxels of the other view, counted from its middle.
    """
    dims = len(view.size)
    offset = replace(view, centre=view.centre - other.centre).coordinates()
    inverse = torch.linalg.inv_ex(other.matrix).inverse
    return torch.stack([columns(row, dims).mul(offset).sum(1) for row in inverse.unbind(1)], 1)


def shown_by(other: SpatialTransform, view: SpatialTransform) -> Tensor:
    """Which voxels of a view another view of the same crop shows as well, up to the other's elastic deformation.

    Args:
        other: Where the other view looks.
        view: Where the view looks.

    Returns:
        (B, 1, *size of the view), bool.
    """
    place = place_in(other, view)
    half = columns(torch.tensor(other.size, device=place.device)[None] / 2, len(view.size))
    return (place.abs() <= half).all(1, keepdim=True)
