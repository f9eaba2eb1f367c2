"""Features of cells at voxels: along the edges of the image where that is asked for."""

from itertools import product

import torch

from nnssl_ext.models.upsampling import RANGE_SIGMA, SPATIAL_SIGMA, joint_bilateral, upsampled


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_joint_bilateral_filter_by_plain_loops():
    """Anisotropic cells, two channels. Catches cells beyond the map that count, axes mixed up, and a distance in
    voxels."""
    cells, image, stride = noise(1, 3, 3, 4), noise(1, 2, 6, 16), (2, 4)
    found = joint_bilateral(cells, image, stride)
    for row, column in product(range(6), range(16)):
        total, weights = torch.zeros(3), 0.0
        for i, j in product(range(3), range(4)):
            if abs(i - row // 2) <= 1 and abs(j - column // 4) <= 1:
                mean = image[0, :, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4].mean((1, 2))
                unlike = (image[0, :, row, column] - mean).square().mean() / RANGE_SIGMA**2
                away = ((row + 0.5) / 2 - 0.5 - i) ** 2 + ((column + 0.5) / 4 - 0.5 - j) ** 2
                weight = float(torch.exp(-(unlike + away / SPATIAL_SIGMA**2) / 2))
                total, weights = total + weight * cells[0, :, i, j], weights + weight
        torch.testing.assert_close(found[0, :, row, column], total / weights)


def test_borders_follow_the_image_in_3d():
    """The image's edge lies within a cell. Catches an upsampling that does not look at the image, as the linear one."""
    image = torch.full((1, 1, 8, 8, 24), -1.0)
    image[..., 10:] = 1
    cells = torch.nn.functional.avg_pool3d(image, 4)
    assert (upsampled(cells, image, (4, 4, 4), "bilateral") - image).abs().max() < 0.3
    assert (upsampled(cells, image, (4, 4, 4)) - image).abs().max() > 0.8
