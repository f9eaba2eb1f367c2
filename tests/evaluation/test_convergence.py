import numpy as np
import pytest

from nnssl_ext.evaluation.convergence import judge, mean_curve

EPOCHS = np.arange(50)


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, len(EPOCHS))


def test_a_curve_that_has_flattened_is_settled() -> None:
    dice = 0.8 * (1 - np.exp(-EPOCHS / 5)) + noise(0.005)
    trend = judge(dice.tolist(), [])
    assert (trend.state, trend.curve, trend.epochs) == ("settled", "dice", 10)


def test_a_curve_that_climbs_to_the_end_is_rising() -> None:
    trend = judge((0.01 * EPOCHS + noise(0.005)).tolist(), [])
    assert trend.state == "rising"
    assert trend.gain == pytest.approx(0.09, abs=0.02)
    assert trend.t_value > 2


def test_only_the_last_fifth_counts() -> None:
    dice = np.concatenate([np.linspace(0, 0.9, 40), np.full(10, 0.9)])
    assert judge(dice.tolist(), []).state == "settled"
    assert judge(dice[:45].tolist(), []).state == "rising"


def test_noise_without_a_trend_is_settled() -> None:
    assert judge((0.7 + noise(0.1)).tolist(), []).state == "settled"


def test_a_slow_but_steady_gain_under_the_threshold_is_settled() -> None:
    trend = judge((0.8 + 0.0005 * EPOCHS).tolist(), [])
    assert trend.state == "settled"
    assert trend.t_value > 2


def test_the_loss_is_judged_where_no_dice_was_recorded() -> None:
    falling = judge([None] * 50, (-0.01 * EPOCHS + noise(0.003)).tolist())
    assert (falling.state, falling.curve) == ("rising", "loss")
    assert falling.gain == pytest.approx(0.09, abs=0.02)
    assert judge([], (np.exp(-EPOCHS / 4) + noise(0.002)).tolist()).state == "settled"


def test_a_falling_dice_is_not_rising() -> None:
    trend = judge((0.8 - 0.01 * EPOCHS).tolist(), [])
    assert trend.state == "settled"
    assert trend.gain < 0


@pytest.mark.parametrize("dice", [[], [0.1, 0.2, 0.3, 0.4], [None, None, float("nan")]])
def test_too_few_epochs_are_unknown(dice: list) -> None:
    trend = judge(dice, [])
    assert (trend.state, trend.gain) == ("unknown", None)


def test_short_runs_use_five_epochs() -> None:
    assert judge([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], []).epochs == 5


def test_mean_curve_skips_gaps_and_ends_with_the_shortest_run() -> None:
    assert mean_curve([[0.2, None, 0.4], [0.4, None]]) == [pytest.approx(0.3), None]
