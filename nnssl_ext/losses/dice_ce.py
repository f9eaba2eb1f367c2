"""Dice and cross-entropy of a segmentation whose classes all count alike, the first one too."""

from __future__ import annotations

import torch
from torch.nn import functional

SMOOTH = 1e-5
"""Added to numerator and denominator of the Dice coefficient, nnU-Net's."""


def dice_ce(logits: torch.Tensor, classes: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft Dice loss and cross-entropy over the real voxels.

    Both are means over samples of what each sample gives, so the mean over ranks with equal batches is that of the
    whole. Dice is averaged over the classes that a sample holds: of one that it does not hold no overlap can be
    improved, and what is wrongly given to it is missing elsewhere.

    Args:
        logits: (B, K, *patch).
        classes: (B, 1, *patch), int64, in [0, K).
        valid: (B, 1, *patch), bool, False on padding.

    Returns:
        `1 - Dice`, in [0, 1], and the cross-entropy in nats, 0 or more: scalars in fp32.
    """
    logs = functional.log_softmax(logits.float(), dim=1)
    real = valid.flatten(1)
    count = real.sum(1).clamp(min=1)
    entropy = -logs.gather(1, classes).flatten(1)
    ce = torch.where(real, entropy, 0.0).sum(1) / count
    given = torch.where(valid, logs.exp(), 0.0).flatten(2)
    true = functional.one_hot(classes.flatten(1), logits.shape[1]).transpose(1, 2) * real.unsqueeze(1)
    overlap, sizes = (given * true).sum(2), given.sum(2) + true.sum(2)
    dice = (2 * overlap + SMOOTH) / (sizes + SMOOTH)
    held = true.any(2)
    missing = torch.where(held, 1 - dice, 0.0).sum(1) / held.sum(1).clamp(min=1)
    return missing.mean(), ce.mean()
