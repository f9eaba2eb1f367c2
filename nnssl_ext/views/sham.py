"""Targets destroyed for control runs: everything stays as it is, but what is asked for belongs to another case."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom


def of_another_case(tensor: Tensor, images: int = 1) -> Tensor:
    """Hands every sample the rows of the sample before it; the first one gets those of the last.

    The rows of one batch show different cases, save where a round over the cases ends within it.

    Args:
        tensor: (B, ...).
        images: Consecutive rows that make up one sample, which stay together.

    Raises:
        ValueError: With a single sample, which has no other to take from.
    """
    if len(tensor) <= images:
        raise ValueError("a sham takes targets from the other cases of a batch: use a -batch_size of 2 or more")
    return tensor.roll(images, dims=0)


def restore_another_case(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The views of a restoration, whose voxels to restore are those of another case.

    Args:
        views: With `target` (B, C, *patch), and `asked` (B, 1, *patch), bool: where it is asked for.
    """
    target, asked = of_another_case(views["target"]), of_another_case(views["asked"])
    return {**views, "target": target, "asked": views["asked"] & asked}


def drawn_classes(classes: Tensor, num_classes: int, random: SampleRandom) -> Tensor:
    """Classes drawn anew, all equally likely, whatever they were.

    Args:
        classes: (B, ...), integers; its shape and type are kept.
        num_classes: Drawn from 0 to `num_classes` - 1.
        random: Source of the draws.
    """
    drawn = random.integers("classes", 0, num_classes, shape=tuple(classes.shape[1:]))
    return torch.from_numpy(drawn).to(classes)
