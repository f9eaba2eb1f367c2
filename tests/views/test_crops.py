from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.crops import centre_view, random_crop
from nnssl_ext.views.spatial import SpatialConfig

BATCH = 40
RANDOM = SampleRandom(2, 1, tuple(range(BATCH)))
CROPS = [(24, 30, 20), (26, 33)]


def crops(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data = torch.randn(BATCH, 1, *shape, generator=torch.Generator().manual_seed(0))
    return data, torch.ones(BATCH, 1, *shape, dtype=torch.bool), torch.ones(BATCH, len(shape))


@pytest.mark.parametrize("shape", CROPS)
@pytest.mark.parametrize("margin", [0, 3, 4])
def test_centre_view_is_the_middle_of_the_crop(shape, margin: int) -> None:
    data, valid, _ = crops(shape)
    size = tuple(edge - 2 * margin - 1 for edge in shape)
    view = centre_view(data, valid, size)
    middle = (slice(None), slice(None), *[slice(margin, margin + edge) for edge in size])
    assert torch.equal(view.data, data[middle])
    assert view.valid.all()


@pytest.mark.parametrize("shape", CROPS)
def test_centre_view_of_the_whole_crop_keeps_its_padding(shape) -> None:
    data, valid, _ = crops(shape)
    valid[3, :, :7] = False
    view = centre_view(data, valid, shape)
    assert torch.equal(view.valid, valid)
    torch.testing.assert_close(view.data, data * valid, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", CROPS)
def test_random_crops_lie_in_the_real_voxels_at_random_scales_and_places(shape) -> None:
    data, valid, mm = crops(shape)
    valid[: BATCH // 2, :, :6] = False
    size = (8,) * len(shape)
    view = random_crop(data, valid, mm, RANDOM, (0.4, 1.0), size)
    assert view.data.shape == (BATCH, 1, *size)
    assert view.valid.all()
    edges = view.transform.matrix[:, 0, 0] * 7
    fits = torch.tensor([[edge - 1 for edge in shape]]).repeat(BATCH, 1)
    fits[: BATCH // 2, 0] -= 6
    share = edges / fits.amin(1)
    assert ((share >= 0.4 - 1e-4) & (share <= 1 + 1e-4)).all()
    assert share.std() > 0.1
    start = view.transform.centre - edges[:, None] / 2
    place = (start[BATCH // 2 :]) / (fits[BATCH // 2 :] - edges[BATCH // 2 :, None])
    assert ((place > -1e-4) & (place < 1 + 1e-4)).all()
    assert place[:, -1].std() > 0.2


def test_rotated_crops_stay_inside() -> None:
    data, valid, mm = crops(CROPS[0])
    valid[::2, ..., :4] = False
    config = SpatialConfig(rotation=1, scaling=0, flip=0.5)
    assert random_crop(data, valid, mm, RANDOM, (0.3, 0.9), (12, 12, 8), config).valid.all()


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_rotated_crops_of_a_slab_stay_inside_and_show_something(slices: int) -> None:
    """Fails if a crop that may not shrink further sticks out, or if one of a single slice shows one point of it."""
    data, valid, mm = crops((6, 54, 54))
    valid[:, :, slices:] = False
    config = SpatialConfig(rotation=1, scaling=1, elastic=0.5)
    view = random_crop(data, valid, mm, RANDOM, (0.3, 0.9), (4, 40, 40), config)
    assert view.valid.all()
    assert (view.data.flatten(1).std(1) > 0.1).all()


def test_a_crop_that_fits_is_rotated() -> None:
    """Fails if the way out of slabs is taken everywhere."""
    data, valid, mm = crops(CROPS[1])
    matrix = random_crop(data, valid, mm, RANDOM, (0.3, 0.9), (8, 8), SpatialConfig(rotation=1)).transform.matrix
    assert (matrix[:, 0, 1].abs() > 1e-3).float().mean() > 0.9


def test_two_children_give_two_crops() -> None:
    data, valid, mm = crops(CROPS[1])
    views = [random_crop(data, valid, mm, RANDOM.child(name), (0.4, 0.8), (8, 8)) for name in ("one", "two")]
    assert ((views[0].transform.centre - views[1].transform.centre).abs().amax(1) > 0.1).float().mean() > 0.9
    again = random_crop(data, valid, mm, RANDOM.child("one"), (0.4, 0.8), (8, 8))
    assert torch.equal(again.data, views[0].data)


def test_a_sample_has_its_crop_whatever_batch_it_is_in() -> None:
    data, valid, mm = crops(CROPS[1])
    whole = random_crop(data, valid, mm, RANDOM, (0.4, 0.8), (8, 8)).data
    part = random_crop(data[5:9], valid[5:9], mm[5:9], replace(RANDOM, samples=(5, 6, 7, 8)), (0.4, 0.8), (8, 8)).data
    torch.testing.assert_close(part, whole[5:9])


@pytest.mark.parametrize("scale", [(0.0, 0.5), (0.8, 0.5), (0.5, 1.2)])
def test_refusals(scale: tuple[float, float]) -> None:
    data, valid, mm = crops(CROPS[1])
    with pytest.raises(ValueError, match=r"scale=.* must be two numbers in \(0, 1\]"):
        random_crop(data, valid, mm, RANDOM, scale, (8, 8))
