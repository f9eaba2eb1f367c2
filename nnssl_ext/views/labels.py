"""Label maps in views: the nearest label, where images are interpolated."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from nnssl_ext.views.overlap import place_in
from nnssl_ext.views.transform import SpatialTransform

NOTHING = -1
"""The label of voxels that have none."""


def labels_in_view(labels: Tensor, view: SpatialTransform) -> Tensor:
    """What a view of a crop shows of its label map.

    Args:
        labels: (B, 1, *crop), integers.
        view: Where it looks.

    Returns:
        (B, 1, *size of the view); `NOTHING` beyond the crop.
    """
    return nearest_labels(labels, view.coordinates())


def labels_of_other_view(labels: Tensor, other: SpatialTransform, view: SpatialTransform) -> Tensor:
    """The label map of another view of the same crop, brought to where a view shows the same.

    Args:
        labels: (B, 1, *size of the other view), integers.
        other: Where the other view looks, without elastic deformation.
        view: Where the view looks.

    Returns:
        (B, 1, *size of the view); `NOTHING` where the other view does not look.
    """
    middle = torch.tensor([(edge - 1) / 2 for edge in other.size], device=labels.device)
    return nearest_labels(labels, place_in(other, view) + middle.view(1, -1, *[1] * len(view.size)))


def nearest_labels(labels: Tensor, places: Tensor) -> Tensor:
    """The labels nearest to some places.

    Args:
        labels: (B, 1, *crop), integers.
        places: (B, D, *size), voxels of the crop, with fractions.

    Returns:
        (B, 1, *size); `NOTHING` half a voxel beyond the crop's outer ones, and further.
    """
    crop = labels.shape[2:]
    index = torch.zeros_like(places[:, :1], dtype=torch.int64)
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, edge in enumerate(crop):
        voxel = (places[:, axis : axis + 1] + 0.5).floor().long()
        inside &= (voxel >= 0) & (voxel < edge)
        index += voxel.clamp(0, edge - 1) * prod(crop[axis + 1 :])
    found = labels.flatten(1).gather(1, index.flatten(1)).view_as(index)
    return torch.where(inside, found, NOTHING)
