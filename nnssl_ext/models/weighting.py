"""How the losses of several tasks become one."""

from __future__ import annotations

import torch
from torch import distributed, nn

from nnssl_ext.core.ranks import num_ranks

NUM_STEPS, SHORTEST_PART = 50, 10
"""Steps in which losses are measured, at most, and the part of a run that they are at most."""
LEAST_SIZE = 1e-6
"""A loss of a smaller mean size is divided by this."""


class FirstSteps(nn.Module):
    """Divides each loss by its mean size in the first steps of the run, so that no task drowns another by its unit.

    While these last, that is the mean so far, this pass included. A loss that may be negative counts by its absolute
    value. Losses that are not finite are left out: one that was let in would stay for good.

    Args:
        number: Of losses.
    """

    total: torch.Tensor
    """(N,): sums of their sizes, means over all ranks."""
    count: torch.Tensor
    """(N,): passes in `total`."""
    measuring: torch.Tensor
    """1 in the first steps, then 0."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(number))
        self.register_buffer("count", torch.zeros(number))
        self.register_buffer("measuring", torch.ones(()))

    def forward(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The joint loss of losses (N,), and the factor of each (N,), detached; 1 where nothing was measured yet."""
        if self.training:
            self._measure(losses.detach().abs())
        mean = self.total / self.count.clamp(min=1)
        factors = torch.where(self.count > 0, 1 / mean.clamp(min=LEAST_SIZE), 1)
        return (losses * factors).sum(), factors

    def _measure(self, sizes: torch.Tensor) -> None:
        if num_ranks() > 1:
            distributed.all_reduce(sizes)
            sizes = sizes / num_ranks()
        counted = sizes.isfinite() & (self.measuring > 0)
        self.total += sizes.masked_fill(~counted, 0)
        self.count += counted

    def update(self, step: int, total: int) -> None:
        """Ends the measuring in time. Once per optimiser step; the arguments are those of `PretextTask.after_step`."""
        self.measuring.fill_(float(step + 1 < max(1, min(NUM_STEPS, total // SHORTEST_PART))))


class Uncertainty(nn.Module):
    """Weighs losses by a learned variance of each (Kendall et al. 2018, arXiv:1705.07115, equation 7).

    Half the sum of exp(-s) L + s, where s is the logarithm of the variance. Of a loss without a lower bound no variance
    is too small.

    Args:
        number: Of losses, 0 or more each.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(number))

    def forward(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The joint loss of losses (N,), and the factor of each (N,), detached."""
        factors = (-self.log_variance).exp() / 2
        return (losses * factors + self.log_variance / 2).sum(), factors.detach()

    def update(self, step: int, total: int) -> None:
        """Nothing is left to do: the optimiser moves the variances."""
