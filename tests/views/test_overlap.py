"""What two views have in common, and pairs of crops that have much in common."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.crops import place_pair
from nnssl_ext.views.overlap import shown_by
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.transform import SpatialTransform

BATCH = 40
RANDOM = SampleRandom(2, 1, tuple(range(BATCH)))


def view(scale: float, centre: tuple[float, float], turn: bool = False) -> SpatialTransform:
    matrix = torch.tensor([[0.0, -1.0], [1.0, 0.0]] if turn else [[1.0, 0.0], [0.0, 1.0]])
    return SpatialTransform((4, 6), scale * matrix[None], torch.tensor([centre]))


def test_shown_voxels_are_those_computed_by_hand():
    """A view of 4x6 voxels about (10, 10) looks at rows 8.5 to 11.5 and columns 7.5 to 12.5, and covers half a voxel
    more. Catches an offset of half a voxel, swapped axes, and a matrix that is not inverted."""
    whole = view(1, (10, 10))
    assert shown_by(whole, whole).all()
    shifted = shown_by(view(1, (12, 11)), whole)[0, 0]  # rows from 10, columns from 8
    assert shifted.tolist() == [[False] * 6] * 2 + [[False, *[True] * 5]] * 2
    small = shown_by(view(0.5, (10, 10)), whole)[0, 0]  # rows 9 to 11, columns 8.5 to 11.5
    assert small.tolist() == [[False] * 6, *[[False, True, True, True, True, False]] * 2, [False] * 6]
    turned = shown_by(view(1, (10, 10), turn=True), whole)[0, 0]  # rows 7 to 13, columns 8 to 12
    assert turned.tolist() == [[False, True, True, True, True, False]] * 4


@pytest.mark.parametrize("shape", [(24, 30, 20), (26, 33), (40, 9)])
@pytest.mark.parametrize("rotation", [0, 1])
def test_pairs_overlap_inside_the_real_voxels(shape, rotation):
    """However thin the volume, and however far a rotation shrinks a view. Catches two places drawn on their own."""
    valid = torch.ones(BATCH, 1, *shape, dtype=torch.bool)
    valid[: BATCH // 2, :, :5] = False
    spacing = torch.tensor((2.0, 1.0, 1.0)[: len(shape)]).expand(BATCH, -1)
    config = SpatialConfig(flip=0, scaling=0, rotation=rotation, elastic=rotation)
    size = (12, 16, 10)[: len(shape)]
    pair = place_pair(valid, spacing, RANDOM, (0.6, 0.9), size, config, shift=0.25)
    boxes = []
    for transform in pair:
        place = transform.coordinates().flatten(2)
        low, high = place.amin(2), place.amax(2)
        assert (low[: BATCH // 2, 0] > 5 - 1e-3).all()
        assert (low > -1e-3).all()
        assert (high < torch.tensor(shape) - 1 + 1e-3).all()
        boxes.append((low, high))
    (low, high), (other_low, other_high) = boxes
    common = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    assert (common / torch.minimum(high - low, other_high - other_low) > 0.5).all()
    assert shown_by(pair[1], pair[0]).float().mean() > 0.4
    apart = (pair[0].centre - pair[1].centre).abs()
    assert (apart.amax(1) > 0.05).float().mean() > 0.9


def test_a_single_real_slice_is_shown_by_both():
    """Fails if the map of a flat view cannot be inverted: it took the run down."""
    valid = torch.zeros(BATCH, 1, 6, 30, 30, dtype=torch.bool)
    valid[:, :, 4] = True
    config = SpatialConfig(rotation=1)
    first, second = place_pair(valid, torch.ones(BATCH, 3), RANDOM, (0.6, 0.9), (4, 16, 16), config, shift=0.1)
    assert 0.3 < shown_by(second, first).float().mean() < 1
    assert shown_by(first, first).all()
    assert (first.coordinates()[:, 0] - 4).abs().max() < 1e-3


def test_a_pair_without_shift_lies_within_one_another():
    valid = torch.ones(BATCH, 1, 24, 30, dtype=torch.bool)
    pair = place_pair(valid, torch.ones(BATCH, 2), RANDOM, (0.3, 1.0), (8, 8))
    boxes = [(t.centre - 3.5 * t.matrix[:, 0, :1], t.centre + 3.5 * t.matrix[:, 0, :1]) for t in pair]
    (low, high), (other_low, other_high) = boxes
    first_larger = (high - low)[:, 0] > (other_high - other_low)[:, 0]
    assert 0.2 < first_larger.float().mean() < 0.8
    inside = (low - other_low) * torch.where(first_larger, -1, 1)[:, None]
    assert (inside > -1e-3).all()
    assert ((other_high - high) * torch.where(first_larger, -1, 1)[:, None] > -1e-3).all()


def test_a_pair_is_the_samples_own():
    valid = torch.ones(BATCH, 1, 24, 30, dtype=torch.bool)
    arguments = (0.4, 0.8), (8, 8), SpatialConfig(), 0.3
    whole = place_pair(valid, torch.ones(BATCH, 2), RANDOM, *arguments)
    part = place_pair(valid[5:9], torch.ones(4, 2), replace(RANDOM, samples=(5, 6, 7, 8)), *arguments)
    for all_rows, some in zip(whole, part, strict=True):
        torch.testing.assert_close(some.centre, all_rows.centre[5:9])
        torch.testing.assert_close(some.matrix, all_rows.matrix[5:9])


def test_refusals():
    valid = torch.ones(BATCH, 1, 24, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scale=\(0.8, 0.5\) must be two numbers in \(0, 1\]"):
        place_pair(valid, torch.ones(BATCH, 2), RANDOM, (0.8, 0.5), (8, 8))
