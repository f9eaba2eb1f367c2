"""Mean and spread of every token, for targets that are normalised token by token."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.nn import functional

from nnssl_ext.views.masks import upsample_blocks

MIN_VARIANCE = 1e-6
"""Added to a token's variance before its values are divided by the root of it (He et al. 2022)."""


def token_moments(image: Tensor, valid: Tensor, token_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every token, by channel and over its real voxels.

    `(image - mean) / std` is the target that is normalised per token (He et al. 2022, arXiv:2111.06377); 0 is then the
    guess of one who knows each token's mean, and has an error of 1 at most.

    Args:
        image: (B, C, *patch), 0 on padding.
        valid: (B, 1, *patch), bool.
        token_size: Voxels of a token per axis; they divide the patch.

    Returns:
        Two of (B, C, *patch), float32, the same at all voxels of a token; the second above 0.
    """
    shape = image.shape[2:]
    pool = functional.avg_pool2d if len(shape) == 2 else functional.avg_pool3d
    share = pool(valid.float(), tuple(token_size)).clamp(min=1 / prod(token_size))

    def mean_of(values: Tensor) -> Tensor:
        return upsample_blocks(pool(values.masked_fill(~valid, 0), tuple(token_size)) / share, token_size, shape)

    mean = mean_of(image.float())
    return mean, (mean_of((image - mean).square()) + MIN_VARIANCE).sqrt()
