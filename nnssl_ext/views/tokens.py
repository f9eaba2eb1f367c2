"""Which tokens of a crop a transformer may see. A token is a box of voxels; tokens tile the crop, last axis fastest."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.masks import upsample_blocks


def keep_tokens(random: SampleRandom, valid: Tensor, token_size: Sequence[int], ratio: float) -> Tensor:
    """Draws the tokens that stay visible, at random, from those that hold no padding.

    A token with any padding is never visible, since its embedding would carry it; its real voxels count as hidden. So
    many of the other tokens are kept that their voxels are the share `1 - ratio` of the sample's real ones, as near as
    whole tokens allow: at least one, and not all where `ratio` is above 0. What else is in the batch has no say.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool; True on real voxels.
        token_size: Voxels of a token per axis; they divide the patch.
        ratio: Share of the real voxels to hide, in [0, 1).

    Returns:
        (B, n), int64, with n the number kept of a crop without padding: indices in rising order, then -1.

    Raises:
        ValueError: If the ratio is out of range.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1).")
    whole = whole_tokens(valid, token_size)
    num_tokens = whole.shape[1]
    order = torch.from_numpy(random.permutation("tokens", num_tokens)).to(valid.device)
    usable = whole.gather(1, order)
    real = valid.flatten(1).sum(1, keepdim=True, dtype=torch.float64) / prod(token_size)  # in tokens
    most = whole.sum(1, keepdim=True) - int(ratio > 0)
    wanted = ((1 - ratio) * real).round().minimum(most).clamp(min=1)
    chosen = usable & (usable.cumsum(1) <= wanted)
    places = torch.where(chosen, order, num_tokens).sort(1).values[:, : num_visible(num_tokens, ratio)]
    return torch.where(places < num_tokens, places, -1)


def num_visible(num_tokens: int, ratio: float) -> int:
    """How many of so many tokens stay visible; at least one."""
    return max(1, round((1 - ratio) * num_tokens))


def check_ratio(num_tokens: int, ratio: float) -> None:
    """Refuses a share that hides none of a patch's tokens.

    Raises:
        ValueError: With both numbers.
    """
    if num_visible(num_tokens, ratio) == num_tokens:
        raise ValueError(
            f"mask_ratio={ratio} hides none of a patch's {num_tokens} tokens: raise it, or plan a larger patch"
        )


def whole_places(valid: Tensor, token_size: Sequence[int]) -> Tensor:
    """All tokens that hold no padding.

    Args:
        valid: (B, 1, *patch), bool.
        token_size: Voxels of a token per axis.

    Returns:
        (B, tokens), int64: indices in rising order, then -1 where a sample has fewer.
    """
    whole = whole_tokens(valid, token_size)
    num_tokens = whole.shape[1]
    places = torch.where(whole, torch.arange(num_tokens, device=whole.device), num_tokens).sort(1).values
    return torch.where(places < num_tokens, places, -1)


def whole_only(valid: Tensor, token_size: Sequence[int]) -> dict[str, Tensor]:
    """What a transformer that sees all tokens without padding can be asked for: their voxels, and no others.

    Args:
        valid: (B, 1, *patch), bool.
        token_size: Voxels of a token per axis.

    Returns:
        `kept`, as `whole_places` gives it, and `valid` (B, 1, *patch), bool: the voxels of these tokens.
    """
    kept = whole_places(valid, token_size)
    return {"kept": kept, "valid": ~hidden_voxels(kept, token_size, valid.shape[2:])}


def whole_tokens(valid: Tensor, token_size: Sequence[int]) -> Tensor:
    """Which tokens hold no padding.

    Args:
        valid: (B, 1, *patch), bool.
        token_size: Voxels of a token per axis.

    Returns:
        (B, tokens), bool.
    """
    whole = valid
    for axis, edge in enumerate(token_size, start=2):
        whole = whole.unflatten(axis, (-1, edge)).all(axis + 1)
    return whole.flatten(1)


def hidden_voxels(kept: Tensor, token_size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The voxels of all tokens that are not kept.

    Args:
        kept: (B, n), as `keep_tokens` gives it.
        token_size: Voxels of a token per axis.
        shape: The patch.

    Returns:
        (B, 1, *shape), bool.
    """
    grid = [size // edge for size, edge in zip(shape, token_size, strict=True)]
    return upsample_blocks(hidden_tokens(kept, prod(grid)).view(-1, 1, *grid), token_size, shape)


def hidden_tokens(kept: Tensor, num_tokens: int) -> Tensor:
    """Which of all tokens are not kept, (B, tokens), bool; `kept` (B, n) as `keep_tokens` gives it."""
    hidden = torch.ones(len(kept), num_tokens + 1, dtype=torch.bool, device=kept.device)
    hidden.scatter_(1, torch.where(kept >= 0, kept, num_tokens), False)  # -1 is written behind the last token
    return hidden[:, :-1].contiguous()
