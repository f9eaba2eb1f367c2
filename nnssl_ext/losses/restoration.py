"""What the error of a restored image is where nothing was learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Error = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, hidden, valid) -> scalar, as `masked_mse`."""


def trivial_errors(error: Error, image: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """What a restoration has to beat: the error of giving each image's true mean, and of leaving images as they are.

    Which of the two is smaller is for a whole validation to say. Taking the smaller one of each batch would be to know
    beforehand which images were damaged little, the more so the smaller the batch.

    Args:
        error: The error of the restoration.
        image: (B, C, *patch), what the network sees.
        target: (B, C, *patch), what it should give.
        counted: (B, 1, *patch), bool: the voxels asked for, False on padding.

    Returns:
        Two scalars. The mean is that of each target's counted voxels by channel, which the network is not told.
    """
    axes = tuple(range(2, target.ndim))
    count = counted.sum(axes, keepdim=True).clamp(min=1)
    mean = torch.where(counted, target.float(), 0.0).sum(axes, keepdim=True) / count
    constant, untouched = (error(guess, target, counted, counted) for guess in (mean.expand_as(target), image))
    return constant, untouched
