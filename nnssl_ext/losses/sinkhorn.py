"""Balanced soft assignment of samples to prototypes (Sinkhorn and Knopp 1967; Caron et al. 2020, arXiv:2006.09882)."""

from __future__ import annotations

import math

import torch
from torch import distributed

from nnssl_ext.core.ranks import num_ranks


@torch.no_grad()
def sinkhorn(
    scores: torch.Tensor, temperature: float | torch.Tensor, iterations: int = 3, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Assigns every sample to prototypes such that each prototype gets about the same share of all samples.

    Rows and columns of `exp(scores / temperature)` are normalised in turn, columns first, rows last; in logarithms, so
    that no temperature overflows. Columns run over the samples of all ranks, which may hold different numbers: two
    ranks give what one gives. Balance bounds confidence: with N < K samples a probability can hardly exceed N / K, so
    few samples get flat assignments.

    Args:
        scores: (N, K), similarity of samples to prototypes.
        temperature: Above 0; the smaller, the sharper.
        iterations: Rounds of normalisation, 1 or more.
        counted: (N,), bool; False on rows that take no part in the balance. None: all take part.

    Returns:
        (N, K) in float32, each row a distribution.
    """
    logits = scores.float() / temperature
    for _ in range(iterations):
        balanced = logits if counted is None else logits.masked_fill(~counted[:, None], -math.inf)
        logits = logits - _log_mass(balanced)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def _log_mass(logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of `exp(logits)` over the rows of all ranks, (1, K)."""
    together = num_ranks() > 1
    lowest = logits.new_full((1, logits.shape[1]), torch.finfo(logits.dtype).min)
    top = torch.cat([logits, lowest]).amax(0, keepdim=True)
    if together:
        distributed.all_reduce(top, distributed.ReduceOp.MAX)
    mass = (logits - top).exp().sum(0, keepdim=True)
    if together:
        distributed.all_reduce(mass)
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + top
