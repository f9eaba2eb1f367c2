"""What a restoring network is asked for: blocks in their own units, and no air."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from nnssl_ext.views.targets import EPSILON, TargetConfig, restoration_target

CASES = {"3d": ((7, 8, 5), (3, 4, 2)), "2d": ((9, 6), (4, 3))}
"""Patches that are not whole blocks, and blocks that are no cubes."""


@pytest.fixture(params=CASES)
def case(request) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    shape, block = CASES[request.param]
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, *shape, generator=random) * 3 + 5
    valid = torch.rand(2, 1, *shape, generator=random) < 0.8
    return image, valid, block


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]):
    starts = [range(0, size, edge) for size, edge in zip(shape, block, strict=True)]
    for corner in product(*starts):
        yield tuple(slice(start, start + edge) for start, edge in zip(corner, block, strict=True))


def test_each_block_is_normalised_over_its_real_voxels(case):
    """Against a loop over blocks. Faults: padding in the statistics, clipped blocks divided by whole ones' voxels, or
    blocks laid out in another order."""
    image, valid, block = case
    found = restoration_target(image, valid, block, TargetConfig(normalize=True))
    assert torch.equal(found["asked"], valid)
    for b, c in product(range(2), range(2)):
        for where in blocks_of(image.shape[2:], block):
            real = valid[b, 0][where]
            if not real.any():
                continue
            values = image[b, c][where][real]
            wanted = (values - values.mean()) / (values.var(unbiased=False) + EPSILON).sqrt()
            torch.testing.assert_close(found["target"][b, c][where][real], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rubbish", [1e6, float("nan")])
def test_padding_has_no_influence(case, rubbish):
    image, valid, block = case
    config = TargetConfig(normalize=True, background_std=0.5)
    clean = restoration_target(image, valid, block, config)
    spoilt = restoration_target(torch.where(valid, image, rubbish), valid, block, config)
    assert all(torch.equal(spoilt[name], clean[name]) for name in clean)


def test_flat_blocks_are_not_asked_for(case):
    """A block is background where all its channels are; noise just below the limit is, just above it is not."""
    image, _, block = case
    where, *others = blocks_of(image.shape[2:], block)
    noise = torch.randn_like(image[0, 0][where])
    noise = (noise - noise.mean()) / noise.std(unbiased=False)
    valid = torch.ones_like(image[:, :1], dtype=torch.bool)
    asked = {}
    for first, second in product((0.04, 0.06), repeat=2):
        image[0, 0][where], image[0, 1][where] = first * noise + 3, second * noise - 2
        found = restoration_target(image, valid, block, TargetConfig(background_std=0.05))
        assert torch.equal(found["target"], image)
        assert all(found["asked"][0, 0][other].all() for other in others)
        assert found["asked"][1].all()
        asked[first, second] = bool(found["asked"][0, 0][where].any())
    assert asked == {(0.04, 0.04): False, (0.04, 0.06): True, (0.06, 0.04): True, (0.06, 0.06): True}


def test_by_default_everything_real_is_asked_for_as_it_is(case):
    image, valid, block = case
    found = restoration_target(image, valid, block, TargetConfig())
    assert found["target"] is image
    assert found["asked"] is valid


def test_a_negative_spread_is_refused():
    with pytest.raises(ValueError, match="background_std=-1 must be 0 or more"):
        TargetConfig(background_std=-1)
