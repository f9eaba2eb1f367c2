import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_ext.core.random import generator
from nnssl_ext.loading.sampler import choose_crop
from nnssl_ext.preprocessing.store import occupancy_grid

SHAPE, PATCH = (40, 30, 24), (16, 12, 8)


def share(grid: np.ndarray, cell: tuple[int, ...], shape: tuple[int, ...], lower: tuple[int, ...], patch) -> float:
    """Foreground share of a crop, voxel by voxel."""
    voxels = grid
    for axis, edge in enumerate(cell):
        voxels = voxels.repeat(edge, axis=axis)
    voxels = voxels[tuple(slice(0, size) for size in shape)]
    inside = tuple(slice(max(low, 0), low + edge) for low, edge in zip(lower, patch, strict=True))
    return float(voxels[inside].mean())


def best_share(grid: np.ndarray, cell: tuple[int, ...], shape: tuple[int, ...], patch: tuple[int, ...]) -> float:
    ranges = [range(min(0, s - p), max(0, s - p) + 1) for s, p in zip(shape, patch, strict=True)]
    corners = [(z, y, x) for z in ranges[0] for y in ranges[1] for x in ranges[2]]
    return max(share(grid, cell, shape, corner, patch) for corner in corners)


@pytest.mark.parametrize("shape", [SHAPE, (37, 29, 23), (10, 40, 5), (1, 30, 24)])
def test_share_equals_count_of_voxels(shape: tuple[int, int, int]) -> None:
    rng = generator(1)
    grid, cell = occupancy_grid(rng.random(shape) < 0.5)
    for seed in range(20):
        crop = choose_crop(shape, PATCH, grid, cell, 0.0, generator(seed))
        assert crop.foreground == pytest.approx(share(grid, cell, shape, crop.lower, PATCH), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0, 1), wanted=st.floats(0, 1))
def test_rule_is_met_wherever_it_can_be(seed: int, density: float, wanted: float) -> None:
    shape, patch = (11, 9, 6), (5, 4, 8)
    grid, cell = occupancy_grid(generator(seed).random(shape) < density)
    best = best_share(grid, cell, shape, patch)
    crop = choose_crop(shape, patch, grid, cell, wanted, generator(seed, "crop"))
    assert crop.foreground == pytest.approx(share(grid, cell, shape, crop.lower, patch))
    assert crop.foreground >= (wanted if best >= wanted else 0.9 * best) - 1e-8


def test_best_place_may_lie_between_the_cells() -> None:
    """Half, all and nothing of three cells in a row: the best crop ends with the second and begins within the first."""
    grid = np.array([[[True, True, False], [False, True, False]]])
    for seed in range(40):
        crop = choose_crop((4, 8, 12), (4, 8, 6), grid, (4, 4, 4), 0.83, generator(seed))
        assert crop.lower == (0, 0, 2)
        assert crop.foreground == pytest.approx(5 / 6)


def test_small_lesion_is_found_from_many_places() -> None:
    foreground = np.zeros((64, 64, 64), bool)
    foreground[40:48, 8:16, 52:60] = True
    grid, cell = occupancy_grid(foreground)
    crops = [choose_crop((64, 64, 64), (16, 16, 16), grid, cell, 0.5, generator(seed)) for seed in range(30)]
    assert min(crop.foreground for crop in crops) >= 0.9 / 8  # the lesion is an eighth of the crop
    assert len({crop.lower for crop in crops}) > 10


def test_crops_are_uniform_where_all_is_foreground() -> None:
    grid, cell = occupancy_grid(np.ones((9, 8, 8), bool))
    corners = [choose_crop((9, 8, 8), (6, 8, 8), grid, cell, 0.5, generator(seed)).lower[0] for seed in range(800)]
    assert np.bincount(corners, minlength=4).tolist() == pytest.approx([200] * 4, abs=60)


def test_no_foreground_gives_any_crop() -> None:
    grid, cell = occupancy_grid(np.zeros(SHAPE, bool))
    crops = [choose_crop(SHAPE, PATCH, grid, cell, 0.5, generator(seed)) for seed in range(50)]
    assert {crop.foreground for crop in crops} == {0.0}
    assert len({crop.lower for crop in crops}) > 40


def test_short_axis_is_taken_whole_and_its_padding_split_at_random() -> None:
    grid, cell = occupancy_grid(np.ones((10, 30, 24), bool))
    lowers = [choose_crop((10, 30, 24), PATCH, grid, cell, 0.5, generator(seed)).lower for seed in range(200)]
    assert {lower[0] for lower in lowers} == set(range(-6, 1))
    assert all(0 <= lower[1] <= 18 and 0 <= lower[2] <= 16 for lower in lowers)


def test_slices_with_foreground_are_preferred_in_2d() -> None:
    foreground = np.zeros((20, 24, 24), bool)
    foreground[8:12] = True
    grid, cell = occupancy_grid(foreground)
    slices = {choose_crop((20, 24, 24), (1, 16, 16), grid, cell, 0.5, generator(s)).lower[0] for s in range(60)}
    assert slices == {8, 9, 10, 11}
