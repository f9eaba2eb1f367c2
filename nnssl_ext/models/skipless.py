"""A decoder without skip connections: what it restores has to pass through the encoder's deepest features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.encoder import Encoder

NARROWEST, WIDEST = 16, 320
"""Features at full resolution above a transformer, doubled at every scale below, and the most there are: nnU-Net's."""
CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class SkiplessDecoder(nn.Module):
    """From an encoder's deepest map to full resolution, scale by scale; a U-Net's scales, or halves of a token.

    Attributes:
        channels: Features of the maps that it gives, coarsest first.

    Args:
        encoder: Whose deepest map it takes.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        strides = halved(encoder.strides[-1]) if is_transformer(encoder) else list(encoder.strides)
        widths = [min(WIDEST, NARROWEST * 2**scale) for scale in range(len(strides) - 1)]
        if not is_transformer(encoder):
            widths = list(encoder.channels[:-1])
        self.channels = tuple(reversed(widths))
        steps = [tuple(b // a for a, b in zip(*pair, strict=True)) for pair in pairwise(strides)]
        before = (encoder.channels[-1], *self.channels)
        self.stages = nn.ModuleList(
            _rise(*pair, step) for pair, step in zip(pairwise(before), reversed(steps), strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps (B, channels[i], *size), coarsest first, the last at full resolution, of the deepest one."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def halved(token: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides from 1 to a token, each twice the one before where it can be."""
    strides = [tuple(token)]
    while any(edge > 1 for edge in strides[0]):
        strides.insert(0, tuple(edge // 2 if edge % 2 == 0 else 1 for edge in strides[0]))
    return strides


def _rise(inputs: int, outputs: int, step: tuple[int, ...]) -> nn.Sequential:
    dims = len(step)
    return nn.Sequential(
        TRANSPOSED[dims](inputs, outputs, step, step, bias=False),
        NORMS[dims](outputs, affine=True),
        nn.LeakyReLU(),
        CONVS[dims](outputs, outputs, 3, padding=1, bias=False),
        NORMS[dims](outputs, affine=True),
        nn.LeakyReLU(),
    )
