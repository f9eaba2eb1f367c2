"""What the error of a restored image is where nothing was learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Error = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, hidden, valid) -> scalar, as `masked_mse`."""


def trivial_error(error: Error, image: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The chance level of a restoration: the smaller error of leaving images as they are and of giving their true mean.

    Args:
        error: The error of the restoration.
        image: (B, C, *patch), what the network sees.
        target: (B, C, *patch), what it should give.
        counted: (B, 1, *patch), bool: the voxels asked for, False on padding.

    Returns:
        A scalar. The mean is that of each target's counted voxels by channel, which the network is not told.
    """
    axes = tuple(range(2, target.ndim))
    count = counted.sum(axes, keepdim=True).clamp(min=1)
    mean = torch.where(counted, target.float(), 0.0).sum(axes, keepdim=True) / count
    guesses = (image, mean.expand_as(target))
    return torch.stack([error(guess, target, counted, counted) for guess in guesses]).amin(0)
