"""Similarities between tokens kept as an anchor has them (Siméoni et al. 2025, DINOv3, arXiv:2508.10104)."""

from __future__ import annotations

import torch
from torch.nn import functional


def gram_loss(student: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between the cosine similarities of all pairs of a sample's tokens.

    Args:
        student: Tokens (B, N, D).
        anchor: Tokens (B, N, E) of the same places in an earlier network; the widths may differ.

    Returns:
        A scalar in float32, in [0, 4].
    """
    ours, theirs = (functional.normalize(tokens.float(), dim=-1) for tokens in (student, anchor.detach()))
    with torch.autocast(student.device.type, enabled=False):
        return (ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)).square().mean()
