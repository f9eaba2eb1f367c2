"""Cross-entropy between a teacher's and a student's views (Caron et al. 2021, arXiv:2104.14294, equation 3)."""

from __future__ import annotations

import torch


def dino_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and another view of the student's.

    Args:
        student: Logits (S, B, K) of the student's views; its first T views are those that the teacher sees too.
        teacher: Probabilities (T, B, K) of the teacher's views, T below S or at least 2.
        temperature: The student's, above 0.

    Returns:
        A scalar in float32, in nats.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    pairs = -torch.einsum("tbk,sbk->tsb", teacher.float(), log_student).mean(2)
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(~others, 0).sum() / others.sum()
