"""Hidden tokens: what lies there has no influence, what is visible has, and places are kept."""

import pytest
import torch

from nnssl_ext.models.backbone import build_encoder, token_level
from nnssl_ext.models.hidden import HiddenTokens, cells


@pytest.fixture(params=["cnn", "vit"])
def make_plan(request, tiny_plan, tiny_vit_plan):
    return tiny_plan if request.param == "cnn" else tiny_vit_plan


def test_the_network_sees_nothing_hidden_and_all_else(make_plan, patch_size):
    plan = make_plan(patch_size)
    torch.manual_seed(0)
    encoder = build_encoder(plan.configuration(plan.configuration_names[0])).eval()
    level = token_level(encoder.strides, patch_size)
    module = HiddenTokens(encoder, level)
    grid = [edge // step for edge, step in zip(patch_size, encoder.strides[level], strict=True)]
    hidden = torch.rand(2, 1, *grid, generator=torch.Generator().manual_seed(1)) < 0.5
    image = torch.randn(2, 1, *patch_size)
    voxels = cells(hidden, encoder.strides[level])
    assert voxels.shape == image.shape
    with torch.no_grad():
        features = module(encoder, image, hidden)
        assert features.shape == (2, encoder.channels[level], *grid)
        assert torch.equal(features, module(encoder, image.masked_fill(voxels, 7.0), hidden))
        other = torch.where(voxels, image, image.square())
        assert not torch.allclose(features, module(encoder, other, hidden), atol=1e-2)
        nothing = torch.zeros_like(hidden)
        assert torch.equal(module(encoder, image, nothing), encoder.feature_maps(image)[level])


def test_a_token_covers_its_own_cell():
    """Fails if tokens are laid out in another order than the feature map's positions."""
    hidden = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    hidden[0, 0, 1, 2] = True
    where = cells(hidden, (2, 4))[0, 0].nonzero()
    assert where.amin(0).tolist() == [2, 8]
    assert where.amax(0).tolist() == [3, 11]


@pytest.mark.parametrize(
    ("size", "level"), [((32, 32, 32), 3), ((16, 32, 32), 2), ((8, 32, 32), 1), ((3, 3, 3), 0), ((2, 64, 64), 0)]
)
def test_tokens_are_the_deepest_positions_of_which_there_are_four(size, level):
    assert token_level([(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)], size) == level
