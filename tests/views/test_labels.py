"""Label maps in views: they are moved as the image is, and never mixed."""

import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.crops import place_pair
from nnssl_ext.views.labels import NOTHING, labels_in_view, labels_of_other_view, nearest_labels
from nnssl_ext.views.spatial import SpatialConfig, draw_transform
from nnssl_ext.views.transform import apply_transform

CROPS = {(10, 14, 8): (16, 20, 12), (14, 10): (20, 16)}
MOVES = SpatialConfig(flip=0.5, rotation=1.0, scaling=1.0)


def numbered(crop: tuple[int, ...], rows: int = 3) -> torch.Tensor:
    """Every voxel has a label of its own."""
    return torch.arange(torch.tensor(crop).prod()).view(1, 1, *crop).expand(rows, -1, *[-1] * len(crop))


def test_labels_move_as_the_image_does():
    """The label at a voxel of a view is that of the voxel whose coordinates the image shows there, to half a voxel.

    Catches labels that stay where they are, axes or flips mixed up, and neighbours that are mixed.
    """
    for size, crop in CROPS.items():
        random = SampleRandom(3, 1, (4, 5, 6))
        valid = torch.ones(3, 1, *crop, dtype=torch.bool)
        where = draw_transform(valid, torch.ones(3, len(size)), random, MOVES, size)
        grid = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in crop), indexing="ij"))
        view = apply_transform(grid.expand(3, *grid.shape), valid, where)
        labels = labels_in_view(numbered(crop), where)
        assert (labels[view.valid] != NOTHING).all()
        places = torch.stack(torch.unravel_index(labels.clamp(min=0)[:, 0], crop), 1)
        distance = (places - view.data).abs() * view.valid
        assert distance.max() <= 0.5 + 1e-3
        assert view.valid.float().mean() > 0.3


def test_labels_of_another_view_lie_where_both_show_the_same():
    """Catches the other view's labels taken where they are, and the two views confused."""
    for size, crop in CROPS.items():
        random, spacing = SampleRandom(0, 0, (1, 2, 3)), torch.ones(3, len(size))
        valid = torch.ones(3, 1, *crop, dtype=torch.bool)
        pair = place_pair(valid, spacing, random, (0.6, 1.0), size, SpatialConfig(rotation=1.0, scaling=0), 0.3)
        grid = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in crop), indexing="ij"))
        first, second = (apply_transform(grid.expand(3, *grid.shape), valid, place).data for place in pair)
        found = labels_of_other_view(numbered(size), pair[1], pair[0])
        there = found != NOTHING
        assert 0.2 < there.float().mean() < 1
        seen = second.flatten(2).gather(2, found.clamp(min=0).flatten(2).expand(-1, len(size), -1)).view_as(first)
        step = pair[1].matrix.abs().sum(2).amax() / 2
        assert ((seen - first).abs() * there).max() <= step + 1e-3


def test_beyond_the_crop_there_is_nothing():
    labels = torch.tensor([[[5, 6, 7]]])
    places = torch.tensor([[[-0.51, -0.49, 0.49, 0.51, 2.49, 2.51]]])
    assert nearest_labels(labels, places).tolist() == [[[NOTHING, 5, 5, 6, 7, NOTHING]]]
