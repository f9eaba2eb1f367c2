"""Voxels that change places within small windows: texture is lost and what is around it stays."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.corruptions import paint_boxes, random_voxels

_KEYS = 2**24
"""Random keys that a float32 in [0, 1) tells apart."""


def shuffle_within(data: Tensor, windows: Tensor, random: SampleRandom) -> Tensor:
    """Permutes the voxels of each window at random; the channels of a voxel move together.

    Args:
        data: (B, C, *patch).
        windows: (B, 1, *patch), int64: voxels of one sample with the same number form a window; a negative number is
            no window, and the voxel stays.
        random: Keyed by sample.

    Returns:
        (B, C, *patch), with the same values in each window.
    """
    size = prod(data.shape[2:])
    flat = windows.flatten(1)
    alone = flat.amax(1, keepdim=True) + 1 + torch.arange(size, device=data.device)
    group = torch.where(flat < 0, alone, flat)
    key = (random_voxels(windows.float(), random).flatten(1) * _KEYS).long()
    # sorted by window, in order and at random: each window fills the same stretch of both lists
    there, here = group.argsort(dim=1, stable=True), (group * _KEYS + key).argsort(dim=1)
    source = torch.empty_like(here).scatter(1, there, here)
    return data.flatten(2).gather(2, source.unsqueeze(1).expand(-1, data.shape[1], -1)).view_as(data)


def tiled_windows(random: SampleRandom, valid: Tensor, longest: tuple[int, ...]) -> Tensor:
    """Windows of random edges that tile the patch; padding is in none.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool.
        longest: Greatest edge along each axis in voxels; the edges are uniform from 1.

    Returns:
        (B, 1, *patch), int64, as `shuffle_within` takes them.
    """
    windows = torch.zeros(len(valid), 1, dtype=torch.int64, device=valid.device)
    for axis, (size, edge) in enumerate(zip(valid.shape[2:], longest, strict=True)):
        ends = torch.from_numpy(random.integers(f"edges{axis}", 1, edge + 1, (size,)).cumsum(1)).to(valid.device)
        voxels = torch.arange(size, device=valid.device).expand(len(valid), -1).contiguous()
        interval = torch.searchsorted(ends, voxels, right=True)
        windows = windows.unsqueeze(-1) * size + interval.view(len(valid), *[1] * (axis + 1), size)
    return windows.masked_fill(~valid, -1)


def scattered_windows(random: SampleRandom, valid: Tensor, number: int, edge: int) -> Tensor:
    """A number of cubes at random places; of cubes that overlap, the later one takes what is common.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool.
        number: Cubes.
        edge: Their edge in voxels, clipped where fewer voxels are real.

    Returns:
        (B, 1, *patch), int64, as `shuffle_within` takes them.
    """
    sides = [(edge / size, edge / size) for size in valid.shape[2:]]
    return (paint_boxes(random, valid, (number, number), sides) - 1).masked_fill(~valid, -1)
