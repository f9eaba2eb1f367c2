"""Windows tile a volume, and the features of a voxel are those of the upsampled maps of its window."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.windows import crop_window, features_at, scan, windows


class Pyramid(torch.nn.Module):
    """The image and its means over cells of 2 and 4."""

    channels = (1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        pool = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
        return [x, pool(x, 2), pool(x, 4)]


@dataclass(frozen=True)
class Patch:
    patch_size: tuple[int, ...]

    @property
    def dims(self) -> int:
        return len(self.patch_size)


def pyramid(*patch_size: int) -> Frozen:
    return Frozen(Pyramid(), None, Patch(patch_size))


@pytest.mark.parametrize("shape", [(35, 50, 35), (8, 8, 8), (5, 40, 3), (9, 17, 33)])
def test_windows_own_every_voxel_once_and_hold_what_they_own(shape):
    size = (8, 16, 8)
    count = torch.zeros(shape)
    for window in windows(shape, size):
        count[window.own] += 1
        for own, low, edge, full in zip(window.own, window.lower, size, shape, strict=True):
            assert low <= own.start < own.stop <= min(low + edge, full)
    assert (count == 1).all()


def test_neighbours_overlap_by_half_and_answer_for_their_middle():
    first, second, third = windows((16,), (8,))
    assert [window.lower for window in (first, second, third)] == [(0,), (4,), (8,)]
    assert [window.own[0] for window in (first, second, third)] == [slice(0, 6), slice(6, 10), slice(10, 16)]


def test_a_window_beyond_a_small_volume_ends_in_zeros():
    volume = torch.ones(2, 3, 9, 9)
    (window, *_) = windows((3, 9, 9), (4, 8, 8))
    crop = crop_window(volume, window, (4, 8, 8))
    assert crop.shape == (2, 4, 8, 8)
    assert (crop[:, :3] == 1).all()
    assert (crop[:, 3:] == 0).all()


@pytest.mark.parametrize("patch", [(8, 8, 4), (8, 4)], ids=["3d", "2d"])
def test_features_of_a_voxel_are_those_of_the_upsampled_maps_of_its_window(patch):
    """Fails where axes are swapped, or voxel centres are taken for corners (align_corners)."""
    frozen = pyramid(*patch)
    data = torch.randn(1, 11, 13, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(*data.shape[1:], 3)
    mode = "trilinear" if len(patch) == 3 else "bilinear"
    for window, maps in scan(frozen, data):
        upsampled = torch.cat([functional.interpolate(features, size=patch, mode=mode)[0] for features in maps])
        upsampled = upsampled.reshape(3, *(1,) * (3 - len(patch)), *patch)
        inside = tuple(slice(s.start - low, s.stop - low) for s, low in zip(window.own, window.lower, strict=True))
        expected[window.own] = upsampled[(slice(None), *inside)].movedim(0, -1)
    places = torch.cartesian_prod(*(torch.arange(n) for n in data.shape[1:]))
    found = features_at(frozen, data, places)
    assert torch.allclose(found, expected[tuple(places.T)], atol=1e-5)
    assert torch.allclose(found[:, 0], data.flatten(), atol=1e-5)
