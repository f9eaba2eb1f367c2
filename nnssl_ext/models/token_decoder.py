"""The light decoder of masked autoencoders on a transformer (He et al. 2022, arXiv:2111.06377)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from timm.layers import trunc_normal_
from torch import nn

from nnssl_ext.models.primus import PrimusEncoder

INITIAL_STD = 0.02
"""Spread of the mask token and of linear layers at the start, the library's."""
LAYER_SCALE = 0.1
"""Initial scale of what a block adds, Primus'."""


class TokenDecoder(nn.Module):
    """From the tokens that an encoder saw to the voxels of all.

    Visible tokens go back to their places, one learned mask token to all others; a few blocks follow, with learned and
    rotary positions of the whole grid, and a linear layer gives each token's voxels.

    Args:
        encoder: The encoder; heads are as wide as its heads.
        num_channels: Channels of the image to restore.
        depth: Blocks, 1 or more.
        num_heads: Attention heads, 1 or more.
    """

    def __init__(self, encoder: PrimusEncoder, num_channels: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.grid, self.token_size = encoder.grid, encoder.token_size
        width = num_heads * encoder.head_width
        self.project = nn.Linear(encoder.channels[-1], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        trunc_normal_(self.mask_token, std=INITIAL_STD)
        self.eva = Eva(
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            ref_feat_shape=self.grid,
            init_values=LAYER_SCALE,
            scale_attn_inner=True,
        )
        self.head = nn.Linear(width, num_channels * prod(self.token_size))
        for layer in (self.project, self.head):
            trunc_normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Restores an image.

        Args:
            tokens: (B, n, D), of the encoder.
            kept: (B, n), int64: the place of each; -1 where there is none.

        Returns:
            (B, C, *patch).
        """
        full = place_tokens(self.project(tokens), kept, self.mask_token, prod(self.grid))
        return fold_tokens(self.head(self.eva(full)[0]), self.grid, self.token_size)


def place_tokens(tokens: torch.Tensor, kept: torch.Tensor, filler: torch.Tensor, num_places: int) -> torch.Tensor:
    """Puts tokens back to their places, and a filler to all others.

    Args:
        tokens: (B, n, D).
        kept: (B, n), int64: the place of each; -1 where there is none.
        filler: (1, 1, D).
        num_places: Of the whole grid.

    Returns:
        (B, num_places, D), in the type of the tokens.
    """
    place = torch.where(kept >= 0, kept, num_places)[..., None].expand_as(tokens)
    full = filler.to(tokens.dtype).repeat(len(tokens), num_places + 1, 1)
    return full.scatter(1, place, tokens)[:, :-1]  # what has no place was written behind the last one


def fold_tokens(values: torch.Tensor, grid: Sequence[int], token_size: Sequence[int]) -> torch.Tensor:
    """The voxels of tokens at their places.

    Args:
        values: (B, tokens, C x voxels of a token), the last axis fastest in tokens as in voxels.
        grid: Tokens per axis.
        token_size: Voxels of a token per axis.

    Returns:
        (B, C, *grid x token_size).
    """
    dims = len(grid)
    parts = values.unflatten(2, (-1, *token_size)).unflatten(1, tuple(grid))  # (B, *grid, C, *token)
    order = [axis for pair in zip(range(1, dims + 1), range(dims + 2, 2 * dims + 2), strict=True) for axis in pair]
    size = [number * edge for number, edge in zip(grid, token_size, strict=True)]
    return parts.permute(0, dims + 1, *order).reshape(len(values), -1, *size)
