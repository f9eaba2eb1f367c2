"""What a restoring network is asked for, block by block: where, and in which units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_ext.core.checks import at_least
from nnssl_ext.views.masks import block_sums, upsample_blocks

EPSILON = 1e-6
"""Added to a block's variance before it divides, He et al.'s."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What is asked for of the hidden voxels. A block is what is hidden as a whole: a block, a token, a cell."""

    normalize: bool = False
    """Whether the values of each block are brought to mean 0 and variance 1, so that contrast counts alike in bright
    and dark places (He et al. 2022). Noise in air is then blown up as well: leave it out by `background_std`."""
    background_std: float = 0.0
    """Blocks whose values vary by less than this in every channel count as background and are not asked for, 0 or more;
    in the units of preprocessed images, where a case has a standard deviation near 1. 0 asks for all; .05 leaves out
    air in z-scored MR. The metric `asked_share` says what is left; a run that asks for nothing is ended."""

    def __post_init__(self) -> None:
        at_least(self, background_std=0)

    def metrics(self, hidden: Tensor, asked: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """`asked_share`, of a batch's hidden real voxels, where background is left out; see `StepOutput.metrics`.

        Args:
            hidden: (B, C or 1, *patch), bool.
            asked: Likewise, as `restoration_target` gives it.
            valid: (B, 1, *patch), bool.
        """
        if not self.background_std:
            return {}
        return {"asked_share": (hidden & asked).sum() / (hidden & valid).sum().clamp(min=1)}


def restoration_target(image: Tensor, valid: Tensor, block: Sequence[int], config: TargetConfig) -> dict[str, Tensor]:
    """What to restore of an image, and where.

    Args:
        image: (B, C, *patch).
        valid: (B, 1, *patch), bool; False on padding, which enters no block's statistics.
        block: Edges of a block in voxels; blocks tile the patch and are clipped at its far border.
        config: In which units, and where.

    Returns:
        `target` (B, C, *patch), and `asked` (B, 1, *patch), bool, False on padding and in background blocks.
    """
    if not config.normalize and not config.background_std:
        return {"target": image, "asked": valid}
    shape = image.shape[2:]
    count = block_sums(valid, block).clamp(min=1)
    mean = block_sums(torch.where(valid, image, 0), block) / count
    centred = torch.where(valid, image - upsample_blocks(mean, block, shape), 0)
    variance = block_sums(centred.square(), block) / count
    something = variance.amax(1, keepdim=True) >= config.background_std**2
    scale = upsample_blocks((variance + EPSILON).rsqrt(), block, shape)
    return {
        "target": centred * scale if config.normalize else image,
        "asked": valid & upsample_blocks(something, block, shape),
    }
