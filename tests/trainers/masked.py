"""What the tests of masked methods share: crops of which one is padded, and where the tokens of voxels lie."""

from __future__ import annotations

import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch

TOKENS = {2: (4, 4), 3: (2, 4, 4)}
RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11))


def make_batch(patch_size: tuple[int, ...], channels: int = 1) -> Batch:
    """Two crops; the second is padded along the first axis, by no whole number of cells or tokens."""
    data = torch.randn(2, channels, *patch_size, generator=torch.Generator().manual_seed(0)) + 0.5
    valid = torch.ones(2, 1, *patch_size, dtype=torch.bool)
    valid[1, :, -5:] = False
    spacing = torch.ones(2, len(patch_size))
    return Batch(data * valid, valid, ("a", "b"), RANDOM.samples, torch.zeros_like(spacing, dtype=torch.int64), spacing)


def token_of_voxel(patch_size: tuple[int, ...]) -> torch.Tensor:
    """The index of each voxel's token, last axis fastest: (1, 1, *patch)."""
    token = TOKENS[len(patch_size)]
    grid = [size // edge for size, edge in zip(patch_size, token, strict=True)]
    index = torch.arange(torch.Size(grid).numel()).view(1, 1, *grid)
    for axis, edge in enumerate(token, start=2):
        index = index.repeat_interleave(edge, axis)
    return index
