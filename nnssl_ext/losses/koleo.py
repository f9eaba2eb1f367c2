"""Spread of features by the distance to the nearest one (Sablayrolles et al. 2019, KoLeo, arXiv:1806.03198)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

EPSILON = 1e-6
"""Added to a distance, which may be 0."""


def koleo(features: torch.Tensor, others: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """Mean of -log of the distance to the nearest other feature, on the unit sphere.

    The others are constants, be they of this batch, of other ranks or of a queue: so the loss of two ranks is that of
    one, and each feature is pushed by its own term alone.

    Args:
        features: (N, D).
        others: (M, D).
        excluded: (N, M), bool; True where the other must not repel, such as the feature itself and views of its case.

    Returns:
        A scalar in float32, at least -log(2 + `EPSILON`); 0 where no feature has another one.
    """
    if not others.shape[0]:
        return features.float().sum() * 0
    unit = functional.normalize(features.float(), dim=-1)
    around = functional.normalize(others.detach().float(), dim=-1)
    with torch.autocast(features.device.type, enabled=False):
        similarity = (unit.detach() @ around.T).masked_fill(excluded, -math.inf)
    best, nearest = similarity.max(1)
    found = best > -math.inf
    distance = ((unit - around[nearest]).square().sum(-1) + EPSILON**2).sqrt()  # the root of 0 has no finite slope
    return -((distance + EPSILON).log() * found).sum() / found.sum().clamp(min=1)
