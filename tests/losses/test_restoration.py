"""What a restoration has to beat are two guesses, which know nothing of padding."""

import pytest
import torch

from nnssl_ext.losses.mae import masked_mse
from nnssl_ext.losses.restoration import trivial_errors

SHAPE = (2, 3, 5, 4)


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    target = torch.randn(2, *SHAPE, generator=random) + 3
    counted = torch.rand(2, 1, *SHAPE[1:], generator=random) < 0.7
    return target, target + torch.randn(2, *SHAPE, generator=random), counted


@pytest.mark.parametrize("rows", [1, 2])
def test_are_those_of_the_mean_and_of_the_image_as_it_is(rows):
    """Catches the smaller one of each batch: a batch of one, damaged little, would be beaten by no network."""
    target, noisy, counted = (tensor[:rows] for tensor in images())
    image = target + torch.tensor([0.1, 10.0]).view(2, 1, 1, 1, 1)[:rows] * (noisy - target)
    as_it_is, constant = [], []
    for row in range(rows):
        for channel in range(2):
            true, seen = target[row, channel][counted[row, 0]], image[row, channel][counted[row, 0]]
            as_it_is.append(((true - seen) ** 2).mean())
            constant.append(true.var(correction=0))
    found = trivial_errors(masked_mse, image, target, counted)
    expected = [torch.stack(errors).mean().item() for errors in (constant, as_it_is)]
    assert [error.item() for error in found] == pytest.approx(expected, rel=1e-5)


def test_what_does_not_count_has_no_influence():
    target, image, counted = images()
    expected = trivial_errors(masked_mse, image, target, counted)
    spoilt = [torch.where(counted, tensor, 1e6) for tensor in (image, target)]
    assert all(map(torch.equal, trivial_errors(masked_mse, *spoilt, counted), expected))
