"""Shuffled windows: the voxels of a window stay its own, in every channel, and padding takes no part."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.shuffles import scattered_windows, shuffle_within, tiled_windows

RANDOM = SampleRandom(seed=1, step=2, samples=(4, 5))
SHAPES = [(10, 12, 8), (14, 9)]


@pytest.fixture(params=SHAPES, ids=["3d", "2d"])
def shape(request) -> tuple[int, ...]:
    return request.param


def crops(shape: tuple[int, ...], channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops in which every voxel has a value of its own; the second is padded by 3 along the first axis."""
    data = torch.arange(2 * channels * torch.Size(shape).numel(), dtype=torch.float32).view(2, channels, *shape)
    valid = torch.ones(2, 1, *shape, dtype=torch.bool)
    valid[1, :, -3:] = False
    return data, valid


def windows_of(kind: str, valid: torch.Tensor) -> torch.Tensor:
    if kind == "tiled":
        return tiled_windows(RANDOM, valid, (3, 4, 2)[: valid.dim() - 2])
    return scattered_windows(RANDOM, valid, number=4, edge=4)


@pytest.mark.parametrize("kind", ["tiled", "scattered"])
def test_each_window_keeps_its_voxels_in_every_channel(shape, kind):
    """Catches voxels that cross windows, are lost or doubled, and channels that are filled from the first one."""
    data, valid = crops(shape, channels=2)
    windows = windows_of(kind, valid)
    shuffled = shuffle_within(data, windows, RANDOM)
    for row in range(2):
        for window in windows[row].unique():
            inside = windows[row, 0] == window
            before, after = data[row][:, inside], shuffled[row][:, inside]
            if window < 0:
                assert torch.equal(before, after)
            assert torch.equal(before.sort(1).values, after.sort(1).values)
    assert (shuffled != data)[windows.expand_as(data) >= 0].float().mean() > 0.2
    assert torch.equal(shuffled[:, 1] - shuffled[:, 0], data[:, 1] - data[:, 0])


@pytest.mark.parametrize("kind", ["tiled", "scattered"])
def test_padding_is_in_no_window(shape, kind):
    """Catches values of padding that are carried into the image."""
    _, valid = crops(shape)
    assert (windows_of(kind, valid)[~valid] < 0).all()


def test_tiles_are_boxes_of_all_edges_up_to_the_longest():
    random = SampleRandom(seed=0, step=0, samples=tuple(range(20)))
    edges = []
    for windows in tiled_windows(random, torch.ones(20, 1, 10, 12, 8, dtype=torch.bool), (3, 4, 2))[:, 0]:
        for window in windows.unique():
            where = (windows == window).nonzero()
            extent = where.amax(0) - where.amin(0) + 1
            assert extent.prod() == len(where)
            edges.append(extent)
    assert [axis.unique().tolist() for axis in torch.stack(edges).unbind(1)] == [[1, 2, 3], [1, 2, 3, 4], [1, 2]]


def test_all_orders_of_a_window_are_equally_likely():
    """Catches cyclic shifts and keys that favour an order: 3 voxels have 6 orders, 166 or so of 1000 draws each."""
    samples = tuple(range(1000))
    data = torch.arange(3.0).expand(1000, 1, 1, 3)
    shuffled = shuffle_within(data, torch.zeros(1000, 1, 1, 3, dtype=torch.int64), SampleRandom(0, 0, samples))
    orders, counts = shuffled.flatten(1).unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 120
    assert counts.max() < 215


def test_rows_are_shuffled_by_their_own_draws():
    data, valid = crops((14, 9))
    whole = shuffle_within(data, tiled_windows(RANDOM, valid, (3, 3)), RANDOM)
    alone = SampleRandom(seed=1, step=2, samples=(5,))
    assert torch.equal(shuffle_within(data[1:], tiled_windows(alone, valid[1:], (3, 3)), alone), whole[1:])
