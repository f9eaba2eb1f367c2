import numpy as np
import pytest
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnssl_ext.fingerprint.intensities import intensity_quantiles, intensity_statistics, pool_statistics


def pooled(cases):
    return pool_statistics(
        [intensity_statistics(case) for case in cases], [intensity_quantiles(case) for case in cases]
    )


def test_statistics_of_known_values():
    found = intensity_statistics(np.arange(1001, dtype=np.float32))
    assert (found.mean, found.median, found.min, found.max) == (500, 500, 0, 1000)
    assert (found.percentile_00_5, found.percentile_99_5) == pytest.approx((5, 995))
    assert found.std == pytest.approx(np.sqrt((1001**2 - 1) / 12))


def test_no_voxels_give_no_statistics():
    assert intensity_statistics(np.empty(0, dtype=np.float32)) is None
    assert intensity_quantiles(np.empty(0, dtype=np.float32)) == ()
    with pytest.raises(ValueError, match="no case has foreground"):
        pool_statistics([], [])


def test_one_case_pools_to_itself():
    case = np.random.default_rng(0).normal(40, 200, 50_000)
    alone, found = intensity_statistics(case), pooled([case])
    for name in ("mean", "std", "min", "max"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name))
    for name in ("median", "percentile_00_5", "percentile_99_5"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), abs=0.005 * alone.std)


def test_cases_weigh_the_same_however_many_voxels_they_have():
    small, large = np.full(10, 0.0), np.full(100_000, 10.0)
    found = pooled([small, large])
    assert (found.mean, found.std, found.min, found.max) == (5, 5, 0, 10)
    assert (found.percentile_00_5, found.percentile_99_5) == (0, 10)


def test_pooled_statistics_are_nnunets():
    """nnU-Net draws as many voxels from each case; ours are the values that such draws approach."""
    rng = np.random.default_rng(1)
    images = [rng.normal(30 * index, 50 + 20 * index, (1, 12, 40, 40)) for index in range(6)]
    images[0][0, 0] = -2000  # a heavy lower tail in one case: 1/12 of it
    drawn = [
        DatasetFingerprintExtractor.collect_foreground_intensities(np.ones((1, *image.shape[1:])), image, 1234, 40_000)
        for image in images
    ]
    values = np.concatenate([per_channel[0] for per_channel, _ in drawn])
    found = pooled([image.ravel() for image in images])
    assert found.mean == pytest.approx(values.mean(), abs=2)
    assert found.std == pytest.approx(values.std(), rel=0.01)
    expected = np.percentile(values, (0.5, 50, 99.5))
    assert (found.percentile_00_5, found.median, found.percentile_99_5) == pytest.approx(expected, abs=4)
