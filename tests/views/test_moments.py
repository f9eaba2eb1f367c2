"""Mean and spread of tokens."""

import pytest
import torch

from nnssl_ext.views.moments import MIN_VARIANCE, token_moments


@pytest.mark.parametrize(("shape", "token"), [((4, 8, 6), (2, 4, 3)), ((8, 6), (4, 2))])
def test_moments_are_those_of_a_slow_version(shape, token):
    """Box by box over real voxels. Catches padding that is averaged in, and axes that are swapped."""
    data = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
    valid = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[(0, 0, *(slice(edge) for edge in token))] = False  # a token of padding alone
    mean, std = token_moments(data * valid, valid, token)
    grid = [range(size // edge) for size, edge in zip(shape, token, strict=True)]
    for place in torch.cartesian_prod(*map(torch.tensor, map(list, grid))).tolist():
        box = tuple(slice(p * edge, (p + 1) * edge) for p, edge in zip(place, token, strict=True))
        for row in range(2):
            real = valid[(row, 0, *box)]
            for channel in range(2):
                values = data[(row, channel, *box)][real]
                wanted = (values.mean(), values.var(correction=0)) if len(values) else (torch.tensor(0.0),) * 2
                for found, expected in zip((mean, std.square() - MIN_VARIANCE), wanted, strict=True):
                    found = found[(row, channel, *box)]
                    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-4, rtol=1e-4)
    assert (std > 0).all()


def test_a_flat_token_becomes_zeros():
    image = torch.full((1, 1, 4, 4), 7.0)
    mean, std = token_moments(image, torch.ones_like(image, dtype=torch.bool), (2, 2))
    assert torch.equal((image - mean) / std, torch.zeros_like(image))
