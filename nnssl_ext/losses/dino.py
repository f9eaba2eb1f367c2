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
    with torch.autocast(student.device.type, enabled=False):
        pairs = -torch.einsum("tbk,sbk->tsb", teacher.float(), log_student).mean(2)
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(~others, 0).sum() / others.sum()


@torch.no_grad()
def known_case(
    student: torch.Tensor, teacher: torch.Tensor, case: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often a target is predicted best by a view of its own sample, and how often by chance.

    A student that has collapsed predicts the same for all and is at chance, whatever its loss.

    Args:
        student: Logits (S, B, K).
        teacher: Probabilities (T, B, K) of the first T of these views.
        case: (B,); other samples of the same case are no candidates.
        temperature: The student's, above 0.

    Returns:
        Two scalars in [0, 1], over all pairs of a teacher's view and another view of the student's. Ties are lost.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    with torch.autocast(student.device.type, enabled=False):
        fit = torch.einsum("tbk,sck->tsbc", teacher.float(), log_student)
    own = fit.diagonal(dim1=2, dim2=3)
    same = case[:, None] == case
    best = fit.masked_fill(same, -torch.inf).amax(3)
    pairs = ~torch.eye(*fit.shape[:2], dtype=torch.bool, device=fit.device)
    hits = (own > best).float().mean(2)
    chance = 1 / (1 + (~same).sum(1).float())
    return (hits * pairs).sum() / pairs.sum(), chance.mean()
