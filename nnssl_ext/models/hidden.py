"""Running an encoder on an image some of whose tokens are hidden, but kept at their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.encoder import Encoder

INITIAL_STD = 0.02
"""Spread of the mask token at the start."""


class HiddenTokens(nn.Module):
    """Features where tokens are hidden: on a transformer a learned token stands in their place, else voxels are 0.

    A token of a U-Net is a position of one of its feature maps, and all voxels of its cell are hidden with it.

    Args:
        encoder: What will be run; it is passed again, so that its weights are not held twice.
        level: Which feature map's positions are the tokens.
    """

    def __init__(self, encoder: Encoder, level: int) -> None:
        super().__init__()
        self.level, self.stride = level, encoder.strides[level]
        if is_transformer(encoder):
            self.token = nn.Parameter(torch.empty(1, encoder.channels[level], *[1] * len(self.stride)))
            nn.init.trunc_normal_(self.token, std=INITIAL_STD)

    def forward(self, encoder: Encoder, image: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The feature map (B, D, *tokens) of an image.

        Args:
            encoder: The same as at the start, or a copy of it.
            image: (B, C, *size).
            hidden: (B, 1, *tokens), bool. What the image holds there has no influence.
        """
        if not is_transformer(encoder):
            return encoder.feature_maps(image.masked_fill(cells(hidden, self.stride), 0))[self.level]
        from nnssl_ext.models.mask_token import encode_masked

        features = encode_masked(encoder, image, hidden.flatten(1), self.token.flatten(2).transpose(1, 2))
        return features.transpose(1, 2).unflatten(2, hidden.shape[2:])


def hidden_places(hidden: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens are hidden, as so many places of each sample, in order.

    Args:
        hidden: (B, 1, *tokens), bool, at most `most` of each sample True.
        most: Places, M.

    Returns:
        Whether each place is hidden (B, M), bool, the hidden ones first; and the places, (B, M), int64.
    """
    counted, place = hidden.flatten(1).int().sort(stable=True, dim=1, descending=True)
    return counted[:, :most].bool(), place[:, :most]


def cells(hidden: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The voxels (B, 1, *tokens * stride) of tokens (B, 1, *tokens)."""
    for axis, edge in enumerate(stride, start=2):
        hidden = hidden.repeat_interleave(edge, axis)
    return hidden
