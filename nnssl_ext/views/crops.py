"""Crops of a crop: the view for validation, and views of random size and place for tasks that compare several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.spatial import SpatialConfig, draw_transform
from nnssl_ext.views.transform import (
    SpatialTransform,
    SpatialView,
    apply_transform,
    columns,
    half_extent,
    place_view,
    valid_box,
)

UNMOVED = SpatialConfig(flip=0, rotation=0, scaling=0, elastic=0)
"""Nothing happens."""
_ROUNDING = 1e-3
"""Voxels by which a view that fits may stick out."""


def centre_view(data: Tensor, valid: Tensor, size: Sequence[int]) -> SpatialView:
    """The middle of the crop as it is, moved by what it takes to lie in the real voxels: the view of validation.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        size: Voxels of the view per axis.
    """
    as_it_is = torch.eye(len(size), device=valid.device).expand(len(valid), -1, -1)
    transform = place_view(valid, as_it_is, None, size)
    return apply_transform(data, valid, replace(transform, unmoved=dict.fromkeys(range(len(valid)), ())))


def random_crop(
    data: Tensor,
    valid: Tensor,
    spacing: Tensor,
    random: SampleRandom,
    scale: tuple[float, float],
    size: Sequence[int],
    config: SpatialConfig = UNMOVED,
) -> SpatialView:
    """A crop of random size and place within the real voxels, resized to a fixed number of voxels.

    Its shape is that of `size`, so anatomy is magnified but not distorted. Everything happens in one resampling.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        spacing: (B, D) in mm.
        random: Keyed by sample; use a child for each view.
        scale: Smallest and largest edge as a share of the largest crop of that shape that fits, in (0, 1].
        size: Voxels of the view per axis.
        config: Flips, rotations and so on; a rotated crop is shrunk to stay inside, and left unrotated where it would
            have to shrink too far, as in a slab.

    Raises:
        ValueError: If the scales are out of range.
    """
    place = torch.from_numpy(random.uniform("crop_place", shape=(len(size),))).to(valid.device)
    return apply_transform(data, valid, _place(valid, spacing, random, scale, size, config, place))


def place_pair(
    valid: Tensor,
    spacing: Tensor,
    random: SampleRandom,
    scale: tuple[float, float],
    size: Sequence[int],
    config: SpatialConfig = UNMOVED,
    shift: float = 0.0,
) -> tuple[SpatialTransform, SpatialTransform]:
    """Where two crops look that overlap, each of random size and moved on its own.

    The box around the smaller one lies in the box around the larger one, however far rotations shrink them. The second
    is then shifted along every axis, as far as the real voxels reach.

    Args:
        valid: (B, 1, *crop), bool.
        spacing: (B, D) in mm.
        random: Keyed by sample.
        scale: As in `random_crop`, for both.
        size: Voxels of a view per axis.
        config: As in `random_crop`, for both.
        shift: Longest shift as a share of the second crop's box, 0 or more.

    Raises:
        ValueError: If the scales are out of range.
    """
    place, step = (
        torch.from_numpy(random.uniform(name, low, high, (len(size),))).to(valid.device)
        for name, low, high in (("crop_place", 0, 1), ("crop_shift", -shift, shift))
    )
    first, second = (
        _place(valid, spacing, random.child(name), scale, size, config, place) for name in ("first", "second")
    )
    lower, upper = valid_box(valid)
    half = half_extent(second.matrix, second.displacement, size)
    low, high = torch.minimum(lower + half, upper - half), torch.maximum(lower + half, upper - half)
    return first, replace(second, centre=(second.centre + 2 * half * step).clamp(low, high))


def _place(
    valid: Tensor,
    spacing: Tensor,
    random: SampleRandom,
    scale: tuple[float, float],
    size: Sequence[int],
    config: SpatialConfig,
    place: Tensor,
) -> SpatialTransform:
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"scale={scale} must be two numbers in (0, 1], the smaller one first.")
    lower, upper = valid_box(valid)
    edges, extent = torch.tensor(size, device=valid.device), upper - lower
    share = torch.from_numpy(random.uniform("crop_scale", low, high)).to(valid.device)
    room = torch.where(extent > 0, extent / (edges - 1).clamp(min=1), math.inf).amin(1)
    zoom = share * torch.where(room < math.inf, room, 1)
    config = replace(config, inside=True)
    drawn = draw_transform(valid, spacing, random, config, size, zoom, place)
    straight = draw_transform(valid, spacing, random, replace(config, rotation=0, elastic=0), size, zoom, place)
    fits = (half_extent(drawn.matrix, drawn.displacement, size) <= extent / 2 + _ROUNDING).all(1)
    displacement = None if drawn.displacement is None else drawn.displacement * columns(fits[:, None], len(size))
    return replace(
        drawn,
        matrix=torch.where(fits[:, None, None], drawn.matrix, straight.matrix),
        centre=torch.where(fits[:, None], drawn.centre, straight.centre),
        displacement=displacement,
    )
