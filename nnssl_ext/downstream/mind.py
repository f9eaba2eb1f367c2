"""MIND-SSC: what the surroundings of a voxel look like, whatever the contrast; features without any training.

Twelve patches' differences around a voxel, between neighbours along different axes, become values in (0, 1]. Heinrich
et al. 2013, "Towards realtime multimodal fusion for image-guided interventions using self-similarities", MICCAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch.nn import functional

RADIUS = 1
"""Of the patches and of every other box, in voxels."""
DISTANCE = 2
"""From the voxel to the patches around it, in voxels."""
VARIANCE_RANGE = (1e-3, 1e3)
"""The local noise lies within these multiples of its mean over the image."""


def mind_ssc(image: torch.Tensor) -> torch.Tensor:
    """The self-similarity context of every voxel.

    Args:
        image: (Z, Y, X); an axis of one voxel is left out, which makes it 2D.

    Returns:
        (12, Z, Y, X), or 4 channels in 2D, float32.
    """
    axes = [axis for axis, size in enumerate(image.shape) if size > 1]
    neighbours = list(product(axes, (-DISTANCE, DISTANCE)))
    pairs = [pair for pair in combinations(neighbours, 2) if pair[0][0] != pair[1][0]]
    differences = torch.stack([(_shifted(image, *a) - _shifted(image, *b)) ** 2 for a, b in pairs])
    differences = box_mean(differences)
    differences = differences - differences.amin(0)
    noise = differences.mean(0)
    low, high = (noise.mean() * factor for factor in VARIANCE_RANGE)
    noise = noise.clamp(min=low, max=high).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.exp(-differences / noise)


def _shifted(image: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """What lies `by` voxels further along an axis; the border goes on."""
    places = (torch.arange(image.shape[axis], device=image.device) + by).clamp(0, image.shape[axis] - 1)
    return image.index_select(axis, places)


def box_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over a box around every position, the border going on; (C, Z, Y, X). Axes of one position are left."""
    sides = [RADIUS if size > 1 else 0 for size in values.shape[1:]]
    return functional.avg_pool3d(continued(values, sides), [2 * side + 1 for side in sides], stride=1)


def continued(values: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Values (C, Z, Y, X) with so many copies of the border on both sides of each axis."""
    return functional.pad(values, [side for edge in reversed(sides) for side in (edge, edge)], mode="replicate")
