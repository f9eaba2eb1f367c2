"""Heads of a few linear layers that are well with two samples a batch: nothing in them depends on the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from nnssl_ext.models.standardise import Standardise


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with LayerNorm and GELU between them.

    Args:
        widths: Of the input, the hidden layers and the output; two or more.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class PooledHead(nn.Module):
    """Pooled features, standardised by their running moments, through a perceptron; float32 throughout.

    Several crops of one sample that are looked at together share their moments.

    Args:
        width: Of a crop's features.
        num_outputs: Of the last layer.
        hidden_width: Of the hidden layers.
        num_layers: Linear layers, 1 or more.
        crops: Crops that are looked at together.
    """

    def __init__(
        self, width: int, num_outputs: int, hidden_width: int = 256, num_layers: int = 2, crops: int = 1
    ) -> None:
        super().__init__()
        self.standard = Standardise(width)
        self.layers = perceptron([crops * width, *[hidden_width] * (num_layers - 1), num_outputs])

    def forward(self, features: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """From (B, width), or (B, crops, width), to (B, num_outputs).

        Args:
            features: Of the crops. In training they enter the moments.
            counted: (B,) or (B, crops), bool; False on crops that stay out of the moments. None: none does.
        """
        if self.training:
            self.standard.collect(features, counted)
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(self.standard(features).flatten(1))

    def update(self) -> None:
        """Takes up the moments that were collected. Once per optimiser step."""
        self.standard.update()
