"""How well a deformed image fits another one, how smooth a field is, and how far it is from the true one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_SHARED = 0.5
"""Share of the voxels asked for that must be shown by both images; what is missing from that counts as unlike."""
FLAT = 1e-5
"""Product of variances below which two windows are flat, and so unlike."""


def local_ncc(first: Tensor, second: Tensor, real: Tensor, window: int) -> Tensor:
    """Correlation of two images in a window around every voxel, from -1 to 1: (B, C, *size), float32.

    It does not see brightness and contrast. The windows hold real voxels alone. Balakrishnan et al. 2019
    (arXiv:1809.05231) take its square, which takes inverted images for alike.

    Args:
        first: (B, C, *size).
        second: (B, C, *size).
        real: (B, 1, *size), bool: voxels that both show. The result is 0 elsewhere.
        window: Voxels of the window along each axis, odd.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (torch.where(real, image.float(), 0.0) for image in (first, second))
        count = _box_mean(real.float(), window).clamp(min=torch.finfo(torch.float32).eps)
        products = [first, second, first * first, second * second, first * second]
        means = [_box_mean(values, window) / count for values in products]
        spread, other = (means[2] - means[0].square()).clamp(min=0), (means[3] - means[1].square()).clamp(min=0)
        return torch.where(real, (means[4] - means[0] * means[1]) / (spread * other + FLAT).sqrt(), 0.0)


def _box_mean(values: Tensor, window: int) -> Tensor:
    """Mean over a box around every position, zeros beyond the border; one axis after the other."""
    pool = functional.avg_pool3d if values.ndim == 5 else functional.avg_pool2d
    dims, reach = values.ndim - 2, window // 2
    values = functional.pad(values, [reach, reach] * dims)
    for axis in range(dims):
        values = pool(values, [window if axis == other else 1 for other in range(dims)], 1)
    return values


def mean_ncc(first: Tensor, second: Tensor, real: Tensor, asked: Tensor, window: int) -> Tensor:
    """The mean of `local_ncc` over the voxels asked for that both images show, and then over samples that have any.

    A deformation gains nothing by moving tissue out of sight: beyond `LEAST_SHARED` of what is asked for, what is not
    shown counts as 0.

    Args:
        first: As in `local_ncc`.
        second: As there.
        real: As there.
        asked: (B, 1, *size), bool: voxels of the second image, none of them padding.
        window: As there.
    """
    counted = (asked & real).flatten(1)
    values = local_ncc(first, second, real, window).mean(1).flatten(1)
    wanted = asked.flatten(1).sum(1)
    number = torch.maximum(counted.sum(1), LEAST_SHARED * wanted).clamp(min=1)
    return ((values * counted).sum(1) / number).sum() / (wanted > 0).sum().clamp(min=1)


def squared_gradients(field: Tensor, spacing: Tensor, real: Tensor) -> Tensor:
    """Mean of the squared gradients of all components of a field along all axes, both in mm: a scalar without unit.

    Args:
        field: (B, D, *size), in voxels.
        spacing: (B, D), of the field's voxels in mm.
        real: (B, 1, *size), bool: places that count; a difference counts where both ends do.
    """
    edges = spacing.view(*spacing.shape, *[1] * (field.ndim - 2))
    in_mm = field * edges
    means = []
    for axis in range(2, field.ndim):
        if field.shape[axis] > 1:
            near, far = (real.narrow(axis, start, field.shape[axis] - 1) for start in (0, 1))
            steps = in_mm.diff(dim=axis) / edges[:, axis - 2 : axis - 1]
            squares = torch.where(near & far, steps.square(), 0.0).mean(1).flatten(1)
            means.append(squares.sum(1) / (near & far).flatten(1).sum(1).clamp(min=1))
    return torch.stack(means).mean()


def endpoint_error(field: Tensor, truth: Tensor, spacing: Tensor, known: Tensor) -> Tensor:
    """Mean distance in mm between where a field leads and where it should, over places and then over samples.

    Args:
        field: (B, D, *size), in voxels.
        truth: (B, D, *size).
        spacing: (B, D), in mm.
        known: (B, 1, *size), bool: places whose truth is known.
    """
    edges = spacing.view(*spacing.shape, *[1] * (field.ndim - 2))
    distance = torch.where(known[:, 0], torch.linalg.vector_norm((field - truth) * edges, dim=1), 0.0)
    number = known.flatten(1).sum(1)
    return (distance.flatten(1).sum(1) / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)
