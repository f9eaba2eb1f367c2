"""From an image to voxels and to one vector, on either backbone: what tasks run that ask something of every voxel.

A U-Net runs whole. A transformer sees all tokens that hold no padding, and the light decoder of masked autoencoders
gives the voxels. A place that it did not see has the mask token there, and nothing is to be asked of it: see
`views.tokens.whole_only`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.resenc import build_unet
from nnssl_ext.planners.plan import Configuration

DECODER_DEPTH = 2
"""Blocks of a transformer's decoder: as light as that of masked autoencoders, so that the encoder does the work."""
DECODER_HEADS = 0.5
"""Its attention heads as a share of the encoder's, at least one."""


def build_dense(
    configuration: Configuration, num_outputs: int, depth: int = DECODER_DEPTH, heads: float = DECODER_HEADS
) -> tuple[Encoder, nn.Module]:
    """The plan's backbone and a decoder to voxels: a U-Net's own, or a light one for a transformer.

    Args:
        configuration: Holds architecture, input channels and patch size.
        num_outputs: Channels of the decoder's output.
        depth: Blocks of a transformer's decoder.
        heads: Its attention heads as a share of the encoder's, at least one.

    Raises:
        ValueError: Where the network cannot be built as the plan says.
    """
    if configuration.backbone != "vit":
        return build_unet(configuration, num_outputs)
    from nnssl_ext.models.primus import build_primus
    from nnssl_ext.models.token_decoder import TokenDecoder

    encoder = build_primus(configuration)
    num_heads = max(1, round(heads * encoder.num_heads))
    return encoder, TokenDecoder(encoder, num_outputs, depth, num_heads)


def run_dense(
    encoder: Encoder, decoder: nn.Module, image: torch.Tensor, valid: torch.Tensor, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs what `build_dense` made.

    Args:
        encoder: The backbone.
        decoder: Its decoder.
        image: (B, C, *patch), 0 on padding.
        valid: (B, 1, *patch), bool, False on padding.
        kept: (B, n), the tokens without padding, -1 at the end; for a transformer alone.

    Returns:
        The decoder's output (B, num_outputs, *patch), and the deepest features' mean over what is real, (B, width) in
        float32: a position of a U-Net counts by the share of its cell that is no padding.
    """
    if is_transformer(encoder):
        assert kept is not None
        tokens = encoder.tokens(image, kept)
        return decoder(tokens, kept), _weighted_mean(tokens.transpose(1, 2), kept >= 0)
    maps = encoder(image)
    real = functional.interpolate(valid.float(), size=list(maps[-1].shape[2:]), mode="area")
    return decoder(maps), _weighted_mean(maps[-1].flatten(2), real.flatten(1))


def _weighted_mean(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, width, N) and (B, N) to (B, width); 0 where no weight is above 0."""
    share = weight.float() / weight.float().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (features.float() * share.unsqueeze(1)).sum(2)
