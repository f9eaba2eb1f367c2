"""Views of one parent crop: their sizes, that they lie in the volume, and that they know where."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.multicrop import MultiCropConfig, enlarged, multi_crop, num_patches, view_sizes
from nnssl_ext.views.spatial import SpatialConfig

RANDOM = SampleRandom(seed=0, step=0, samples=(3, 4, 5))
ROUGH = SpatialConfig(rotation=1.0, scaling=1.0)
NOTHING = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)
CROPS = {"3d": (20, 28, 12), "2d": (28, 20)}


def ramps(crop: tuple[int, ...], spacing: float) -> Batch:
    """Every channel is a coordinate. The second crop is padded, the third is a few slices of a volume."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in crop), indexing="ij"))
    valid = torch.ones(3, 1, *crop, dtype=torch.bool)
    valid[1, :, :3] = False
    valid[1, ..., -4:] = False
    valid[2, :, 2:] = False
    millimetres = torch.ones(3, len(crop))
    millimetres[:, 0] = spacing
    lower = torch.zeros(3, len(crop), dtype=torch.int64)
    data = grid.expand(3, *grid.shape).masked_fill(~valid, -1e4)
    return Batch(data, valid, ("a", "b", "c"), RANDOM.samples, lower, millimetres)


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("spacing", [1.0, 3.0])
def test_views_lie_in_the_volume_and_know_where(crop, spacing):
    """Fails if padding is seen (it is far below every coordinate), or if a view misstates its place."""
    batch = ramps(crop, spacing)
    config = MultiCropConfig(num_locals=3, spatial=ROUGH, intensity=NOTHING)
    sizes = (tuple(edge - 4 for edge in crop), tuple(edge // 2 for edge in crop))
    large, small = multi_crop(batch, RANDOM, config, sizes, augment=True)
    assert (len(large), len(small)) == (2, 3)
    for views, size in ((large, sizes[0]), (small, sizes[1])):
        for view in views:
            assert view.data.shape == (3, len(crop), *size)
            assert view.valid.all()
            assert torch.allclose(view.data, view.transform.coordinates(), atol=1e-2)


def test_views_differ_and_local_ones_are_smaller():
    batch = ramps(CROPS["3d"], 1.0)
    config = MultiCropConfig(global_scale=(0.8, 1.0), local_scale=(0.2, 0.4))
    large, small = multi_crop(batch, RANDOM, config, ((16, 16, 8), (16, 16, 8)), augment=False)
    seen = [view.transform.matrix[0, 0, 0].item() for view in (*large, *small)]
    assert len(set(seen)) == 6
    assert max(seen[2:]) < 0.5 * min(seen[:2])
    again, _ = multi_crop(batch, RANDOM, config, ((16, 16, 8), (16, 16, 8)), augment=False)
    assert torch.equal(large[0].data, again[0].data)


def test_measured_intensities_keep_their_scale():
    """Fails if CT numbers are stretched: a voxel's value is then no longer its density."""
    batch = ramps(CROPS["3d"], 1.0)
    scales = dict.fromkeys(("brightness", "contrast", "gamma", "inverted_gamma"), 1.0)
    change = IntensityConfig(**{**vars(NOTHING), **scales})
    config = MultiCropConfig(num_locals=0, spatial=SpatialConfig(flip=0, rotation=0, scaling=0), intensity=change)
    kept, changed = (
        multi_crop(batch, RANDOM, config.suited_to([scheme]), ((16, 16, 8), ()), augment=True)[0][0]
        for scheme in ("CTNormalization", "ZScoreNormalization")
    )
    assert torch.allclose(kept.data, kept.transform.coordinates(), atol=1e-2)
    assert not torch.allclose(changed.data, kept.data, atol=1.0)


@pytest.mark.parametrize(
    ("patch", "stride", "local"),
    [
        ((96, 96, 96), (8, 8, 8), (48, 48, 48)),
        ((160, 160, 160), (32, 32, 32), (96, 96, 96)),
        ((40, 56, 40), (8, 8, 8), (24, 32, 24)),
        ((16, 24, 8), (4, 4, 4), (8, 16, 8)),
        ((192, 192, 192), (32, 32, 32), (128, 128, 128)),
        ((20, 256, 256), (1, 32, 32), (10, 128, 128)),
        ((24, 16), (4, 4), (16, 8)),
    ],
)
def test_local_views_are_half_a_global_one_in_whole_strides(patch, stride, local):
    """And at least four positions along axes where a global view has six, else two."""
    assert view_sizes(MultiCropConfig(), patch, stride) == (patch, local)


def test_larger_views_are_whole_strides_and_what_they_cost_is_counted():
    assert enlarged((40, 56, 8), (8, 8, 8), 4 / 3) == (56, 72, 8)
    assert enlarged((96, 96), (32, 32), 1.0) == (96, 96)
    config = MultiCropConfig(num_locals=8)
    assert num_patches(config, 2, (32, 32, 32), (4, 4, 4)) == 2 + 8 / 8
    assert num_patches(config, 3, (32, 32, 32), (4, 4, 4), scale=1.5) == 3 * 1.5**3 + 8 / 8


@pytest.mark.parametrize("size", [(18, 24, 8), (16, 24), (4, 4, 4)])
def test_sizes_that_leave_no_features_are_refused(size):
    with pytest.raises(ValueError, match=r"local_size=.* --set crops.local_size"):
        view_sizes(MultiCropConfig(local_size=size), (16, 24, 8), (4, 8, 4))


@pytest.mark.parametrize("settings", [{"parent_scale": 0.5}, {"num_locals": -1}, {"global_scale": (0.5, 1.5)}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MultiCropConfig(**settings)
