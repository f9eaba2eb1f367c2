"""Encoding an image on a transformer with a learned token in place of what is hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl_ext.models.primus import PrimusEncoder, rotary_table


def encode_masked(encoder: PrimusEncoder, x: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """Encodes all tokens of an image, the hidden ones as a learned token at their places.

    The token stands behind the projection and gets the position that belongs there (Xie et al. 2022, arXiv:2111.09886).

    Args:
        encoder: The transformer.
        x: Images (B, C, *size); what they hold at hidden tokens has no influence, as long as it is finite.
        hidden: (B, tokens), bool.
        mask_token: (1, 1, D).

    Returns:
        (B, tokens, D).
    """
    embedded = encoder.down_projection(x)
    grid, tokens = embedded.shape[2:], embedded.flatten(2).transpose(1, 2)
    tokens = torch.where(hidden[..., None], mask_token.to(tokens.dtype), tokens)
    return encoder.attend(tokens + encoder.positions(grid), rotary_table(encoder.eva.rope, encoder.grid, grid))
