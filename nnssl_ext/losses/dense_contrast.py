"""InfoNCE between positions of two views that show the same place (van den Oord et al. 2018, arXiv:1807.03748)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def dense_contrast(
    first: torch.Tensor, second: torch.Tensor, near: torch.Tensor, counted: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each position of either view has to find the same place in the other one, among all of the same sample.

    Args:
        first: (B, P, D), features of one view at P places.
        second: (B, P, D), of the other view at the same places.
        near: (B, P, P), bool, symmetric: places too near to one another to be told apart, no negatives of each other.
        counted: (B, P), bool: places that are there.
        temperature: Divides the cosines, above 0.

    Returns:
        The loss, the mean of both directions over the places of a sample and then over the samples that have any; and
        `contrast_chance`, the mean logarithm of the number of candidates, `accuracy`, how often the place is found, and
        `accuracy_chance`, averaged alike. All are 0 where nothing is counted.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (functional.normalize(rows.float(), dim=2) for rows in (first, second))
        logits = (first / temperature) @ second.transpose(1, 2)
    place = torch.arange(logits.shape[1], device=logits.device)
    left_out = (near | ~counted[:, None]) & (place != place[:, None])
    weight = counted / counted.sum(1, keepdim=True).clamp(min=1) / counted.any(1).sum().clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * weight).sum()

    truth = logits.diagonal(dim1=1, dim2=2)
    losses, hits = [], []
    for axis, others in ((2, left_out), (1, left_out.transpose(1, 2))):
        candidates = logits.masked_fill(others, -math.inf)
        losses.append(mean(candidates.logsumexp(axis) - truth))
        hits.append(mean((candidates.argmax(axis) == place).float()))
    number = (~left_out).sum(2).float()
    metrics = {
        "contrast_chance": mean(number.log()),
        "accuracy": torch.stack(hits).mean(),
        "accuracy_chance": mean(1 / number),
    }
    return torch.stack(losses).mean(), metrics
