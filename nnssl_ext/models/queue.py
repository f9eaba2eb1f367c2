"""Features of earlier steps, for what a small batch cannot show: other cases."""

from __future__ import annotations

import torch
from torch import distributed, nn

from nnssl_ext.core.random import seed_of
from nnssl_ext.core.ranks import num_ranks

EMPTY = -1
"""Key of a place that holds nothing."""


class FeatureQueue(nn.Module):
    """The last features that were pushed, with a key each, in buffers: saved, resumed, and the same on every rank.

    Args:
        size: Features it holds, 0 or more; no more than the cases outside a batch, else it holds a case twice.
        width: Of a feature.
    """

    rows: torch.Tensor
    """(size, width), float32."""
    keys: torch.Tensor
    """(size,), int64: what each row belongs to (a case), `EMPTY` where there is none yet."""
    pushed: torch.Tensor
    """Features pushed so far."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(max(size, 0), width))
        self.register_buffer("keys", torch.full((max(size, 0),), EMPTY))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """Puts features in the places of the oldest; of more than fit, the last ones.

        A feature that is not finite leaves its place empty.

        Args:
            rows: (N, width), of all ranks: the queues of ranks must not part.
            keys: (N,), 0 or more.
        """
        size = len(self.keys)
        if not size:
            return
        place = (self.pushed + torch.arange(len(keys), device=keys.device))[-size:] % size
        finite = rows[-size:].isfinite().all(1)
        self.rows[place] = rows[-size:].float().masked_fill(~finite[:, None], 0)
        self.keys[place] = keys[-size:].masked_fill(~finite, EMPTY)
        self.pushed += len(keys)


def all_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order, without gradient; every rank has as many.

    Args:
        tensor: (N, ...).

    Returns:
        (ranks * N, ...).
    """
    if num_ranks() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(num_ranks())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def case_keys(cases: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """A number for each case's name, (B,), int64, 0 or more: the same on every rank and in every run."""
    return torch.tensor([seed_of("case", case) for case in cases], device=device)
