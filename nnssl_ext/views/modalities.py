"""Which tokens of several co-registered modalities a transformer may see.

Token n of modality m has the number `m * tokens + n`, where `tokens` are those of one modality.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.tokens import num_visible, whole_tokens

_LEAST_SHARE = 1e-12


def keep_modalities(
    random: SampleRandom, valid: Tensor, token_size: Sequence[int], num_modalities: int, ratio: float
) -> Tensor:
    """Draws the tokens that stay visible, the same number of all modalities together for every sample.

    How they are shared among the modalities is drawn from a flat Dirichlet distribution (Bachmann et al. 2022,
    arXiv:2204.01678), so that a sample may show much of one and nothing of another. A token that holds padding is never
    visible; a sample with fewer other tokens than that number shows them all.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool; True on real voxels, of all modalities.
        token_size: Voxels of a token per axis; they divide the patch.
        num_modalities: Modalities M.
        ratio: Share of all tokens to hide, in [0, 1).

    Returns:
        (B, n), int64: numbers in rising order, then -1.
    """
    whole = whole_tokens(valid, token_size)
    tokens, total = whole.shape[1], num_visible(num_modalities * whole.shape[1], ratio)
    # exponentially distributed numbers are those of a flat Dirichlet distribution, up to their sum
    shares = torch.from_numpy(-np.log1p(-random.uniform("shares", shape=(num_modalities,)))).to(valid.device)
    counts = apportion(shares, total, whole.sum(1))
    orders = [random.permutation(f"tokens{number}", tokens) for number in range(num_modalities)]
    order = torch.from_numpy(np.stack(orders, 1)).to(valid.device)
    usable = whole[:, None].expand_as(order).gather(2, order)
    chosen = usable & (usable.cumsum(2) <= counts[..., None])
    order = order + tokens * torch.arange(num_modalities, device=order.device)[:, None]
    kept = torch.where(chosen, order, num_modalities * tokens).flatten(1).sort(1).values[:, :total]
    return torch.where(kept < num_modalities * tokens, kept, -1)


def apportion(shares: Tensor, total: int, most: Tensor) -> Tensor:
    """Whole numbers in given proportions that add up to a total, by largest remainders and none above a limit.

    What a limit cuts off goes to the others, in their proportions.

    Args:
        shares: (B, M), 0 or more; they need not add up to 1.
        total: Their wanted sum.
        most: (B,), int64: the limit, the same for all numbers of a row.

    Returns:
        (B, M), int64; a row adds up to `total`, or to M times its limit where that is less.
    """
    shares, limit = shares.double().clamp(min=_LEAST_SHARE), most.double()[:, None]
    wanted = (shares.shape[1] * limit).clamp(max=total)
    quota = torch.zeros_like(shares)
    for _ in range(shares.shape[1]):  # a round brings one or more to the limit, or is the last one needed
        open_shares = torch.where(quota < limit, shares, 0)
        spare = (wanted - quota.sum(1, keepdim=True)) / open_shares.sum(1, keepdim=True).clamp(min=_LEAST_SHARE)
        quota = torch.minimum(quota + spare * open_shares, limit)
    whole = quota.floor()
    rank = (quota - whole).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (whole + (rank < wanted - whole.sum(1, keepdim=True))).long()


def of_modality(kept: Tensor, number: int, tokens: int) -> Tensor:
    """The places of one modality's visible tokens, and -1 at all others.

    Args:
        kept: (B, n), as `keep_modalities` gives it.
        number: The modality.
        tokens: Tokens of one modality.

    Returns:
        (B, n), int64.
    """
    return torch.where(kept.div(tokens, rounding_mode="floor") == number, kept % tokens, -1)
