"""Errors of what was restored, as masked autoencoders count them (He et al. 2022, arXiv:2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mse(prediction: Tensor, target: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the voxels that were hidden and are real.

    The mean is taken over the voxels and channels of each sample first and over the samples then, so the mean over
    ranks with equal batches is that of the whole batch. A sample without such a voxel counts as 0.

    Args:
        prediction: (B, C, *patch).
        target: (B, C, *patch).
        hidden: (B, 1, *patch), bool, True where the network did not see the voxel.
        valid: (B, 1, *patch), bool, False on padding and on whatever else is not asked for.

    Returns:
        A scalar in fp32, 0 or more, in squared units of the target.
    """
    return _mean_over(_difference(prediction, target, hidden & valid).square(), hidden & valid)


def masked_l1(prediction: Tensor, target: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute error over the voxels that were hidden and are real; see `masked_mse`."""
    return _mean_over(_difference(prediction, target, hidden & valid).abs(), hidden & valid)


def guess_error(target: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
    """The `masked_mse` of guessing, at every voxel, the mean of the sample's visible ones: the chance level.

    Args:
        target: (B, C, *patch).
        hidden: As in `masked_mse`.
        valid: As in `masked_mse`.
    """
    visible = ~hidden & valid
    count = visible.flatten(1).sum(1).clamp(min=1)
    mean = torch.where(visible, target, 0).flatten(2).sum(2) / count[:, None]
    return masked_mse(mean.view(*mean.shape, *[1] * (target.ndim - 2)).expand_as(target), target, hidden, valid)


def hidden_share(hidden: Tensor, valid: Tensor) -> Tensor:
    """Share of the batch's real voxels (B, 1, *patch) that were hidden."""
    return (hidden & valid).sum() / valid.sum().clamp(min=1)


def _difference(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, prediction.float() - target.float(), 0.0)


def _mean_over(errors: Tensor, counted: Tensor) -> Tensor:
    number = counted.expand_as(errors).flatten(1).sum(1).clamp(min=1)
    return (errors.flatten(1).sum(1) / number).mean()
