"""Standardised features: images are told apart, from the first update on, whatever the size of the batch."""

import torch
from torch.nn.functional import normalize

from nnssl_ext.models.standardise import Standardise


def draw() -> torch.Tensor:
    """Features that are nearly the same for all images."""
    return 3 + torch.arange(16.0) / 4 + 0.02 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def smallest_cosine(features: torch.Tensor) -> float:
    unit = normalize(features, dim=-1)
    return float((unit @ unit.T).min())


def test_images_that_look_alike_are_told_apart_from_the_first_update_on():
    """Fails if the variance's floor is above what matters, or if a pass is taken up before its step ends."""
    standard, x = Standardise(16), draw()
    for part in x.split(32):
        standard.collect(part)
        assert smallest_cosine(standard(x)) > 0.999
    standard.update()
    assert torch.allclose(standard(x).mean(0), torch.zeros(16), atol=0.05)
    assert torch.allclose(standard(x).std(0), torch.ones(16), atol=0.2)
    assert smallest_cosine(standard(x)) < -0.2


def test_it_follows_a_network_that_moves():
    standard, x = Standardise(16), draw()
    for step in range(60):
        standard.collect(x + step // 20)
        standard.update()
    assert torch.allclose(standard(x + 2).mean(0), torch.zeros(16), atol=1.0)


def test_a_feature_that_never_varies_stays_finite_and_small():
    standard, x = Standardise(16), torch.full((8, 16), 300.0)
    standard.collect(x)
    standard.update()
    assert standard(x[:2]).abs().max() < 1
    standard.collect(x * 0)
    standard.update()
    assert torch.isfinite(standard(x * 0)).all()


def test_half_precision_around_it_changes_nothing():
    """Fails if moments are rounded: the variance is their difference, and smaller than the rounding."""
    exact, under, x = Standardise(16), Standardise(16), draw()
    for standard, half in ((exact, False), (under, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            standard.collect(x)
            standard.update()
    assert torch.equal(under(x), exact(x))
