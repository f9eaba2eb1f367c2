"""Displacement fields of a batch: images seen through them, fields joined, the flow of a velocity, affine maps.

A field is (B, D, *size) for 2 or 3 dimensions, in voxels along the axes in their order: a place x of the fixed image
shows what is at x + field(x) of the moving one. Grids of another number of positions span the same extent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LINEAR = {2: "bilinear", 3: "trilinear"}
SQUARINGS = 7
"""Of a velocity, which is divided by 2 to that power first. Dalca et al. 2018 (arXiv:1805.04605)."""
RIDGE = 1e-3
"""Weight of the squared coefficients of an affine map beside the mean squared distance from it: without positions
enough to tell them they are 0."""


def columns_of(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per axis, to meet a field: (D, 1, ...)."""
    return like.new_tensor(list(values)).view(-1, *[1] * (like.ndim - 2))


def warp(values: Tensor, field: Tensor, outside: Literal["border", "zeros"] = "border") -> Tensor:
    """Values (B, C, *size) at x + field(x), interpolated linearly: (B, C, *size of the field).

    Args:
        values: Of the moving image.
        field: As they are told above.
        outside: Whether the border goes on beyond the image, or there are zeros.
    """
    axes = [torch.arange(size, device=field.device, dtype=field.dtype) for size in field.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + field
    grid = ((2 * places + 1) / columns_of(values.shape[2:], field) - 1).flip(1).movedim(1, -1)
    return functional.grid_sample(values, grid, padding_mode=outside, align_corners=False)


def resized(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field on another number of positions over the same extent, its vectors counted in those."""
    if tuple(field.shape[2:]) == tuple(shape):
        return field.clone()
    factors = [new / old for new, old in zip(shape, field.shape[2:], strict=True)]
    wide = functional.interpolate(field, size=list(shape), mode=LINEAR[len(factors)], align_corners=False)
    return wide * columns_of(factors, wide)


def joined(first: Tensor, then: Tensor) -> Tensor:
    """The field that goes where `first` leads, and from there where `then` does."""
    return first + warp(then, first)


def flow(velocity: Tensor) -> Tensor:
    """Where a velocity (B, D, *size), the same at all times, has carried each place after a time of 1.

    Scaling and squaring (Arsigny et al. 2006): a small step is joined with itself, again and again. What is made so can
    be undone by the flow of the opposite velocity, and does not fold while the velocity is smooth.
    """
    field = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        field = joined(field, field)
    return field


def determinants(field: Tensor) -> Tensor:
    """How many times its volume each voxel takes in the moving image, (B, 1, *size); 0 or less where it is folded.

    By central differences, at the border one-sided ones. An axis of a single position is not deformed.
    """
    dims = field.ndim - 2
    slopes = [
        torch.gradient(field, dim=axis + 2)[0] if field.shape[axis + 2] > 1 else torch.zeros_like(field)
        for axis in range(dims)
    ]
    jacobian = torch.stack(slopes, dim=2).movedim((1, 2), (-2, -1))
    return torch.linalg.det(jacobian + torch.eye(dims, device=field.device)).unsqueeze(1)


def positions(size: Sequence[int], like: Tensor) -> Tensor:
    """Where the positions of a grid lie in its extent, from -1 to 1 along each axis: (D, *size)."""
    axes = [(2 * torch.arange(edge, device=like.device, dtype=like.dtype) + 1) / edge - 1 for edge in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def affine_field(coefficients: Tensor, size: Sequence[int]) -> Tensor:
    """The field of affine maps on a grid, (B, D, *size), in its voxels.

    Args:
        coefficients: (B, D + 1, D), in half extents of the image: how much the displacement along each axis (columns)
            grows along each axis (the first D rows), and what it is at the middle (the last row). 0 is the identity.
        size: Positions of the grid.
    """
    places = positions(size, coefficients)
    linear, shift = coefficients[:, :-1], coefficients[:, -1]
    moved = (linear.transpose(1, 2) @ places.flatten(1)).unflatten(2, tuple(size))
    moved = moved + shift.view(*shift.shape, *[1] * len(size))
    return moved * columns_of([edge / 2 for edge in size], moved)


def fit_affine(field: Tensor, weight: Tensor) -> Tensor:
    """The affine map nearest to a field, by least squares: coefficients (B, D + 1, D), as of `affine_field`.

    Args:
        field: (B, D, *size), in voxels of its grid.
        weight: (B, 1, *size), 0 or more: how much each place counts. Where none does the map is the identity.
    """
    size, share = field.shape[2:], weight.flatten(2)
    share = share / share.sum(2, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    places = positions(size, field).flatten(1)
    design = torch.cat([places, torch.ones_like(places[:1])])
    goal = (field / columns_of([edge / 2 for edge in size], field)).flatten(2)
    weighted = design * share
    normal = weighted @ design.T + RIDGE * torch.eye(len(design), device=field.device)
    return torch.linalg.solve_ex(normal, weighted @ goal.transpose(1, 2)).result
