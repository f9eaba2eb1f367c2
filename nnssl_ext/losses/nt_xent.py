"""The contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709), over the batches of all ranks and a queue."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed
from torch.nn import functional

from nnssl_ext.core.ranks import num_ranks, rank


def nt_xent(
    first: torch.Tensor,
    second: torch.Tensor,
    temperature: float,
    cases: torch.Tensor | None = None,
    keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised, temperature-scaled cross-entropy: each view has to find its other one among the views of the batch.

    Candidates are the views of all ranks but the view itself. Gradients flow to all of them, so that the mean over
    ranks, which DDP takes, is the gradient of the whole batch. Similarities are cosines in float32.

    Args:
        first: (B, D), one view of each sample.
        second: (B, D), the other one; as many on every rank.
        temperature: Divides the cosines, above 0.
        cases: (B,), int64: samples of the same case are no negatives of each other. None: all are.
        keys: The candidates in place of the views, each (B, D): what a slow copy of the network makes of the two views.
        earlier: Further negatives (Q, D), the same on all ranks, and which are left out (B, Q), bool. They have to come
            from what made the keys, else telling the two networks apart beats chance. None: none.

    Returns:
        The loss, 0 or more; and its chance level, the mean logarithm of the number of candidates. Both are 0 where no
        negative is left.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = functional.normalize(torch.stack([first, second]).float(), dim=2)
        compared = own if keys is None else functional.normalize(torch.stack(keys).float(), dim=2)
        everyone = gather_rows(compared.transpose(0, 1)).transpose(0, 1)  # (2, samples of all ranks, D)
        candidates = everyone.flatten(0, 1)
        if earlier is not None:
            candidates = torch.cat([candidates, functional.normalize(earlier[0].float(), dim=1)])
        logits = own.flatten(0, 1) @ candidates.T / temperature
    num, total = first.shape[0], everyone.shape[1]
    index = rank() * num + torch.arange(num, device=first.device)
    itself, positive = torch.cat([index, total + index]), torch.cat([total + index, index])
    left_out = torch.zeros(2 * num, 2 * total, dtype=torch.bool, device=logits.device)
    if cases is not None:
        alike = cases.unsqueeze(1) == gather_rows(cases)
        left_out = alike.repeat(2, 2).scatter(1, positive.unsqueeze(1), False)
    left_out = left_out.scatter(1, itself.unsqueeze(1), True)
    if earlier is not None:
        left_out = torch.cat([left_out, earlier[1].repeat(2, 1)], 1)
    loss = functional.cross_entropy(logits.masked_fill(left_out, -math.inf), positive)
    return loss, (~left_out).sum(1).float().log().mean()


def check_negatives(batch_size: int, without: str) -> None:
    """Refuses a contrast that would be 0 throughout.

    Args:
        batch_size: Samples of a rank.
        without: The setting that takes the contrast out of the loss, for the message.

    Raises:
        ValueError: Where the batches of all ranks together are a single sample.
    """
    if batch_size * num_ranks() < 2:
        raise ValueError(
            f"a batch of {batch_size} has no other sample to tell a view's partner from, so the contrast would be 0 "
            f"throughout: use a -batch_size of 2 or more, or --set {without}"
        )


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order; gradients find their way back to the rank that they belong to.

    Args:
        rows: (N, ...), as many on every rank.

    Returns:
        (ranks * N, ...).
    """
    return _Gather.apply(rows) if num_ranks() > 1 else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(num_ranks())[rank()]
