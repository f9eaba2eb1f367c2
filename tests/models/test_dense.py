"""An image to voxels and to one vector: shapes, and what padding may not do."""

import pytest
import torch

from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.views.tokens import whole_places

TOKENS = {2: (4, 4), 3: (2, 4, 4)}


@pytest.fixture(params=["tiny_plan", "tiny_vit_plan"], ids=["cnn", "vit"])
def networks(request, patch_size):
    plan = request.getfixturevalue(request.param)(patch_size)
    (name,) = plan.configuration_names
    torch.manual_seed(0)
    encoder, decoder = build_dense(plan.configuration(name), num_outputs=3)
    return encoder.eval(), decoder.eval()


def inputs(encoder, patch_size, padded: int):
    image = torch.randn(2, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 1, *patch_size, dtype=torch.bool)
    valid[1, :, len(valid[1, 0]) - padded :] = False
    kept = whole_places(valid, TOKENS[len(patch_size)]) if encoder.kind == "vit" else None
    return image * valid, valid, kept


def test_gives_voxels_and_a_vector(networks, patch_size):
    encoder, decoder = networks
    voxels, pooled = run_dense(encoder, decoder, *inputs(encoder, patch_size, padded=0))
    assert voxels.shape == (2, 3, *patch_size)
    assert pooled.shape == (2, encoder.channels[-1])
    torch.testing.assert_close(pooled, encoder.pooled(inputs(encoder, patch_size, 0)[0]))


def test_the_vector_is_the_mean_of_what_is_real(networks, patch_size):
    """Catches means over the positions of padding: half of the second image is none of its own."""
    encoder, decoder = networks
    half = patch_size[0] // 2
    image, valid, kept = inputs(encoder, patch_size, padded=half)
    _, pooled = run_dense(encoder, decoder, image, valid, kept)
    features = encoder(image)[-1][1].flatten(1) if kept is None else encoder.tokens(image, kept)[1].T
    real = features[:, : features.shape[1] // 2]  # the first axis is the slowest
    torch.testing.assert_close(pooled[1], real.mean(1))
    assert not torch.allclose(pooled[1], features.mean(1))


def test_a_cell_counts_by_its_real_share(tiny_plan):
    """A quarter of the last cell along the first axis is real, so it weighs a quarter."""
    torch.manual_seed(0)
    encoder, decoder = build_dense(tiny_plan((16, 16)).configuration("2d"), num_outputs=1)
    image, valid, _ = inputs(encoder, (16, 16), padded=3)
    features = encoder(image)[-1][1]
    weight = torch.tensor([1, 1, 1, 0.25])[:, None].expand(4, 4)
    expected = (features * weight).sum((1, 2)) / weight.sum()
    torch.testing.assert_close(run_dense(encoder, decoder, image, valid)[1][1], expected)
