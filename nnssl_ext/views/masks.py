"""Hidden regions of a crop. 1 (True) means hidden."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom


def block_mask(
    random: SampleRandom,
    shape: Sequence[int],
    block_size: int | Sequence[int],
    ratio: float | Tensor,
    *,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hides random blocks until the hidden share of the voxels is as near `ratio` as whole blocks allow.

    With a ratio between 0 and 1 something real stays visible and something is hidden. Where a sample's real voxels all
    lie in one block, that is impossible: nothing is hidden, so it is seen whole and nothing is asked of it.

    Blocks tile the patch from its first voxel and are clipped at its far border. Voxels are counted, not blocks, so a
    clipped block counts for what is left of it. Where `valid` is given only real voxels count: the padding of a small
    volume neither uses up the hidden share nor dilutes it. He et al. 2022 (arXiv:2111.06377), block-wise as in
    arXiv:2410.23132.

    Args:
        random: Keyed by sample.
        shape: Patch, 2 or 3 entries.
        block_size: Edge of a block in voxels, or one edge per axis.
        ratio: Share of the voxels to hide, in [0, 1]; as a tensor (B, 1) one for each sample.
        valid: (B, 1, *shape), bool; True on real voxels.
        device: Where the mask goes; that of `valid`, else the CPU.

    Returns:
        (B, 1, *shape), bool.

    Raises:
        ValueError: If the block does not fit the shape's dimensions or is empty, or the ratio is out of range.
    """
    block = _edges(block_size, shape)
    if not isinstance(ratio, Tensor) and not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1].")
    device = device if device is not None or valid is None else valid.device
    grid = [-(-size // edge) for size, edge in zip(shape, block, strict=True)]
    order = torch.from_numpy(random.permutation("blocks", prod(grid))).to(device)
    real = torch.ones(1, 1, *shape, device=device) if valid is None else valid
    counts = block_sums(real, block).flatten(1).long().expand(len(order), -1).gather(1, order)
    hidden_before = functional.pad(counts.cumsum(1), (1, 0)).double()  # voxels hidden by the first 0, 1, ... n blocks
    total = hidden_before[:, -1:]
    wanted = ratio * total
    trivial = ((hidden_before == 0) | (hidden_before == total)) & (wanted > 0) & (wanted < total)
    num_hidden = (hidden_before - wanted).abs().masked_fill(trivial, torch.inf).argmin(1, keepdim=True)
    rank = torch.arange(order.shape[1], device=device).expand_as(order)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < num_hidden)
    return upsample_blocks(chosen.view(-1, 1, *grid), block, shape)


def check_blocks(block_size: Sequence[int], shape: Sequence[int], ratio: tuple[float, float]) -> None:
    """Refuses blocks so large that whole ones cannot make up the share to hide.

    Args:
        block_size: Edges of a block.
        shape: Of what is hidden.
        ratio: Smallest and largest share to hide, in (0, 1).

    Raises:
        ValueError: Where a block holds a larger share than the range is wide and than half its lower end.
    """
    block, (low, high) = prod(block_size), ratio
    share = block / prod(shape)
    if block > 1 and share > max(high - low, low / 2):
        raise ValueError(
            f"mask_block gives blocks of {tuple(block_size)} tokens, {share:.0%} of {tuple(shape)}: whole ones do not "
            f"make up mask_ratio={ratio}. Use a smaller one, such as --set mask_block=1"
        )


def upsample_blocks(grid: Tensor, block_size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One value per block to one value per voxel.

    Args:
        grid: (B, C, *blocks), any type.
        block_size: Edges of a block.
        shape: Size of the patch; blocks at its far border are clipped.

    Returns:
        (B, C, *shape).
    """
    for axis, (edge, size) in enumerate(zip(block_size, shape, strict=True), start=2):
        grid = grid.index_select(axis, torch.arange(size, device=grid.device) // edge)
    return grid


def block_sums(values: Tensor, block_size: Sequence[int]) -> Tensor:
    """Sums of values (B, C, *shape) over each block: (B, C, *blocks), in fp32; blocks at the far border are clipped."""
    missing = [-size % edge for size, edge in zip(values.shape[2:], block_size, strict=True)]
    sums = functional.pad(values.float(), [pad for edge in reversed(missing) for pad in (0, edge)])
    for axis, edge in enumerate(block_size, start=2):
        sums = sums.unflatten(axis, (-1, edge)).sum(axis + 1)
    return sums


def _edges(block_size: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    block = (block_size,) * len(shape) if isinstance(block_size, int) else tuple(block_size)
    if len(block) != len(shape) or min(block) < 1:
        raise ValueError(f"block_size={block_size} must be 1 or more, for each of the {len(shape)} axes of {shape}.")
    return block
