"""Views run on the device of their input. The meta device stands in for a GPU: it refuses operands on the CPU."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.crops import centre_view, random_crop
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.spatial import SpatialConfig, spatial_view

RANDOM = SampleRandom(0, 0, (0, 1, 2))
SHAPES = [(10, 12, 8), (14, 9)]
EVERYTHING = IntensityConfig(noise=0, blur=1, brightness=1, contrast=1, low_resolution=1, gamma=1, inverted_gamma=1)


def crops(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 2, *shape, generator=generator).to(device)
    valid = torch.ones(3, 1, *shape, dtype=torch.bool)
    valid[0, :, :3] = False
    return data, valid.to(device), torch.ones(3, len(shape), device=device)


def every_view(shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    data, valid, spacing = crops(shape, device)
    size = tuple(edge - 3 for edge in shape)
    views = [
        spatial_view(data, valid, spacing, RANDOM, SpatialConfig(rotation=0.5, scaling=0.5, elastic=0.5), size),
        spatial_view(data, valid, spacing, RANDOM, SpatialConfig(rotation=1, elastic=1, inside=True)),
        spatial_view(data, valid, spacing, RANDOM, SpatialConfig(rotation=0, scaling=0)),
        random_crop(data, valid, spacing, RANDOM, (0.3, 0.9), size),
        centre_view(data, valid, size),
    ]
    changed = intensity_view(data, valid, RANDOM, EVERYTHING)
    mask = block_mask(RANDOM, shape, 4, 0.6, valid=valid)
    return [*(view.data for view in views), *(view.valid for view in views), changed, mask]


@pytest.mark.parametrize("shape", SHAPES)
def test_views_stay_on_the_device_of_their_input_and_never_wait_for_it(shape: tuple[int, ...]) -> None:
    """A value of a meta tensor cannot be read, as reading one from a GPU would stop the training."""
    for result, expected in zip(every_view(shape, "meta"), every_view(shape, "cpu"), strict=True):
        assert result.device.type == "meta"
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_gives_what_the_cpu_gives(shape: tuple[int, ...]) -> None:
    for result, expected in zip(every_view(shape, "cuda"), every_view(shape, "cpu"), strict=True):
        torch.testing.assert_close(result.float().cpu(), expected.float(), atol=1e-3, rtol=1e-3)
