"""The reconstruction error of masked autoencoders (He et al. 2022, arXiv:2111.06377)."""

from __future__ import annotations

import torch


def masked_mse(
    prediction: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over the voxels that were hidden and are real.

    The mean is taken over the voxels and channels of each sample first and over the samples then, so the mean over
    ranks with equal batches is that of the whole batch. A sample without such a voxel counts as 0.

    Args:
        prediction: (B, C, *patch).
        target: (B, C, *patch).
        hidden: (B, 1, *patch), bool, True where the network did not see the voxel.
        valid: (B, 1, *patch), bool, False on padding.

    Returns:
        A scalar in fp32, 0 or more, in squared units of the target.
    """
    counted = (hidden & valid).expand_as(target)
    error = torch.where(counted, prediction.float() - target.float(), 0.0).square().flatten(1).sum(1)
    return (error / counted.flatten(1).sum(1).clamp(min=1)).mean()
