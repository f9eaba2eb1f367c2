"""Volume contrast (Wu et al. 2024, arXiv:2402.17300): similarities of crops to bases should be shares of overlap."""

from __future__ import annotations

import torch
from torch.nn import functional

_LEAST = 1e-6
"""Least argument of the logarithm: a crop that should be all like a base and is not like it at all."""


def voco_loss(
    crops: torch.Tensor, bases: torch.Tensor, fixed_bases: torch.Tensor, overlap: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pulls crops to the bases that they overlap as far as they do, pushes them from others, and bases apart.

    Three terms of equal weight, each a mean over samples, with l the cosine of crop and base where it is above 0 and y
    their overlap: -y log(1 - |y - l|), summed over the pairs that overlap, over the sum of y; the mean of l² over the
    pairs that do not; the mean of that of two different bases.

    Args:
        crops: (B, m, D).
        bases: (B, n, D), n above 1.
        fixed_bases: (B, n, D), what crops are compared with; no gradient reaches them.
        overlap: (B, m, n), share of each crop that lies in each base, in [0, 1].

    Returns:
        The loss, 0 or more, and the cosines of crops and fixed bases (B, m, n), both in float32.
    """
    with torch.autocast(crops.device.type, enabled=False):
        crops, bases, fixed = (
            functional.normalize(rows.float(), dim=2) for rows in (crops, bases, fixed_bases.detach())
        )
        cosines = crops @ fixed.transpose(1, 2)
        among = bases @ bases.transpose(1, 2)
    like = cosines.relu()
    near = (1 - (overlap - like).abs()).clamp(min=_LEAST)
    pull = -(overlap * near.log()).sum((1, 2)) / overlap.sum((1, 2)).clamp(min=_LEAST)
    apart = overlap == 0
    push = (like.square() * apart).sum((1, 2)) / apart.sum((1, 2)).clamp(min=1)
    num = among.shape[1]
    spread = among.relu().square().masked_fill(torch.eye(num, dtype=torch.bool, device=among.device), 0)
    return (pull + push + spread.sum((1, 2)) / (num * (num - 1))).mean(), cosines
