"""Self-distillation of hidden tokens (Zhou et al. 2022, iBOT, arXiv:2111.07832)."""

from __future__ import annotations

import torch


def ibot_loss(student: torch.Tensor, teacher: torch.Tensor, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy at hidden tokens: the mean over each sample's tokens, then over the samples that have any.

    Args:
        student: Logits (B, M, K) of the view with hidden tokens.
        teacher: Probabilities (B, M, K) at the same places of the view with nothing hidden.
        hidden: (B, M), bool; False on places that do not count.
        temperature: The student's, above 0.

    Returns:
        A scalar in float32, in nats; 0 where nothing is hidden.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    entropy = -(teacher.float() * log_student).sum(-1).masked_fill(~hidden, 0)
    count = hidden.sum(1)
    return (entropy.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
