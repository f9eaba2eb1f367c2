"""Cells and boxes: where they lie, that they share no voxel, and that faces do not tell which ones are neighbours."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.cells import (
    BOX_INTENSITY,
    Boxes,
    box_size,
    boxes_in_cells,
    changed_boxes,
    grid_cells,
    overlaps,
    resample_boxes,
)
from nnssl_ext.views.intensity import intensity_view

RANDOM = SampleRandom(seed=0, step=0, samples=(3, 4))


def everything(*shape: int, num: int = 2) -> torch.Tensor:
    return torch.ones(num, 1, *shape, dtype=torch.bool)


@pytest.mark.parametrize("edge", [127, 49, 31, 13, 4])
def test_boxes_lie_in_their_cells_and_keep_the_gap(edge):
    """At 42 voxels a cell the published figures: edges of 36, offsets from 1 to 5, so a gap of 2 or more.

    Catches boxes that may touch, and cells of few voxels whose boxes have no room to move or no voxels left.
    """
    random = SampleRandom(seed=0, step=0, samples=tuple(range(200)))
    cells = grid_cells(everything(edge, edge, num=200), (3, 3))
    boxes = boxes_in_cells(cells, random)
    cell = (edge - 1) / 3
    offsets = boxes.lower - cells.lower
    gap = min(2.0, cell / 4)
    assert boxes.edges.unique().item() == pytest.approx(min(6 / 7 * cell, max(cell - 4, cell / 2)))
    assert offsets.min().item() == pytest.approx(gap / 2, abs=0.02 * cell)
    assert (offsets + boxes.edges).max().item() == pytest.approx(cell - gap / 2, abs=0.02 * cell)
    assert offsets.std() > 0.2 * gap
    if edge == 127:
        assert boxes.edges.unique().item() == pytest.approx(36)
        assert (offsets.min().item(), offsets.max().item()) == pytest.approx((1, 5), abs=0.05)


def test_no_voxel_enters_two_boxes_and_padding_none():
    """Catches boxes that overlap by what is interpolated at their faces, and cells that reach into padding."""
    valid = everything(30, 27)
    valid[:, :, :3] = valid[:, :, :, 22:] = False
    data = torch.randn(2, 1, 30, 27, generator=torch.Generator().manual_seed(0)).masked_fill(~valid, math.nan)
    data.requires_grad_()
    boxes = boxes_in_cells(grid_cells(valid, (3, 2)), RANDOM)
    sampled = resample_boxes(data, valid, boxes, (16, 16)).unflatten(0, (2, 6))
    seen = torch.stack(
        [torch.autograd.grad(sampled[:, number].sum(), data, retain_graph=True)[0] for number in range(6)]
    )
    assert sampled.isfinite().all()
    assert (seen != 0).sum(0).max() == 1
    assert not (seen != 0).any(0)[~valid].any()


@pytest.mark.parametrize("shape", [(20, 14, 11), (20, 14)], ids=["3d", "2d"])
def test_boxes_show_what_lies_there(shape):
    """Every channel is a coordinate. Catches swapped axes, boxes in another order, and a shift of half a voxel."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in shape), indexing="ij"))
    data, dims = grid.expand(2, *grid.shape), len(shape)
    boxes = boxes_in_cells(grid_cells(everything(*shape), (2, 3, 1)[:dims]), RANDOM)
    sampled = resample_boxes(data, everything(*shape), boxes, (4, 6, 8)[:dims]).unflatten(0, (2, -1))
    for axis, edge in enumerate((4, 6, 8)[:dims]):
        steps = (torch.arange(edge) + 0.5) / edge
        expected = boxes.lower[:, :, axis, None] + boxes.edges[:, :, axis, None] * steps - 0.5
        shown = sampled[:, :, axis].movedim(axis + 2, -1).flatten(2, -2)
        torch.testing.assert_close(shown, expected.unsqueeze(2).expand_as(shown), atol=1e-3, rtol=1e-4)


def test_brightness_and_contrast_are_those_of_every_box():
    """With factors that are known they are those of `intensity_view`, box by box, with padding and altered voxels.

    Catches a mean or range of the whole crop or of padding, factors that boxes or channels share, and draws that depend
    on the rest of the batch.
    """
    valid = everything(24, 21)
    valid[1, :, :5] = valid[:, :, 10:12, 3:6] = False
    data = torch.randn(2, 2, 24, 21, generator=torch.Generator().manual_seed(0)) + 1
    boxes = boxes_in_cells(grid_cells(valid, (2, 3)), RANDOM)
    each = replace(BOX_INTENSITY, noise=0, gamma=0, inverted_gamma=0)
    fixed = replace(each, brightness_range=(0.8, 0.8), contrast_range=(1.4, 1.4))
    plain, real = (resample_boxes(seen, valid, boxes, (8, 8)) for seen in (data, torch.ones_like(data)))
    expected = intensity_view(plain, real[:, :1] > 0, replace(RANDOM, samples=tuple(range(12))), fixed)
    torch.testing.assert_close(changed_boxes(data, valid, boxes, (8, 8), RANDOM, fixed), expected)
    flat = changed_boxes(torch.ones_like(data), valid, boxes, (8, 8), RANDOM, each)
    factors = flat.flatten(2).amax(2)
    assert len(factors.unique()) == 2 * 6 * 2
    assert 0.5 <= factors.min() < 0.75 < 1.25 < factors.max() <= 1.5
    alone = changed_boxes(
        data[1:], valid[1:], Boxes(boxes.lower[1:], boxes.edges[1:]), (8, 8), replace(RANDOM, samples=(4,)), each
    )
    torch.testing.assert_close(changed_boxes(data, valid, boxes, (8, 8), RANDOM, each)[6:], alone)


