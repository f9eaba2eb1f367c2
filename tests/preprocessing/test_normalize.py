"""Normalisation: values by hand, and what is refused."""

import numpy as np
import pytest

from nnssl_ext.preprocessing.normalize import check_normalization, normalize, scale_by_percentiles

CT = {"0": {"mean": 100.0, "std": 50.0, "percentile_00_5": 0.0, "percentile_99_5": 200.0}}


def ramp() -> np.ndarray:
    return np.arange(1001, dtype=np.float32).reshape(7, 11, 13)


def test_z_score() -> None:
    data = normalize(ramp()[None], ["ZScoreNormalization"], [False], {})
    assert data.mean() == pytest.approx(0, abs=1e-5)
    assert data.std() == pytest.approx(1, abs=1e-5)


def test_z_score_within_the_mask_leaves_the_outside_at_zero() -> None:
    data = np.zeros((1, 5, 5, 5), np.float32)
    data[0, 1:4, 1:4, 1:4] = 10
    data[0, 1:4, 1:4, 1] = 16
    normalize(data, ["ZScoreNormalization"], [True], {})
    inside = data[0, 1:4, 1:4, 1:4]
    np.testing.assert_allclose(inside[..., 0], np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(inside[..., 1:], -1 / np.sqrt(2), rtol=1e-5)
    assert not data[0, 0].any()


def test_ct_clips_and_scales_by_the_dataset() -> None:
    data = normalize(np.array([-500.0, 150.0, 900.0], np.float32).reshape(1, 1, 1, 3), ["CTNormalization"], [False], CT)
    np.testing.assert_allclose(data.ravel(), [-2, 1, 2])


def test_percentiles_become_zero_and_one() -> None:
    scaled = scale_by_percentiles(ramp())
    assert scaled.ravel()[5] == 0
    assert scaled.ravel()[500] == pytest.approx(0.5)
    assert scaled.ravel()[995] == pytest.approx(1)
    assert scaled.max() == 1


def test_a_constant_image_stays_finite() -> None:
    constant = np.full((3, 4, 5), 7, np.float32)
    assert not scale_by_percentiles(constant).any()
    assert not normalize(constant[None].copy(), ["ZScoreNormalization"], [False], {}).any()


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (["ZScore"], "'ZScore' of channel 0 is unknown; allowed: .*ZScoreNormalization"),
        (["CTNormalization"], "mean, percentile_00_5, percentile_99_5, std"),
    ],
)
def test_unusable_schemes_are_refused(schemes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_normalization(schemes, {})


def test_the_number_of_channels_must_be_the_plans() -> None:
    with pytest.raises(ValueError, match="2 channels, the plan normalises 1"):
        normalize(np.ones((2, 3, 3, 3), np.float32), ["ZScoreNormalization"], [False], {})


def test_colour_values_must_be_bytes() -> None:
    with pytest.raises(ValueError, match="0 to 255"):
        normalize(np.full((1, 1, 2, 2), 300, np.float32), ["RGBTo01Normalization"], [False], {})
