import random
from itertools import pairwise
from math import prod

import pytest

from nnssl_ext.planners.architecture import resenc_architecture
from nnssl_ext.planners.rules import (
    MIN_STAGES,
    USABLE_SHARE,
    StepCost,
    choose_patch,
    estimate_memory,
    largest_patch,
    patch_candidates,
    topology,
)


def memory_of(shape, batch_size):
    architecture = resenc_architecture(shape, base_features=32, max_features=320, blocks=(1, 3, 4, 6, 6, 6))
    return estimate_memory(architecture, shape.patch_size, batch_size, StepCost())


def geometries(count=25, dims=3):
    """Random spacings and median shapes, from tiny to whole-body, isotropic to very anisotropic."""
    draw = random.Random(0)
    for _ in range(count):
        spacing = [10 ** draw.uniform(-0.7, 0.9) for _ in range(dims)]
        yield spacing, [round(10 ** draw.uniform(0.5, 2.8)) for _ in range(dims)]


ALL_GEOMETRIES = [*geometries(), *geometries(8, dims=2)]


@pytest.mark.parametrize(
    ("median", "expected"), [((35, 50, 35), (40, 56, 40)), ((30, 40, 30), (32, 40, 32)), ((10, 10, 10), (16, 16, 16))]
)
def test_tiny_images_are_covered_by_one_patch(median, expected):
    first = next(patch_candidates((1, 1, 1), median, 160**3))
    assert first.patch_size == expected
    assert len(first.strides) >= MIN_STAGES


def test_large_images_give_the_presets_cube():
    first = next(patch_candidates((1, 1, 1), (300, 400, 350), 160**3))
    assert first.patch_size == (160, 160, 160)
    assert first.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)


def test_short_axes_leave_their_voxels_to_the_long_ones():
    patch = largest_patch((1, 1, 1), (40, 400, 400), 160**3)
    assert patch == (40, 320, 320)
    assert prod(patch) == 160**3


def test_patch_has_equal_extent_on_all_axes():
    assert largest_patch((4.0, 1.0, 2.0), (999, 999, 999), 64**3) == (32, 128, 64)


@pytest.mark.parametrize(("spacing", "median"), ALL_GEOMETRIES)
def test_candidates_shrink_are_divisible_and_deep_enough(spacing, median):
    candidates = list(patch_candidates(spacing, median, 128 ** len(spacing)))
    assert candidates
    for larger, smaller in pairwise(candidates):
        assert prod(smaller.patch_size) < prod(larger.patch_size)
    for candidate in candidates:
        steps = [prod(stride[axis] for stride in candidate.strides) for axis in range(len(spacing))]
        assert all(size % step == 0 for size, step in zip(candidate.patch_size, steps, strict=True))
        assert tuple(steps) == candidate.divisor
        assert len(candidate.strides) == len(candidate.kernel_sizes) >= MIN_STAGES


@pytest.mark.parametrize(("spacing", "median"), ALL_GEOMETRIES)
def test_first_patch_covers_the_median_case_or_fills_the_limit(spacing, median):
    limit = 128 ** len(spacing)
    first = next(patch_candidates(spacing, median, limit))
    covering = topology(spacing, median)
    if prod(median) > limit:
        assert limit / 3 < prod(first.patch_size) <= limit
    elif len(covering.strides) < MIN_STAGES:  # too small for a U-Net of three stages: padded as much as it takes
        assert len(first.strides) >= MIN_STAGES
    elif prod(covering.patch_size) <= 1.5 * prod(median):
        assert first.patch_size == covering.patch_size
    else:
        assert prod(first.patch_size) <= 1.5 * prod(median)


def test_coarse_axis_is_pooled_later():
    first = next(patch_candidates((5.0, 0.7, 0.7), (20, 320, 320), 128**3))
    assert first.strides[1] == (1, 2, 2)
    assert first.kernel_sizes[0] == (1, 3, 3)
    assert first.divisor[0] < first.divisor[1]


@pytest.mark.parametrize(("spacing", "median"), ALL_GEOMETRIES)
def test_more_memory_never_gives_fewer_voxels(spacing, median):
    chosen = []
    for target in (3, 4, 6, 8, 9, 10, 12, 16, 20, 24, 32, 40, 80, 140):
        candidates = patch_candidates(spacing, median, 192 ** len(spacing))
        try:
            shape, batch = choose_patch(candidates, memory_of, target, lambda _: 1000)
        except ValueError:
            assert not chosen, "fitted with less memory, does not with more"
            continue
        assert memory_of(shape, batch) <= USABLE_SHARE * target
        chosen.append(prod(shape.patch_size) * batch)
    assert chosen == sorted(chosen)
    assert chosen


def test_batch_fills_what_the_largest_patch_leaves():
    shape = topology((1, 1, 1), (64, 64, 64))
    usable = memory_of(shape, 7)
    for share, expected in ((1.001, 7), (0.999, 6)):
        chosen, batch = choose_patch(iter([shape]), memory_of, usable * share / USABLE_SHARE, lambda _: 100)
        assert (chosen, batch) == (shape, expected)
    assert choose_patch(iter([shape]), memory_of, 100, lambda _: 5)[1] == 5
    assert choose_patch(iter([shape]), memory_of, 100, lambda _: 0)[1] == 2


def test_smaller_patch_keeps_a_batch_of_two():
    large, small = topology((1, 1, 1), (96, 96, 96)), topology((1, 1, 1), (32, 32, 32))
    target = (memory_of(large, 2) - 0.01) / USABLE_SHARE
    assert choose_patch(iter([large, small]), memory_of, target, lambda _: 100) == (small, 2)


def test_too_little_memory_says_how_much_is_needed():
    shape = topology((1, 1, 1), (64, 64, 64))
    need = memory_of(shape, 2) / USABLE_SHARE
    with pytest.raises(ValueError, match=rf"0\.5 GB is too small.*needs {need:.1f}.*nnsslPlannerResEncXS"):
        choose_patch(iter([shape]), memory_of, 0.5, lambda _: 2)
