"""The chance level of a restoration is the better of two guesses, and knows nothing of padding."""

import pytest
import torch

from nnssl_ext.losses.mae import masked_mse
from nnssl_ext.losses.restoration import trivial_error

SHAPE = (2, 3, 5, 4)


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    target = torch.randn(2, *SHAPE, generator=random) + 3
    counted = torch.rand(2, 1, *SHAPE[1:], generator=random) < 0.7
    return target, target + torch.randn(2, *SHAPE, generator=random), counted


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_is_the_better_of_the_image_as_it_is_and_its_mean(scale):
    target, noisy, counted = images()
    image = target + scale * (noisy - target)
    as_it_is, constant = [], []
    for row in range(2):
        for channel in range(2):
            true, seen = target[row, channel][counted[row, 0]], image[row, channel][counted[row, 0]]
            as_it_is.append(((true - seen) ** 2).mean())
            constant.append(true.var(correction=0))
    better = min(sum(as_it_is), sum(constant)) / 4
    assert trivial_error(masked_mse, image, target, counted).item() == pytest.approx(better.item(), rel=1e-5)
    assert (sum(as_it_is) < sum(constant)) == (scale < 1)


def test_what_does_not_count_has_no_influence():
    target, image, counted = images()
    expected = trivial_error(masked_mse, image, target, counted)
    spoilt = [torch.where(counted, tensor, 1e6) for tensor in (image, target)]
    assert torch.equal(trivial_error(masked_mse, *spoilt, counted), expected)
