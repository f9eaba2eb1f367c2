"""Targets destroyed for control runs: everything stays as it is, but what is asked for belongs to another case."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom


def of_another_case(tensor: Tensor) -> Tensor:
    """Hands every sample the row of the sample before it; the first one gets that of the last.

    The rows of one batch show different cases, save where a round over the cases ends within it.

    Args:
        tensor: (B, ...), a row for each sample.

    Raises:
        ValueError: With a single sample, which has no other to take from.
    """
    if len(tensor) == 1:
        raise ValueError("a sham takes targets from the other cases of a batch: use a -batch_size of 2 or more")
    return tensor.roll(1, dims=0)


def restore_another_case(
    views: Mapping[str, Tensor], target: str = "target", asked: str = "asked"
) -> dict[str, Tensor]:
    """The views of a restoration, whose voxels to restore are those of another case.

    Args:
        views: All of them.
        target: Name of what is asked for, (B, C, *patch).
        asked: Name of where it is asked for, (B, 1, *patch), bool; for another case where it is for both.
    """
    both = views[asked] & of_another_case(views[asked])
    return {**views, target: of_another_case(views[target]), asked: both}


def drawn_classes(classes: Tensor, num_classes: int, random: SampleRandom) -> Tensor:
    """Classes drawn anew, all equally likely, whatever they were.

    Args:
        classes: (B, ...), integers; its shape and type are kept.
        num_classes: Drawn from 0 to `num_classes` - 1.
        random: Source of the draws.
    """
    drawn = random.integers("classes", 0, num_classes, shape=tuple(classes.shape[1:]))
    return torch.from_numpy(drawn).to(classes)
