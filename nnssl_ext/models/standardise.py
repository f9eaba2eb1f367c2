"""Features less what all images have in common."""

from __future__ import annotations

import torch
from torch import nn

from nnssl_ext.models.centre import Centre

EPS = 1e-6
"""Of a squared mean, added to the variance: what float32 leaves of it."""
MOMENTUM = 0.9
"""Of the running moments, per optimiser step: some hundred views, and soon enough for a network that moves."""


class Standardise(nn.Module):
    """Features less their running mean, over their running deviation.

    What pooling leaves of an instance-normalised network is nearly the same for all images (a cosine of .99), so that a
    head sees next to nothing else; and a batch of 2 to 8 has no moments of its own worth the name. A teacher lags
    behind its student and needs other moments.

    Args:
        width: Of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.moments = Centre(2 * width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """From (..., width) to (..., width), float32; as they are before the first update."""
        mean, square = self.moments().chunk(2)
        variance = (square - mean.square()).clamp(min=0) + EPS * (EPS + mean.square())
        return (features.float() - mean) / torch.where(self.moments.weight > 0, variance.sqrt(), 1)

    def collect(self, features: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Adds features (..., width), those that count (...), of all ranks to the step in hand."""
        features = features.detach().float()
        self.moments.collect(torch.cat([features, features.square()], -1), counted)

    def update(self) -> None:
        """Takes up what was collected. Once per optimiser step."""
        self.moments.update(MOMENTUM)
