"""The triplet loss on the sphere (Schroff et al. 2015, arXiv:1503.03832)."""

from __future__ import annotations

import torch
from torch.nn import functional


def triplet_loss(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    compared: torch.Tensor,
    margin: float,
    swapped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An anchor should be nearer to its positive than to others, by a margin.

    Distances are squared, between rows of length 1 in float32, so they lie in [0, 4] whatever the width is. Where all
    rows are the same the loss is the margin.

    Args:
        anchors: (B, D).
        positives: (B, D); row j is a negative of anchor i where they are compared.
        compared: (B, B), bool.
        margin: Above 0.
        swapped: (B,), bool: anchors for which negatives should be the nearer ones. None: none.

    Returns:
        The loss, a mean over the anchors that have a negative, of the mean over these; and the share of the triplets in
        which the positive is nearer, ties counted half. Both are 0 where there is no triplet.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        first, second = (functional.normalize(rows.float(), dim=1) for rows in (anchors, positives))
        distances = 2 - 2 * first @ second.T
    ahead = distances.diagonal()[:, None] - distances
    signed = ahead if swapped is None else torch.where(swapped[:, None], -ahead, ahead)
    each = ((signed + margin).relu() * compared).sum(1) / compared.sum(1).clamp(min=1)
    hits = ((ahead < 0).float() + (ahead == 0).float() / 2) * compared
    return each.sum() / compared.any(1).sum().clamp(min=1), hits.sum() / compared.sum().clamp(min=1)
