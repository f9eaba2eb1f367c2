"""Heads that turn features into assignments to learned prototypes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.models.perceptron import perceptron

HIDDEN_WIDTH = 2048
"""Largest width of the hidden layers, the paper's; never above 8 times that of the features."""
WEIGHT_STD = 0.02
"""Initial spread of linear layers, the papers'."""


class PrototypeHead(nn.Module):
    """The head of DINO (arXiv:2104.14294): a perceptron, a normalised bottleneck, and similarities to prototypes.

    Prototypes have length 1 (the last layer's gain is frozen). Other than in the paper, hidden layers are normalised
    (LayerNorm, which depends on no batch). Float32 throughout.

    Args:
        width: Of the features.
        num_prototypes: Outputs.
        bottleneck_width: At most; never above twice `width`.
        num_layers: Linear layers up to the bottleneck, 1 or more.
    """

    moving: torch.Tensor
    """1 where prototypes learn, 0 where they are frozen, as at the start."""

    def __init__(self, width: int, num_prototypes: int, bottleneck_width: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        self.bottleneck_width = min(bottleneck_width, 2 * width)
        hidden = [min(HIDDEN_WIDTH, 8 * width)] * (num_layers - 1)
        self.layers = perceptron([width, *hidden, self.bottleneck_width])
        self.weight = nn.Parameter(torch.randn(num_prototypes, self.bottleneck_width))
        self.register_buffer("moving", torch.zeros(()))
        for module in self.layers:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
                nn.init.zeros_(module.bias)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """The bottleneck of features (..., width): (..., bottleneck), of length 1, float32."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.normalize(self.layers(features.float()), dim=-1)

    def scores(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines of embeddings (..., bottleneck) with the prototypes: (..., K), float32, in [-1, 1]."""
        with torch.autocast(embeddings.device.type, enabled=False):
            weight = functional.normalize(self.weight.float(), dim=-1)
            return functional.linear(embeddings.float(), weight.detach().lerp(weight, self.moving))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """From (..., width) to (..., K), float32."""
        return self.scores(self.embed(features))
