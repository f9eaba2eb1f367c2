"""What depends on the kind of a plan's backbone.

Transformers bring in timm, which takes seconds to import, so nothing here or in a method's file imports
`nnssl_ext.models.primus` before a plan asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.resenc import build_unet, export_unet
from nnssl_ext.planners.plan import Configuration

if TYPE_CHECKING:
    from nnssl_ext.models.primus import PrimusEncoder

MIN_TOKENS_PER_AXIS = 4
"""A token is a position of the deepest feature map with at least this many positions along every axis."""


def is_transformer(encoder: Encoder) -> TypeGuard[PrimusEncoder]:
    """Whether an encoder has tokens."""
    return encoder.kind == "vit"


def build_encoder(configuration: Configuration) -> Encoder:
    """The plan's encoder without a decoder, initialised from torch's global generator.

    Raises:
        ValueError: Where the network cannot be built on the plan's patch.
    """
    if configuration.backbone == "vit":
        from nnssl_ext.models.primus import build_primus

        return build_primus(configuration)
    return build_unet(configuration, configuration.num_input_channels)[0]


def token_level(strides: Sequence[Sequence[int]], size: Sequence[int]) -> int:
    """Which feature map's positions are the tokens: the deepest with 4 or more along every axis, else the largest.

    Args:
        strides: Voxels per position of each map, finest first.
        size: Voxels of the image per axis.
    """
    least = [min(edge // step for edge, step in zip(size, stride, strict=True)) for stride in strides]
    fitting = [level for level, positions in enumerate(least) if positions >= MIN_TOKENS_PER_AXIS]
    return fitting[-1] if fitting else least.index(max(least))


def descriptor(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector an image: the mean of the deepest map (B, C, *size) over its positions, (B, C), float32."""
    return maps[-1].float().flatten(2).mean(2)


def flat_tokens(features: torch.Tensor) -> torch.Tensor:
    """A feature map (B, D, *size) as tokens (B, N, D), the last axis fastest."""
    return features.flatten(2).transpose(1, 2)


def export_network(configuration: Configuration, encoder: Encoder, decoder: nn.Module | None = None) -> nn.Module:
    """The plan's whole network in nnU-Net's key names, as `PretextTask.export_network` wants it.

    Args:
        configuration: What the encoder was built from.
        encoder: The trained encoder; the network shares its memory.
        decoder: A U-Net's trained decoder; a fresh one where there is none, and for a transformer.
    """
    if is_transformer(encoder):
        from nnssl_ext.models.primus import export_primus

        return export_primus(configuration, encoder)
    return export_unet(configuration, encoder, decoder)
