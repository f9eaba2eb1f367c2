"""Pairs of crops that are sure to have something in common."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from nnssl_ext.views.overlap import shown_by
from nnssl_ext.views.transform import SpatialTransform


def intersection_over_union(first: SpatialTransform, second: SpatialTransform) -> Tensor:
    """Volume that both views of a crop show over the volume that either shows, (B,), without elastic deformation."""
    size, other = (abs(each.matrix.det()) * prod(each.size) for each in (first, second))
    common = shown_by(second, first).float().flatten(1).mean(1) * size
    return common / (size + other - common).clamp(min=torch.finfo(common.dtype).tiny)


def with_overlap(
    first: SpatialTransform, second: SpatialTransform, least: float
) -> tuple[SpatialTransform, SpatialTransform]:
    """The pair as it is; where it shares less than that, the second view looks where the first one does.

    Args:
        first: Without elastic deformation.
        second: Of the same size, without elastic deformation.
        least: Intersection over union, in [0, 1].
    """
    apart = intersection_over_union(first, second) < least
    return first, replace(
        second,
        matrix=torch.where(apart[:, None, None], first.matrix, second.matrix),
        centre=torch.where(apart[:, None], first.centre, second.centre),
    )
