"""A cube turned by quarter turns about its axes, exactly: nothing is interpolated after the turn, nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import torch
from torch import Tensor

from nnssl_ext.views.transform import SpatialTransform, SpatialView, apply_transform
from nnssl_ext.views.turns import NUM_TURNS, are_square, between_real, square_planes

Rotation = tuple[int, tuple[int, int]]
"""So many quarter turns, as `torch.rot90` turns, in the plane of two axes."""
MIN_POSITIONS = 2
"""Positions per axis that the deepest feature map has at least: of a single one, instance normalisation leaves 0."""


def rotations(spacing: Sequence[float], max_anisotropy: float) -> tuple[Rotation, ...]:
    """The identity, then 90, 180 and 270 degrees in every plane whose voxels are square: 10 in 3D, 4 in 2D.

    Args:
        spacing: In mm per axis.
        max_anisotropy: As in `square_planes`, and raises as that does.
    """
    planes = square_planes(spacing, max_anisotropy)
    return ((0, planes[0]), *((turn, plane) for plane in planes for turn in range(1, NUM_TURNS)))


def fair_rotations(spacing: Tensor, choices: Sequence[Rotation], max_anisotropy: float) -> Tensor:
    """Which rotations no stretch of a case's own voxels tells, the identity always among them.

    Args:
        spacing: (B, D), in mm.
        choices: n rotations.
        max_anisotropy: As in `square_planes`.

    Returns:
        (B, n), bool.
    """
    unturned = torch.tensor([turn == 0 for turn, _ in choices], device=spacing.device)
    return are_square(spacing, [plane for _, plane in choices], max_anisotropy) | unturned


def cube_size(patch_size: Sequence[int], stride: Sequence[int], choices: Sequence[Rotation]) -> tuple[int, ...]:
    """The largest window in a patch that is the same after every rotation, and whole strides of the network.

    Args:
        patch_size: Voxels per axis.
        stride: Voxels per position of the deepest feature map, per axis.
        choices: The rotations.

    Raises:
        ValueError: If the deepest feature map would have a single position along an axis.
    """
    turning = sorted({axis for _, plane in choices for axis in plane})
    whole = lcm(*(stride[axis] for axis in turning))
    edge = min(patch_size[axis] for axis in turning) // whole * whole
    if edge < MIN_POSITIONS * whole:
        raise ValueError(
            f"patch_size {tuple(patch_size)} holds no cube of {MIN_POSITIONS * whole} voxels, which the network's "
            f"strides {tuple(stride)} need. Plan a larger patch: nnssl_plan_experiment -d DATASET"
        )
    return tuple(edge if axis in turning else patch_size[axis] for axis in range(len(patch_size)))


def inner_view(data: Tensor, valid: Tensor, size: Sequence[int]) -> SpatialView:
    """A window in the middle of the real voxels, shrunk along all axes alike until it lies between them.

    Voxels are met at the same fractions along all axes of the same edge, so that interpolation blurs them alike. The
    window is never shrunk below a quarter of its edges: of a volume that is thinner, it shows padding.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        size: Voxels of the view per axis.
    """
    half = torch.tensor([(edge - 1) / 2 for edge in size], device=valid.device)
    centre, zoom = between_real(valid, half, half % 1)
    matrix = torch.eye(len(size), device=valid.device) * zoom
    return apply_transform(data, valid, SpatialTransform(tuple(size), matrix, centre))


def rotated(images: Tensor, choices: Sequence[Rotation]) -> Tensor:
    """Each image (B, C, *size) turned as its choice says, voxel by voxel."""
    turned = [
        torch.rot90(image, turn, [axis + 1 for axis in plane])
        for image, (turn, plane) in zip(images, choices, strict=True)
    ]
    return torch.stack(turned)
