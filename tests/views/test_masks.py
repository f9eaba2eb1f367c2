import numpy as np
import pytest
import torch
from scipy import stats

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.masks import block_mask, upsample_blocks

RANDOM = SampleRandom(3, 17, tuple(range(6)))
SHAPES = [
    ((32, 32, 32), 8),
    ((40, 56, 40), 16),
    ((33, 21, 50), 8),
    ((24, 7, 31), (4, 7, 8)),
    ((50, 37), 8),
    ((20, 20), 3),
]


def blocks_of(shape: tuple[int, ...], block: int | tuple[int, ...]) -> torch.Tensor:
    """Number of the block that each voxel belongs to, voxel by voxel."""
    edges = (block,) * len(shape) if isinstance(block, int) else block
    grid = [-(-size // edge) for size, edge in zip(shape, edges, strict=True)]
    owner = np.empty(shape, np.int64)
    for index in np.ndindex(shape):
        owner[index] = np.ravel_multi_index([i // edge for i, edge in zip(index, edges, strict=True)], grid)
    return torch.from_numpy(owner)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_hidden_share_is_exact_up_to_half_a_block(shape, block, ratio: float) -> None:
    mask = block_mask(RANDOM, shape, block, ratio)
    assert mask.shape == (6, 1, *shape)
    assert mask.dtype == torch.bool
    owner = blocks_of(shape, block)
    largest = owner.flatten().bincount().max()
    for row in mask[:, 0]:
        assert abs(int(row.sum()) - ratio * row.numel()) <= largest / 2
        hidden, visible = set(owner[row].tolist()), set(owner[~row].tolist())
        assert not hidden & visible  # whole blocks
        assert hidden | visible == set(range(int(owner.max()) + 1))


@pytest.mark.parametrize(("ratio", "number"), [(0.75, 48), (0.5, 32), (0.0, 0), (1.0, 64)])
def test_hidden_number_is_exact_where_blocks_divide_the_patch(ratio: float, number: int) -> None:
    mask = block_mask(RANDOM, (32, 32, 32), 8, ratio)
    assert mask.flatten(1).sum(1).tolist() == [number * 512] * 6


def test_only_real_voxels_are_counted() -> None:
    valid = torch.ones(6, 1, 30, 26, 20, dtype=torch.bool)
    valid[1, :, 11:] = False
    valid[2, :, :, :, :13] = False
    hidden = block_mask(RANDOM, (30, 26, 20), 4, 0.75, valid=valid) & valid
    for row, real in zip(hidden, valid, strict=True):
        assert abs(int(row.sum()) - 0.75 * int(real.sum())) <= 32
    whole = block_mask(RANDOM, (30, 26, 20), 4, 0.75)
    assert torch.equal(hidden[0], whole[0])
    assert not torch.equal(hidden[1], whole[1] & valid[1])


@pytest.mark.parametrize("shape", [(16, 24), (16, 16, 24)])
def test_something_real_stays_visible_and_something_is_hidden(shape) -> None:
    """A whole crop; one whose real voxels lie in two of the blocks; one that is real in a single block, and is seen.

    Catches the nearest share where that hides all: with blocks of two thirds and one third, in half of the draws.
    """
    valid = torch.ones(3, 1, *shape, dtype=torch.bool)
    valid[1, ..., :14], valid[2, ..., 16:] = False, False
    for step in range(8):
        hidden = block_mask(SampleRandom(0, step, (0, 1, 2)), shape, 16, 0.75, valid=valid)
        count, real = (each.flatten(1).sum(1) for each in (hidden & valid, valid))
        assert ((count > 0) & (count < real)).tolist() == [True, True, False]
        assert count[2] == 0


def test_blocks_are_hidden_with_equal_probability_and_independently_of_their_place() -> None:
    mask = block_mask(SampleRandom(0, 0, tuple(range(600))), (12, 8), 4, 0.5)
    counts = mask[:, 0, ::4, ::4].flatten(1).sum(0).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    patterns = {tuple(row.flatten().tolist()) for row in mask[:, 0, ::4, ::4]}
    assert len(patterns) == 20  # all choices of 3 out of 6


def test_a_sample_has_its_mask_whatever_batch_it_is_in() -> None:
    alone = block_mask(SampleRandom(3, 17, (4,)), (20, 20, 20), 6, 0.6)
    assert torch.equal(block_mask(RANDOM, (20, 20, 20), 6, 0.6)[4:5], alone)
    assert not torch.equal(block_mask(SampleRandom(3, 18, (4,)), (20, 20, 20), 6, 0.6), alone)


@pytest.mark.parametrize("shape", [(7, 5, 4), (7, 5)])
def test_upsampling_gives_each_voxel_its_block(shape) -> None:
    block = (3, 2, 4)[: len(shape)]
    grid = [-(-size // edge) for size, edge in zip(shape, block, strict=True)]
    values = torch.arange(2 * int(np.prod(grid))).view(2, 1, *grid)
    assert torch.equal(upsample_blocks(values, block, shape)[0, 0], blocks_of(shape, block))


@pytest.mark.parametrize(
    ("block", "ratio", "message"),
    [
        (0, 0.5, "block_size=0 must be 1 or more"),
        ((4, 4), 0.5, r"block_size=\(4, 4\) must be 1 or more, for each of the 3 axes"),
        (4, 1.2, r"ratio=1.2 must lie in \[0, 1\]"),
    ],
)
def test_refusals(block, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_mask(RANDOM, (8, 8, 8), block, ratio)


def test_each_sample_may_have_a_ratio_of_its_own():
    ratios = torch.tensor([[0.25], [0.75]])
    hidden = block_mask(SampleRandom(seed=0, step=0, samples=(0, 1)), (8, 8), 2, ratios)
    assert hidden.flatten(1).float().mean(1).tolist() == [0.25, 0.75]
