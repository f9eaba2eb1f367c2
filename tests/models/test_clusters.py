"""Gaussian scales know the real voxels alone; clusters are found where they were planted, and then do not move."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl_ext.models.cluster_model import ClusterModel
from nnssl_ext.models.clusters import Clusters
from nnssl_ext.models.gaussian_scales import SIGMAS, GaussianScales


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def everywhere(image: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(image), 1, *image.shape[2:], dtype=torch.bool)


@pytest.mark.parametrize("size", [(9, 14, 11), (9, 14)], ids=["3d", "2d"])
def test_scales_are_those_of_scipy(size):
    """Catches a Gaussian of another width, axes left out, channels mixed, and borders that darken."""
    image = noise(2, 2, *size)
    found = GaussianScales(len(size), 2)(image, everywhere(image))
    assert found.shape == (2, 16, *size)
    mass = np.ones(size)
    for channel in range(2):
        one = image[1, channel].double().numpy()
        for number, sigma in enumerate(SIGMAS):
            options = {"sigma": sigma, "mode": "constant", "truncate": 3}
            smooth = ndimage.gaussian_filter(one, **options) / ndimage.gaussian_filter(mass, **options)
            steep = np.sqrt(sum(slope**2 for slope in np.gradient(smooth)))
            assert np.allclose(found[1, 2 * number + channel], smooth, atol=1e-5)
            assert np.allclose(found[1, 8 + 2 * number + channel], steep, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 12, 9), (7, 12)], ids=["3d", "2d"])
def test_padding_is_like_the_border_of_the_image(size):
    """Rubbish around a volume changes nothing in it. Catches padding in a Gaussian, in its mass, and in a slope."""
    scales, image = GaussianScales(len(size), 1), noise(1, 1, *size)
    expected = scales(image, everywhere(image))
    wide = torch.full((1, 1, *(edge + 6 for edge in size)), 1e4)
    inside = (..., *(slice(3, 3 + edge) for edge in size))
    wide[inside] = image
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[inside] = True
    found = scales(wide, valid)
    torch.testing.assert_close(found[inside], expected)
    assert not found.masked_fill(valid.expand_as(found), 0).any()


def test_what_lies_beyond_the_reach_is_not_missed():
    """A crop with that margin has the whole image's features. Catches a reach that is too short by a voxel."""
    scales, image = GaussianScales(2, 1), noise(1, 1, 60, 50)
    whole = scales(image, everywhere(image))
    crop = image[:, :, 5:, 2:]
    part = scales(crop, everywhere(crop))
    reach = scales.reach
    torch.testing.assert_close(part[:, :, reach:, reach:], whole[:, :, 5 + reach :, 2 + reach :])
    assert not torch.allclose(part[:, :, reach - 1 :, reach - 1 :], whole[:, :, 4 + reach :, 1 + reach :], atol=1e-6)


def planted(number: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three Gaussians of unlike sizes in five features of very unlike scales, and which one each point is of."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, size=number, p=[0.2, 0.5, 0.3])
    middles = np.random.default_rng(7).normal(size=(3, 5))
    points = (middles[kinds] + 0.02 * rng.normal(size=(number, 5))) * [1, 100, 1, 0.01, 1] + 3
    return torch.from_numpy(points).float(), torch.from_numpy(kinds)


def fitted(seed: int = 0, **settings) -> Clusters:
    clusters = Clusters(5, 3, **settings)
    clusters.fit(planted()[0], seed)
    return clusters


def test_planted_gaussians_are_found_in_points_that_were_not_fitted():
    """Catches features that are not standardised (one has 100 times the others' scale), points that are projected
    otherwise than the sample, sizes in another order than the centroids, and an axis of space taken for features."""
    points, kinds = planted(seed=1)
    shares = torch.bincount(planted()[1], minlength=3)[[1, 2, 0]] / 600
    for seed in range(4):
        clusters = fitted(seed)
        labels = clusters(points.T.reshape(1, 5, 20, 30))
        assert labels.shape == (1, 1, 20, 30)
        pairs = set(zip(labels.flatten().tolist(), kinds.tolist(), strict=True))
        assert pairs == {(0, 1), (1, 2), (2, 0)}
        torch.testing.assert_close(clusters.shares, shares)


def test_the_nearest_centroid_by_plain_loops():
    """In three of five components, of points between the clusters. Catches a distance without the centroids' length."""
    clusters = fitted(num_components=3)
    points = noise(1, 5, 40) * clusters.deviation[:, None] + clusters.mean[:, None]
    labels = clusters(points)[0, 0]
    assert len(labels.unique()) == 3
    for place in range(40):
        standard = (points[0, :, place] - clusters.mean) / clusters.deviation
        distances = [(clusters.components @ standard - centroid).norm() for centroid in clusters.centroids]
        assert labels[place] == int(torch.stack(distances).argmin())


def test_components_are_those_of_largest_variance():
    clusters = fitted(num_components=2)
    standard = (planted()[0] - clusters.mean) / clusters.deviation
    expected = torch.linalg.svd(standard, full_matrices=False)[1][:2].square()
    torch.testing.assert_close((standard @ clusters.components.T).square().sum(0), expected, rtol=1e-4, atol=1e-3)


def test_no_batch_moves_a_centroid():
    """Catches k-means that is begun anew, or goes on, with the batch in hand: then the order of batches, and what else
    is in one, would change labels."""
    model = ClusterModel(GaussianScales(2, 1), Clusters(8, 4))
    model.clusters.fit(noise(300, 8), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = 3 * noise(3, 1, 12, 10)
    valid = everywhere(images)
    together = model.train()(images, valid)
    alone = [model(images[row : row + 1], valid[:1]) for row in (2, 0, 1)]
    assert torch.equal(torch.cat([alone[1], alone[2], alone[0]]), together)
    assert len(together.unique()) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = Clusters(8, 4)
    again.fit(noise(300, 8), seed=0)
    assert torch.equal(again.centroids, model.clusters.centroids)


def test_too_few_different_places_are_refused():
    with pytest.raises(ValueError, match="3 clusters of 2 different foreground voxels"):
        Clusters(5, 3).fit(torch.eye(2, 5).repeat(10, 1), seed=0)
