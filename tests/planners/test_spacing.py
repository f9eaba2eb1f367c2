import numpy as np
import pytest

from nnssl_ext.planners.spacing import resampled_shapes, target_spacing, transposition

SHAPES = [(100, 200, 200)] * 3
ANISOTROPIC = [(20, 320, 320)] * 11


def test_iso_keeps_the_median_voxel_volume():
    spacings = [(2.0, 1.0, 1.0), (8.0, 1.0, 1.0), (1.0, 1.0, 1.0)]
    assert target_spacing("iso", spacings, SHAPES) == (1.259921, 1.259921, 1.259921)


def test_iso_of_slices_is_square_and_leaves_the_slice_distance():
    spacings = [(999.0, 1.0, 4.0)] * 3
    assert target_spacing("iso", spacings, [(1, 64, 64)] * 3) == (999.0, 2.0, 2.0)


def test_median_goes_by_axis():
    spacings = [(2.0, 1.0, 1.0), (3.0, 1.0, 0.5), (4.0, 2.0, 0.7)]
    assert target_spacing("median", spacings, SHAPES) == (3.0, 1.0, 0.7)
    assert target_spacing("noresample", spacings, SHAPES) == (3.0, 1.0, 0.7)


def test_median_takes_a_finer_slice_distance_where_slices_are_few_and_thick():
    spacings = [(z, 0.7, 0.7) for z in range(5, 16)]
    expected = float(np.percentile(range(5, 16), 10))
    assert target_spacing("median", spacings, ANISOTROPIC) == (expected, 0.7, 0.7)
    assert target_spacing("median", spacings, SHAPES) == (10.0, 0.7, 0.7)


def test_median_never_makes_the_coarse_axis_finer_than_the_others():
    spacings = [(0.5, 0.7, 0.7)] * 3 + [(9.0, 0.7, 0.7)] * 8
    assert target_spacing("median", spacings, ANISOTROPIC) == (0.70001, 0.7, 0.7)


def test_explicit_spacing_is_taken():
    assert target_spacing((1.5, 1.0, 2.0), [(1, 1, 1)], SHAPES[:1]) == (1.5, 1.0, 2.0)
    assert target_spacing((0.5, 0.25), [(999, 1, 1)], [(1, 64, 64)]) == (999.0, 0.5, 0.25)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, 1e4)])
def test_impossible_spacing_is_refused(spacing):
    with pytest.raises(ValueError, match="three numbers in mm"):
        target_spacing(spacing, [(1, 1, 1)], SHAPES[:1])


def test_unknown_rule_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'cubic' is not known\. Give iso, median, noresample"):
        target_spacing("cubic", [(1, 1, 1)], SHAPES[:1])


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 5, 1), (1, 1, 5), (3, 2, 1)])
def test_transposition_puts_the_coarsest_axis_first_and_can_be_undone(spacing):
    forward, backward = transposition(spacing)
    moved = [spacing[axis] for axis in forward]
    assert moved[0] == max(spacing)
    assert tuple(moved[axis] for axis in backward) == spacing


def test_shapes_are_nnunets():
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    draw = np.random.default_rng(0)
    shapes, spacings = draw.integers(1, 300, (50, 3)), draw.uniform(0.2, 6, (50, 3))
    spacings[:5], shapes[:5] = 0.5, [[5, 7, 9]] * 5  # halves: the rounding matters
    target = (1.0, 1.0, 1.0)
    expected = [compute_new_shape(shape, spacing, target) for shape, spacing in zip(shapes, spacings, strict=True)]
    assert np.array_equal(resampled_shapes(shapes, spacings, target), np.maximum(1, expected))


@pytest.mark.parametrize("seed", range(20))
def test_median_and_transposition_are_nnunets(seed):
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    draw = np.random.default_rng(seed)
    scale = draw.permutation([1.0, 1.0, draw.choice([1.0, 8.0])])
    spacings = draw.uniform(0.5, 1.5, (15, 3)) * scale
    shapes = np.maximum(1, draw.integers(60, 200, (15, 3)) / scale**1.5).astype(int)
    theirs = object.__new__(ExperimentPlanner)
    theirs.overwrite_target_spacing, theirs.suppress_transpose, theirs.anisotropy_threshold = None, False, 3
    theirs.dataset_fingerprint = {"spacings": spacings.tolist(), "shapes_after_crop": shapes.tolist()}
    ours = target_spacing("median", spacings, shapes)
    assert ours == pytest.approx(theirs.determine_fullres_target_spacing(), abs=1e-6)
    forward, backward = theirs.determine_transpose()
    assert transposition(ours) == (tuple(forward), tuple(backward))
