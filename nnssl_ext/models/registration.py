"""Heads that tell, from the features of two images, the deformation that lays one upon the other.

First an affine map, then the flow of a velocity (VoxelMorph: Balakrishnan et al. 2019, arXiv:1809.05231; Dalca et al.
2018, arXiv:1805.04605). The features are made of each image by itself, so what makes them serves other tasks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl_ext.models.fields import affine_field, columns_of, fit_affine, flow, joined, resized, warp

LAST_STD = 1e-5
"""Spread of the last layers at the start, so that it is nearly the identity. Balakrishnan et al. 2019."""
REACH = 0.5
"""Longest displacement that the affine map is made of, in half extents of the image along each axis. Without a limit a
map that has left the image never comes back: nothing out there tells it where to go."""
SLOPE = 0.2
"""Of the activations below 0, VoxelMorph's."""
_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Deformation:
    """A deformation, all of it in float32."""

    affine: Tensor
    """Coefficients (B, D + 1, D), see `fields.affine_field`."""
    velocity: Tensor
    """(B, D, *half the size), in voxels of that grid."""
    field: Tensor
    """Both together, (B, D, *size), see `fields`: the flow leads from the fixed image to a place, the affine map from
    there into the moving one."""


class RegistrationHead(nn.Module):
    """From the features of both images to a deformation, affine first.

    The affine map is the one nearest to displacements that are told at a quarter of the features' positions along each
    axis. The velocity is told at half the size, of the fixed image's features and those of the moving one under the
    affine map.

    Args:
        dims: 2 or 3.
        width: Of the features.
        hidden_width: Of the hidden layers.
    """

    def __init__(self, dims: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.votes = _layers(dims, 2 * width, hidden_width, stride=2)
        self.velocity = _layers(dims, 2 * width, hidden_width, stride=1)

    def forward(self, moving: Tensor, fixed: Tensor, real: Tensor) -> Deformation:
        """The deformation between two images.

        Args:
            moving: (B, width, *size), features of the image to be deformed.
            fixed: (B, width, *size), of the other one.
            real: (B, 1, *size), bool: False where either is padding; such places have no say in the affine map.
        """
        size = fixed.shape[2:]
        half = [-(-edge // 2) for edge in size]
        source, goal = (functional.interpolate(each.float(), size=half, mode="area") for each in (moving, fixed))
        votes = self.votes(torch.cat([source, goal], dim=1)).float().tanh()
        votes = votes * columns_of([REACH * edge / 2 for edge in votes.shape[2:]], votes)
        weight = functional.interpolate(real.float(), size=list(votes.shape[2:]), mode="area")
        with torch.autocast(fixed.device.type, enabled=False):
            affine = fit_affine(votes, weight)
            source = warp(source, affine_field(affine, half))
        velocity = self.velocity(torch.cat([source, goal], dim=1)).float()
        with torch.autocast(fixed.device.type, enabled=False):
            field = joined(resized(flow(velocity), size), affine_field(affine, size))
        return Deformation(affine, velocity, field)


def _layers(dims: int, width: int, hidden_width: int, stride: int) -> nn.Sequential:
    convolution = _CONVOLUTIONS[dims]
    last = convolution(hidden_width, dims, 3, padding=1)
    nn.init.normal_(last.weight, std=LAST_STD)
    nn.init.zeros_(last.bias)
    layers: list[nn.Module] = []
    for inputs in (width, hidden_width):
        layers += [convolution(inputs, hidden_width, 3, stride, padding=1), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, last)
