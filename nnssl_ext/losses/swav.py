"""Swapped prediction of balanced assignments (Caron et al. 2020, SwAV, arXiv:2006.09882, equation 2)."""

from __future__ import annotations

import math

import torch


def swapped_prediction(
    scores: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy of what one view predicts against what the other is assigned, both ways.

    Summed over prototypes, averaged over a sample's tokens, then over the samples that have any, and over both ways.

    Args:
        scores: (2, B, P, K), cosines of both views' tokens with the prototypes.
        targets: (2, B, P, K), assignments of the same tokens, rows that sum to 1.
        counted: (B, P), bool; False on tokens that are not there.
        temperature: Divides the cosines, above 0.

    Returns:
        A scalar in float32, in nats; 0 where nothing is counted.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_predicted = (scores.float() / temperature).log_softmax(-1)
        entropy = -(targets.flip(0) * log_predicted).sum(-1).mean(0)
        return (entropy * token_weight(counted)).sum()


def token_weight(counted: torch.Tensor) -> torch.Tensor:
    """Each token's share in a mean over every sample's tokens and then over the samples that have any: (B, P)."""
    per_sample = counted.sum(1, keepdim=True).clamp(min=1)
    return counted.float() / per_sample / counted.any(1).sum().clamp(min=1)


@torch.no_grad()
def assignment_metrics(
    scores: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """What tells a useful clustering from a collapsed one.

    Args:
        scores: (2, B, P, K).
        targets: (2, B, P, K).
        counted: (B, P), bool.
        temperature: Of the predictions.

    Returns:
        `swap`, the loss, beside the entropy of the mean assignment, which knowing the sizes of the clusters alone
        reaches; `agreement`, how often the cluster that one view predicts is the one that the other is assigned, beside
        that of predictions of the same frequencies that do not look; `assignment_entropy`, as a share of ln K;
        `clusters_in_use`, the exponential of the entropy of their sizes; and `largest_cluster`, a share of the tokens.
    """
    weight, num = token_weight(counted).expand(len(scores), -1, -1) / len(scores), scores.shape[-1]
    assigned, predicted = targets.argmax(-1), scores.flip(0).argmax(-1)
    sizes, guesses = (
        weight.new_zeros(num).scatter_add_(0, each.flatten(), weight.flatten()) for each in (assigned, predicted)
    )
    mean = (targets * weight[..., None]).flatten(0, 2).sum(0)
    return {
        "swap": swapped_prediction(scores, targets, counted, temperature),
        "swap_chance": torch.special.entr(mean).sum(),
        "agreement": ((assigned == predicted) * weight).sum(),
        "agreement_chance": (sizes * guesses).sum(),
        "assignment_entropy": (torch.special.entr(targets).sum(-1) * weight).sum() / math.log(num),
        "clusters_in_use": torch.special.entr(sizes).sum().exp(),
        "largest_cluster": sizes.max(),
    }
