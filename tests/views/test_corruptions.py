"""Boxes and curves against slow versions, and what damage may not touch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.corruptions import (
    bend_intensities,
    bezier,
    cut_out,
    fill_with_noise,
    on_rows,
    paint_boxes,
    usual_range,
)

SHAPES = [(10, 12, 8), (14, 9)]
RANDOM = SampleRandom(seed=1, step=2, samples=(4, 5, 6))


@pytest.fixture(params=SHAPES, ids=["3d", "2d"])
def shape(request) -> tuple[int, ...]:
    return request.param


def z_scored(shape: tuple[int, ...], channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Three crops, the second one padded before the last axis, the third one after the first axis."""
    data = torch.randn(3, channels, *shape, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 1, *shape, dtype=torch.bool)
    valid[1, ..., :3] = False
    valid[2, :, -3:] = False
    return data, valid


def corners(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    where = mask.nonzero()
    return where.amin(0), where.amax(0)


def test_a_single_box_is_solid_of_the_wanted_size_and_inside_of_what_is_real(shape):
    """Catches edges in the wrong axis order and boxes that reach into padding."""
    _, valid = z_scored(shape)
    sides = [(0.5, 0.5), (0.25, 0.4), (0.125, 0.125)][: len(shape)]
    painted = paint_boxes(RANDOM, valid, (1, 1), sides)
    assert painted.dtype == torch.int64
    for box, real in zip(painted[:, 0], valid[:, 0], strict=True):
        first, last = corners(box == 1)
        edges = (last - first + 1).tolist()
        assert (box == 1).sum() == np.prod(edges)
        assert real[box == 1].all()
        for edge, (low, high), size in zip(edges, sides, shape, strict=True):
            assert round(low * size) <= edge <= round(high * size)


def test_later_boxes_lie_over_earlier_ones(shape):
    """Catches boxes that keep what was painted first: the last one must be whole, and none before it lies over it."""
    _, valid = z_scored(shape)
    painted = paint_boxes(RANDOM, valid, (6, 6), [(0.3, 0.6)] * len(shape))
    for numbers in painted[:, 0]:
        first, last = corners(numbers == 6)
        assert (numbers == 6).sum() == (last - first + 1).prod()
        overlapped = [number for number in range(1, 6) if 0 < (numbers == number).sum() < _box_volume(numbers, number)]
        assert overlapped


def _box_volume(numbers: torch.Tensor, number: int) -> int:
    first, last = corners(numbers == number)
    return int((last - first + 1).prod())


def test_the_number_of_boxes_is_drawn_from_all_allowed():
    valid = torch.ones(200, 1, 40, 40, dtype=torch.bool)
    random = SampleRandom(seed=0, step=0, samples=tuple(range(200)))
    painted = paint_boxes(random, valid, (2, 4), [(0.02, 0.03)] * 2)
    assert sorted(painted.flatten(1).amax(1).unique().tolist()) == [2, 3, 4]


def test_boxes_reach_every_voxel_alike():
    """Catches places that leave out the far border."""
    random = SampleRandom(seed=0, step=0, samples=tuple(range(600)))
    painted = paint_boxes(
        random, torch.ones(600, 1, 6, dtype=torch.bool)[..., None].expand(-1, -1, -1, 6), (1, 1), [(0.16, 0.17)] * 2
    )
    share = (painted > 0).float().mean(0)[0]
    assert share.min() > 0.3 / 36
    assert share.max() < 2.5 / 36


def test_a_cut_out_takes_as_many_boxes_as_the_share_allows(shape):
    """Against a loop that takes boxes from the last to the first; padding does not count as hidden."""
    _, valid = z_scored(shape)
    sides = [(0.2, 0.5)] * len(shape)
    hidden = cut_out(RANDOM, valid, 0.3, 12, sides)
    painted = paint_boxes(RANDOM, valid, (12, 12), sides)
    for row in range(3):
        real = valid[row].sum().item()
        shares = [((painted[row] >= number) & valid[row]).sum().item() / real for number in range(1, 13)]
        wanted = next(number for number, share in enumerate(shares, start=1) if share <= 0.3)
        assert 1 < wanted <= 12
        assert torch.equal(hidden[row], painted[row] >= wanted)


def test_noise_fills_the_hidden_voxels_within_each_channels_usual_range(shape):
    data, valid = z_scored(shape)
    data[:, 1] = 100 + 10 * data[:, 1]
    data = torch.where(valid, data, 1e4)
    hidden = torch.zeros_like(valid)
    hidden[:, :, 2:6] = True
    filled = fill_with_noise(data, valid, hidden, RANDOM)
    assert torch.equal(filled.where(~hidden, 0), data.where(~hidden, 0))
    for row in range(3):
        for channel in range(2):
            noise = filled[row, channel][hidden[row, 0]]
            low, high = (end[row, channel] for end in usual_range(data, valid))
            assert low <= noise.min() < noise.max() <= high
            assert noise.std() > 0.2 * (high - low)


def test_only_chosen_rows_change_and_each_by_its_own_draws(shape):
    """Catches draws that depend on which other rows were chosen."""
    data, valid = z_scored(shape)
    data = data.masked_fill(~valid, 0)
    hidden = torch.ones_like(valid)

    def noise(rows, real, random):
        return fill_with_noise(rows, real, hidden[: len(rows)], random)

    chosen = np.array([True, False, True])
    some = on_rows(data, valid, RANDOM, chosen, noise)
    every = on_rows(data, valid, RANDOM, np.ones(3, dtype=bool), noise)
    assert torch.equal(some[1], data[1])
    assert torch.equal(some[chosen], every[chosen])
    assert not some.masked_fill(valid, 0).any()
    assert torch.equal(on_rows(data, valid, RANDOM, np.zeros(3, dtype=bool), noise), data)


def slow_bezier(x: float, controls: np.ndarray) -> float:
    """Solves x(t) = x for t by bisection, in float64."""
    low, high = 0.0, 1.0

    def along(t: float, axis: int) -> float:
        a, b = float(controls[0, axis]), float(controls[1, axis])
        return 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if along(middle, 0) < x else (low, middle)
    return along((low + high) / 2, 1)


def test_curve_equals_its_solution_by_bisection():
    random = np.random.default_rng(0)
    controls = random.uniform(0.1, 0.9, (5, 2, 2)).astype(np.float32)
    values = np.linspace(0, 1, 41, dtype=np.float32)
    found = bezier(torch.from_numpy(values).expand(5, -1), torch.from_numpy(controls))
    expected = [[slow_bezier(value, control) for value in values] for control in controls]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_curves_rise_from_0_to_1_whatever_the_controls():
    """Corners of the unit square are the hardest control points: there the curve stands still or upright."""
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    controls = torch.stack([torch.stack([a, b]) for a in square for b in square])
    curves = bezier(torch.linspace(0, 1, 101).expand(16, -1), controls)
    torch.testing.assert_close(curves[:, [0, -1]], torch.tensor([[0.0, 1.0]]).expand(16, -1))
    assert (curves.diff(dim=1) >= -1e-6).all()
    straight = bezier(torch.linspace(0, 1, 101)[None], torch.tensor([[[1 / 3, 1 / 3], [2 / 3, 2 / 3]]]))
    torch.testing.assert_close(straight[0], torch.linspace(0, 1, 101), atol=1e-5, rtol=0)


def test_bent_z_scores_keep_their_order_and_their_usual_range(shape):
    """Catches a curve applied to z-scores as they are: of those, two thirds lie outside [0, 1] and would be clamped.

    What lies beyond the usual range stays as far beyond it.
    """
    data, valid = z_scored(shape)
    low, high = usual_range(data, valid)
    bent = bend_intensities(torch.where(valid, data, 1e4), valid, RANDOM)
    directions, num_beyond = set(), 0
    for row in range(3):
        for channel in range(2):
            before, after = data[row, channel][valid[row, 0]], bent[row, channel][valid[row, 0]]
            steps = after[before.argsort()].diff()
            rising = bool(steps.sum() > 0)
            directions.add(rising)
            assert ((steps if rising else -steps) >= -1e-5).all()
            assert len(after.unique()) > 0.95 * len(after)
            ends = [float(end[row, channel]) for end in (low, high)]
            found = [float(after[before == end][0]) for end in ends]
            assert found == pytest.approx(ends if rising else ends[::-1], abs=1e-4)
            beyond = (before < ends[0]) | (before > ends[1])
            num_beyond += int(beyond.sum())
            as_far = before if rising else sum(ends) - before
            torch.testing.assert_close(after[beyond], as_far[beyond], atol=1e-4, rtol=0)
            assert not torch.allclose(after, before, atol=0.05)
    assert directions == {True, False}
    assert num_beyond > 0


def test_the_usual_range_leaves_out_what_is_rare():
    """Catches a range that a bright voxel stretches until all others lie at its dark end, and padding in the range."""
    data = torch.arange(1000.0).view(1, 1, 10, 100)
    data[..., -1, -3:] = 1e6
    valid = torch.ones(1, 1, 10, 100, dtype=torch.bool)
    assert [end.item() for end in usual_range(data, valid)] == [5, 994]
    valid[..., :100, 50:] = False
    padded = torch.where(valid, data, -1e6)
    real = padded[valid].sort().values
    assert [end.item() for end in usual_range(padded, valid)] == [real[2].item(), real[497].item()]


def test_the_range_of_a_large_crop_is_that_of_evenly_spaced_voxels():
    data = torch.randn(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(0))
    low, high = usual_range(data, torch.ones_like(data, dtype=torch.bool))
    assert [low.item(), high.item()] == pytest.approx([-2.576, 2.576], abs=0.05)


def test_evenly_spaced_voxels_lie_in_every_column():
    """Catches a step of 4 in rows of 1024 voxels, which looks at every fourth column alone."""
    data = (torch.arange(1024) % 4).float().expand(1, 1, 512, 1024)
    low, high = usual_range(data, torch.ones_like(data, dtype=torch.bool))
    assert [low.item(), high.item()] == [0, 3]


def test_a_range_that_no_real_voxel_tells_is_finite():
    """Catches the infinity that stands for padding, taken as an end: bent voxels would be no numbers."""
    data = torch.full((1, 1, 512, 1024), 0.5)
    valid = torch.zeros_like(data, dtype=torch.bool)
    valid[..., 0, 1] = True
    assert [end.item() for end in usual_range(data, valid)] == [0, 1]
    bent = bend_intensities(data, valid, replace(RANDOM, samples=(4,)))[valid]
    assert 0 <= bent.item() <= 1


def test_a_constant_channel_stays_as_it_is(shape):
    _, valid = z_scored(shape)
    data = torch.full((3, 1, *shape), -2.0)
    assert torch.equal(bend_intensities(data, valid, RANDOM), data)


def test_boxes_and_curves_stay_on_the_device(shape):
    """A value of a meta tensor cannot be read, as reading one from a GPU would stop the training."""
    data, valid = (tensor.to("meta") for tensor in z_scored(shape))
    sides = [(0.2, 0.5)] * len(shape)
    assert paint_boxes(RANDOM, valid, (2, 4), sides).shape == valid.shape
    assert cut_out(RANDOM, valid, 0.3, 4, sides).device.type == "meta"
    assert bend_intensities(data, valid, RANDOM).shape == data.shape
