"""The running mean of a teacher's scores, which its targets are centred by (Caron et al. 2021, arXiv:2104.14294)."""

from __future__ import annotations

import torch
from torch import distributed, nn

from nnssl_ext.core.ranks import num_ranks


class Centre(nn.Module):
    """An exponential mean of scores, corrected for its start, moved once per optimiser step.

    Scores are collected in every pass over all ranks, so the centre is that of the whole accumulated batch, and the
    same everywhere. Rows that are not finite are left out: one that was let in would stay for good.

    Args:
        num_prototypes: Scores of a sample.
    """

    mean: torch.Tensor
    """(K,): the running mean times `weight`."""
    weight: torch.Tensor
    """Sum of the weights in `mean`: 0 at the start, towards 1."""
    total: torch.Tensor
    """(K,): sum of the scores of the step in hand."""
    count: torch.Tensor
    """Number of the samples in `total`."""

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        for name, shape in (("mean", num_prototypes), ("weight", ()), ("total", num_prototypes), ("count", ())):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self) -> torch.Tensor:
        """The centre (K,); 0 before the first step."""
        return self.mean / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)

    @torch.no_grad()
    def collect(self, scores: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Adds scores to the step in hand.

        Args:
            scores: (..., K).
            counted: (...), bool; False on rows that do not count. None: all count.
        """
        rows = scores.flatten(0, -2).float()
        taken = rows.isfinite().all(1)
        if counted is not None:
            taken = taken & counted.flatten()
        summed = rows.masked_fill(~taken[:, None], 0).sum(0)  # no matrix product: autocast would round its factors
        sums = torch.cat([summed, taken.sum()[None].to(summed)])
        if num_ranks() > 1:
            distributed.all_reduce(sums)
        self.total += sums[:-1]
        self.count += sums[-1]

    @torch.no_grad()
    def update(self, momentum: float | torch.Tensor) -> None:
        """Moves the centre by what was collected, if anything was.

        Args:
            momentum: In [0, 1).
        """
        rate = (1 - momentum) * (self.count > 0)
        self.mean.lerp_(self.total / self.count.clamp(min=1), rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)
        self.total.zero_()
        self.count.zero_()
