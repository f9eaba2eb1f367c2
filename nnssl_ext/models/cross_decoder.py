"""A decoder whose tokens look at other tokens by cross-attention.

They are those of a second view (CroCo, Weinzaepfel et al. 2022, arXiv:2210.10716) or of other modalities (MultiMAE,
Bachmann et al. 2022, arXiv:2204.01678).
"""

from __future__ import annotations

from math import prod

import torch
from timm.layers import Mlp, apply_rot_embed_cat, trunc_normal_
from torch import nn
from torch.nn import functional

from nnssl_ext.models.primus import PrimusEncoder, attended, pick, rotary_table
from nnssl_ext.models.token_decoder import INITIAL_STD, fold_tokens, place_tokens

MLP_RATIO = 4


class Attention(nn.Module):
    """Attention of some tokens to others, which may be the same.

    Args:
        width: Of a token.
        num_heads: Attention heads; they divide the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        rope: torch.Tensor | None = None,
        context_rope: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            x: (B, n, width), the tokens that look.
            context: (B, m, width), what they look at.
            rope: Their rotary rows, (n, 2 x head width) or (B, 1, n, 2 x head width); None: no rotation.
            context_rope: Those of the context.
            mask: (B, 1, 1, m), True where attention looks; None: everywhere.

        Returns:
            (B, n, width).
        """
        query = self._split(self.query(x), rope)
        key, value = self.key_value(context).chunk(2, dim=-1)
        key, value = self._split(key, context_rope), self._split(value)
        attended_to = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended_to.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor, rope: torch.Tensor | None = None) -> torch.Tensor:
        heads = x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads if rope is None else apply_rot_embed_cat(heads, rope).to(x.dtype)


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, MLP; each adds to what it normalises.

    Args:
        width: Of a token.
        num_heads: Attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm_cross, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), Mlp(width, MLP_RATIO * width)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        rope: torch.Tensor | None,
        context_rope: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """New tokens (B, n, width); the arguments are those of `Attention.forward`."""
        own = self.norm_self(x)
        x = x + self.self_attention(own, own, rope, rope)
        context = self.norm_context(context)
        x = x + self.cross_attention(self.norm_cross(x), context, rope, context_rope, mask)
        return x + self.mlp(self.norm_mlp(x))


class CrossDecoder(nn.Module):
    """From the tokens that an encoder saw, of an image and of what goes with it, to the voxels of that image.

    The image's visible tokens go back to their places, one learned mask token to all others. Every block lets them look
    at one another and then at the context. Both carry the same learned positions.

    Args:
        encoder: The encoder; heads are as wide as its heads.
        num_channels: Channels of the image to restore.
        depth: Blocks, 1 or more.
        num_heads: Attention heads, 1 or more.
        rotary: Whether both attentions rotate by position along every axis, besides the learned positions.
    """

    rope: torch.Tensor | None

    def __init__(
        self, encoder: PrimusEncoder, num_channels: int, depth: int, num_heads: int, rotary: bool = True
    ) -> None:
        super().__init__()
        self.grid, self.token_size = encoder.grid, encoder.token_size
        width = num_heads * encoder.head_width
        self.project = nn.Linear(encoder.channels[-1], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, prod(self.grid), width))
        self.blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_channels * prod(self.token_size))
        table = rotary_table(encoder.eva.rope, self.grid, self.grid).clone() if rotary else None
        self.register_buffer("rope", table, persistent=False)
        for value in (self.mask_token, self.position):
            trunc_normal_(value, std=INITIAL_STD)
        self.apply(_initialise)

    def forward(
        self, tokens: torch.Tensor, kept: torch.Tensor, context: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Restores an image.

        Args:
            tokens: The image's visible tokens (B, n, D), of the encoder.
            kept: (B, n), int64: the place of each; -1 where there is none.
            context: What they may look at (B, m, D), of the encoder.
            places: (B, m), int64: the place of each; -1 marks an empty place, which no token looks at.

        Returns:
            (B, C, *patch).
        """
        x = place_tokens(self.project(tokens), kept, self.mask_token, prod(self.grid)) + self.position
        context = self.project(context) + pick(self.position, places)
        context_rope = None if self.rope is None else self.rope[places.clamp(min=0)][:, None]
        mask = attended(places >= 0)
        for block in self.blocks:
            x = block(x, context, self.rope, context_rope, mask)
        return fold_tokens(self.head(self.norm(x)), self.grid, self.token_size)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=INITIAL_STD)
        nn.init.zeros_(module.bias)
