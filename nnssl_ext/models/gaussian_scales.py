"""Features without a network: an image under Gaussians of several widths, and how steep it is under each."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

SIGMAS = (0.0, 1.0, 2.0, 4.0)
"""Standard deviations of the Gaussians in voxels; 0 is the image as it is."""
REACH = 3.0
"""Standard deviations up to which a Gaussian is summed."""
_TINY = 1e-6
"""Least mass of a Gaussian, whose own centre weighs far more: only padding has less."""


class GaussianScales(nn.Module):
    """The image under every Gaussian, then the length of its gradient under each.

    What is not real has no part: a Gaussian is summed over the real voxels it reaches, and a slope is taken between
    real neighbours, to one side where there is one, 0 where there is none. So padding, altered voxels and the border of
    the image are all treated alike.

    Attributes:
        channels: Features of its one map.
        strides: Of that map, 1 along every axis.

    Args:
        dims: Spatial dimensions.
        channels: Of the image.
    """

    reach = round(REACH * max(SIGMAS)) + 1
    """Voxels beyond which nothing has an influence."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.channels = (2 * len(SIGMAS) * channels,)
        self.strides = ((1,) * dims,)

    def forward(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Features of every voxel.

        Args:
            image: (B, C, *size).
            valid: (B, 1, *size), bool.

        Returns:
            (B, 8 * C, *size), float32; 0 where not valid.
        """
        image = torch.where(valid, image.float(), 0)
        smooth = [blurred(image, valid, sigma) for sigma in SIGMAS]
        return torch.cat([*smooth, *(steepness(each, valid) for each in smooth)], 1)


def blurred(image: torch.Tensor, valid: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images (B, C, *size) under a Gaussian, over the voxels that are real: 0 on the others.

    Args:
        image: (B, C, *size), 0 where not valid.
        valid: (B, 1, *size), bool.
        sigma: In voxels, 0 or more.
    """
    if sigma == 0:
        return image
    both = torch.cat([image, valid.to(image)], 1)
    for axis in range(2, image.ndim):
        weights = _weights(image.shape[axis], sigma, image)
        both = torch.matmul(both.movedim(axis, -1), weights.T).movedim(-1, axis)
    total, mass = both[:, :-1], both[:, -1:]
    return torch.where(valid, total / mass.clamp(min=_TINY), 0)


def _weights(size: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """A Gaussian around each of so many voxels: (size, size), rows that sum to 1."""
    voxel = torch.arange(size, device=like.device)
    distance = (voxel - voxel[:, None]).to(like)
    weights = torch.exp(-((distance / sigma) ** 2) / 2).where(distance.abs() <= round(REACH * sigma), 0)
    return weights / weights.sum(1, keepdim=True)


def steepness(image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Length of the gradient of images (B, C, *size), per voxel, by differences of real neighbours."""
    squares = torch.zeros_like(image)
    for axis in range(2, image.ndim):
        ahead, behind = (_moved(image, axis, step) for step in (-1, 1))
        real_ahead, real_behind = (valid & _moved(valid, axis, step) for step in (-1, 1))
        rise = torch.where(real_ahead, ahead, image) - torch.where(real_behind, behind, image)
        squares += (rise / (real_ahead.to(image) + real_behind.to(image)).clamp(min=1)).square()
    return squares.sqrt()


def _moved(tensor: torch.Tensor, axis: int, step: int) -> torch.Tensor:
    """Moved along an axis by one voxel, ahead or back; 0 (False) comes in at the end."""
    length = tensor.shape[axis] - 1
    if step > 0:
        kept, pad = tensor.narrow(axis, 0, length), (1, 0)
    else:
        kept, pad = tensor.narrow(axis, 1, length), (0, 1)
    return functional.pad(kept, [0, 0] * (tensor.ndim - 1 - axis) + list(pad))
