"""Cross-entropy of voxels' clusters, rare clusters weighing more, and what tells a useful prediction from a guess."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def cluster_weights(shares: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """`1 / (K * share)` of each cluster, within limits: all weigh alike together, and the mean weight is about 1.

    Args:
        shares: (K,), of the clusters in the data.
        limits: Least and greatest weight.

    Returns:
        (K,), float32.
    """
    return (1 / (len(shares) * shares.float())).clamp(*limits)


def cluster_cross_entropy(
    logits: torch.Tensor, classes: torch.Tensor, asked: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted cross-entropy: a mean over each sample's voxels, then over the samples that have any.

    Args:
        logits: (B, K, *patch).
        classes: (B, 1, *patch), int64, in [0, K).
        asked: (B, 1, *patch), bool: the voxels that count.
        weights: (K,), of the classes.

    Returns:
        A scalar in float32, in nats; 0 where nothing is asked for.
    """
    with torch.autocast(logits.device.type, enabled=False):
        entropy = functional.cross_entropy(logits.float(), classes[:, 0], reduction="none")[:, None]
        return (entropy * weights[classes] * voxel_weight(asked)).sum()


def voxel_weight(asked: torch.Tensor) -> torch.Tensor:
    """Each voxel's share in a mean over a sample's voxels, then over the samples that have any: as `asked`, float32."""
    count = asked.flatten(1).sum(1).view(-1, *[1] * (asked.ndim - 1))
    return asked.float() / count.clamp(min=1) / (count > 0).sum().clamp(min=1)


@torch.no_grad()
def cluster_metrics(
    logits: torch.Tensor,
    classes: torch.Tensor,
    asked: torch.Tensor,
    weights: torch.Tensor,
    shares: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """How well clusters are predicted, and how they are used.

    Args:
        logits: (B, K, *patch).
        classes: (B, 1, *patch), int64, the true clusters.
        asked: (B, 1, *patch), bool.
        weights: (K,), of the loss.
        shares: (K,), of the clusters where they were fitted.

    Returns:
        `cross_entropy`, the loss, beside that of the best prediction that does not look, which knows how often each
        cluster occurs in this batch; `accuracy`, a mean over the clusters that occur, beside that of telling them
        without regard to the image; `assignment_entropy`, that of predictions, as a share of ln K; `clusters_in_use`
        and `clusters_predicted`, the exponential of the entropy of their sizes; `largest_cluster`, a share of the
        voxels; `cluster_drift`, the share of voxels that would have to change cluster to give the sizes of the fit.
    """
    num, weight = logits.shape[1], voxel_weight(asked)
    predicted = logits.argmax(1, keepdim=True)
    true, guessed, right = (
        weight.new_zeros(num).scatter_add_(0, index.flatten(), part.flatten())
        for index, part in ((classes, weight), (predicted, weight), (classes, weight * (predicted == classes)))
    )
    held = (true > 0).sum().clamp(min=1)
    mass = true * weights
    tiny = torch.finfo(torch.float32).tiny
    best = mass / mass.sum().clamp(min=tiny)
    logs = logits.float().log_softmax(1)
    uncertain = -(logs.exp() * logs).sum(1, keepdim=True)
    return {
        "cross_entropy": cluster_cross_entropy(logits, classes, asked, weights),
        "cross_entropy_chance": -torch.special.xlogy(mass, best).sum(),
        "accuracy": (right / true.clamp(min=tiny)).sum() / held,
        "accuracy_chance": 1 / held,
        "assignment_entropy": (uncertain * weight).sum() / math.log(num),
        "clusters_in_use": torch.special.entr(true).sum().exp(),
        "clusters_predicted": torch.special.entr(guessed).sum().exp(),
        "largest_cluster": true.max(),
        "cluster_drift": (true - shares).abs().sum() / 2,
    }
