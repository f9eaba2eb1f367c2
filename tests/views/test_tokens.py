"""Visible tokens: how many, which, and that the hidden voxels are all others, on patches that are no cubes."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.tokens import check_ratio, hidden_tokens, hidden_voxels, keep_tokens, num_visible, whole_tokens

SHAPE, TOKEN = (8, 12, 20), (2, 4, 4)
RANDOM = SampleRandom(seed=1, step=2, samples=(5, 6, 7))
NUM_TOKENS = 4 * 3 * 5


@pytest.fixture
def valid() -> torch.Tensor:
    """One whole crop, one padded by whole tokens, one by a single voxel."""
    valid = torch.ones(3, 1, *SHAPE, dtype=torch.bool)
    valid[1, :, :, 8:] = False
    valid[2, :, 0, 0, 0] = False
    return valid


def boxes(shape=SHAPE, token=TOKEN) -> torch.Tensor:
    """The index of each voxel's token, computed voxel by voxel."""
    index = torch.zeros(shape, dtype=torch.int64)
    grid = [size // edge for size, edge in zip(shape, token, strict=True)]
    for voxel in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        number = 0
        for position, edge, count in zip(voxel, token, grid, strict=True):
            number = number * count + position // edge
        index[tuple(voxel)] = number
    return index


def test_tokens_that_hold_padding_are_never_kept(valid):
    whole = whole_tokens(valid, TOKEN)
    assert whole.sum(1).tolist() == [NUM_TOKENS, 4 * 2 * 5, NUM_TOKENS - 1]
    for step in range(20):
        kept = keep_tokens(SampleRandom(1, step, RANDOM.samples), valid, TOKEN, 0.5)
        for places, allowed in zip(kept, whole, strict=True):
            assert allowed[places[places >= 0]].all()


def test_each_sample_keeps_its_share_and_no_token_twice(valid):
    """The share is of the real voxels: of the second sample's 8x8x18 they are 36 tokens' worth, in 32 whole tokens.

    Catches a share of the whole tokens alone, which hides more of the voxels the more of them lie beside padding.
    """
    valid[1, ..., 18:] = False
    kept = keep_tokens(RANDOM, valid, TOKEN, 0.75)
    assert kept.shape == (3, num_visible(NUM_TOKENS, 0.75)) == (3, 15)
    for places, count in zip(kept, (15, 9, 15), strict=True):
        real = places[places >= 0]
        assert len(real) == len(real.unique()) == count
        assert (places[count:] == -1).all()
        assert torch.equal(real, real.sort().values)


@pytest.mark.parametrize(("width", "kept"), [(7, 1), (11, 1)])
def test_of_a_thin_sample_one_token_is_seen_and_one_is_not(width, kept):
    """One and two whole tokens of 4 in a row of that many voxels. Catches a sample of which all is seen, with a
    ratio that half its tokens would make up, and one of which nothing is."""
    valid = (torch.arange(20) < width).view(1, 1, 1, 20)
    assert (keep_tokens(SampleRandom(0, 0, (0,)), valid, (1, 4), 0.2) >= 0).sum() == kept


def test_a_sample_does_not_depend_on_the_others(valid):
    together = keep_tokens(RANDOM, valid, TOKEN, 0.75)
    for number, sample in enumerate(RANDOM.samples):
        alone = keep_tokens(SampleRandom(1, 2, (sample,)), valid[number : number + 1], TOKEN, 0.75)
        assert torch.equal(alone[0], together[number])


def test_every_token_gets_its_turn(valid):
    seen = {
        int(place) for step in range(60) for place in keep_tokens(SampleRandom(1, step, (0,)), valid[:1], TOKEN, 0.8)[0]
    }
    assert seen == set(range(NUM_TOKENS))


def test_hidden_voxels_are_those_of_the_other_tokens(valid):
    kept = keep_tokens(RANDOM, valid, TOKEN, 0.6)
    hidden = hidden_voxels(kept, TOKEN, SHAPE)
    index = boxes()
    for places, mask in zip(kept, hidden, strict=True):
        assert torch.equal(mask[0], ~torch.isin(index, places[places >= 0]))


def test_two_dimensions():
    valid = torch.ones(1, 1, 8, 12, dtype=torch.bool)
    kept = keep_tokens(SampleRandom(0, 0, (0,)), valid, (4, 2), 0.5)
    assert torch.equal(hidden_voxels(kept, (4, 2), (8, 12))[0, 0], ~torch.isin(boxes((8, 12), (4, 2)), kept))


def test_nothing_is_kept_of_a_crop_without_a_whole_token():
    assert (keep_tokens(SampleRandom(0, 0, (0,)), torch.zeros(1, 1, 8, 8, dtype=torch.bool), (4, 4), 0.5) == -1).all()


def test_hiding_all_is_refused(valid):
    with pytest.raises(ValueError, match=r"ratio=1 must lie in \[0, 1\)"):
        keep_tokens(RANDOM, valid, TOKEN, 1)


def test_hidden_tokens_are_those_that_are_not_kept():
    kept = torch.tensor([[0, 3, 4], [2, -1, -1]])
    expected = torch.tensor([[False, True, True, False, False], [True, True, False, True, True]])
    assert torch.equal(hidden_tokens(kept, 5), expected)


def test_a_share_that_hides_nothing_is_refused():
    check_ratio(10, 0.06)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.04 hides none of a patch's 10 tokens: raise it"):
        check_ratio(10, 0.04)