def test_altered_voxels_are_seen_as_nothing():
    valid = everything(24, 24)
    valid[:, :, 4:6, 4:6] = False
    data = torch.where(valid, 1.0, 1e4)
    sampled = resample_boxes(data, valid, boxes_in_cells(grid_cells(valid, (2, 2)), RANDOM), (8, 8))
    assert ((sampled == 0) | ((sampled - 1).abs() < 1e-5)).all()
    assert (sampled == 0).any()


def test_boxes_are_resampled_to_two_positions_or_more():
    """Catches boxes of which a deep network keeps one position, which instance normalisation makes 0."""
    assert box_size((126, 126, 48), (3, 3, 3), (16, 16, 8)) == [32, 32, 16]
    assert box_size((24, 240), (3, 3), (8, 8)) == [16, 72]


def test_overlaps_are_those_of_counted_voxels():
    """Boxes of whole voxels, drawn and counted. Cells tile, so what they share with a box sums to one.

    Catches shares of the wrong one of two boxes, and cells with seams between them.
    """
    generator = torch.Generator().manual_seed(0)
    cells = grid_cells(everything(13, 13, 5), (4, 4, 1))
    lower = torch.stack([torch.randint(0, edge, (2, 6), generator=generator) for edge in (9, 9, 1)], 2) + 0.5
    boxes = Boxes(lower, torch.tensor([3.0, 4.0, 4.0]).expand(2, 6, 3))
    found = overlaps(boxes, cells)

    def painted(each: Boxes, row: int, number: int) -> torch.Tensor:
        paint = torch.zeros(13, 13, 5)
        first = (each.lower[row, number] - 0.5).long()
        paint[tuple(slice(a, a + b) for a, b in zip(first, each.edges[row, number].long(), strict=True))] = 1
        return paint

    for row in range(2):
        for number in range(6):
            box = painted(boxes, row, number)
            shares = [float((box * painted(cells, row, cell)).sum() / box.sum()) for cell in range(16)]
            assert found[row, number].tolist() == pytest.approx(shares, abs=1e-5)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 6))


def told_by_faces(boxes: Boxes, images: torch.Tensor) -> float:
    """How often the faces of the middle box and of a neighbour tell on which of four sides the neighbour lies."""
    sampled = resample_boxes(images, torch.ones_like(images, dtype=torch.bool), boxes, (36, 36))[:, 0]
    top, left, middle, right, bottom = sampled.unflatten(0, (-1, 9))[:, [1, 3, 4, 5, 7]].unbind(1)
    hits = []
    for truth, other in enumerate((top, left, right, bottom)):
        faces = [
            (other[:, -1], middle[:, 0]),
            (other[:, :, -1], middle[:, :, 0]),
            (other[:, :, 0], middle[:, :, -1]),
            (other[:, 0], middle[:, -1]),
        ]
        errors = torch.stack([(a - b).square().mean(1) for a, b in faces], 1)
        hits.append((errors.argmin(1) == truth).float().mean())
    return float(torch.stack(hits).mean())


def smooth_noise(num: int, edge: int, sigma: float) -> torch.Tensor:
    """White noise under a Gaussian, with the same mean and variance in every image."""
    reach = torch.arange(-3 * math.ceil(sigma), 3 * math.ceil(sigma) + 1)
    weight = torch.exp(-(reach**2) / (2 * sigma**2))
    margin = len(reach) - 1
    noise = torch.randn(num, 1, edge + margin, edge + margin, generator=torch.Generator().manual_seed(0))
    noise = functional.conv2d(functional.conv2d(noise, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True)


def test_faces_tell_neighbours_where_cells_touch_and_hardly_where_they_do_not():
    """The shortcut of all tasks on cells, on noise as smooth as the gap is wide, without training: there is nothing to
    be known of, so only faces can tell. Chance is 1/4.

    Catches cells that touch (faces tell always), and a gap of the same width without boxes that move in their cells
    (they tell .7). What is left is at most a tenth above chance; on noise of half that width, nothing.
    """
    random = SampleRandom(seed=0, step=0, samples=tuple(range(80)))
    cells = grid_cells(everything(127, 127, num=80), (3, 3))
    boxes = boxes_in_cells(cells, random)
    smooth = smooth_noise(80, 127, sigma=2)
    assert told_by_faces(cells, smooth) > 0.95
    assert told_by_faces(Boxes(cells.lower + 1, cells.edges - 2), smooth) > 0.5
    assert told_by_faces(boxes, smooth) < 0.35
    assert told_by_faces(boxes, smooth_noise(80, 127, sigma=1)) == pytest.approx(0.25, abs=0.06)
