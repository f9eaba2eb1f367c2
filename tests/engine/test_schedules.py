"""Schedules: hand-computed values, no jump after the warm-up, short runs leave their warm-up."""

import math
from itertools import pairwise

import pytest

from nnssl_ext.engine.schedules import ScheduleConfig, schedule_factor


def curve(config: ScheduleConfig, total: int, role: str = "rest") -> list[float]:
    return [schedule_factor(config, step, total, role) for step in range(total)]


def test_poly_is_the_formula_per_optimiser_step() -> None:
    assert curve(ScheduleConfig(), 4) == pytest.approx([1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9])


def test_cosine_meets_its_middle_and_its_floor() -> None:
    values = curve(ScheduleConfig(name="cosine", final_factor=0.1), 100)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[99] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))


@pytest.mark.parametrize("name", ["poly", "cosine", "constant", "sawtooth"])
def test_warmup_reaches_the_peak_in_equal_rises(name: str) -> None:
    """A warm-up that stops at half the rate and then jumps is a known fault of published code."""
    values = curve(ScheduleConfig(name=name, warmup_steps=9), 200)
    rises = [after - before for before, after in pairwise(values[:10])]
    assert values[0] == pytest.approx(0.1)
    assert rises == pytest.approx([0.1] * 9)
    assert values[9] == max(values) == 1.0
    assert all(after <= before for before, after in pairwise(values[9:]))


def test_a_short_run_leaves_its_warmup() -> None:
    values = curve(ScheduleConfig(warmup_steps=1000), 50)
    assert values.index(1.0) == 5


def test_a_long_run_lengthens_its_warmup_and_a_short_one_still_leaves_it() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=10, warmup_share=0.05)
    assert [curve(config, total).index(1.0) for total in (50, 150, 400)] == [5, 10, 20]


def test_sawtooth_rests_the_encoder_then_warms_the_whole_network() -> None:
    config = ScheduleConfig(name="sawtooth", head_steps=10, warmup_steps=9)
    encoder, rest = curve(config, 200, "encoder"), curve(config, 200, "rest")
    assert encoder[:10] == [0.0] * 10
    assert rest[5] == 1.0
    assert 0 < rest[9] < 0.3
    assert encoder[10:] == rest[10:]
    assert rest[10] == pytest.approx(0.1)
    assert rest[19] == 1.0


@pytest.mark.parametrize("name", ["poly", "cosine", "sawtooth"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_shortest_runs_have_a_positive_factor(name: str, total: int) -> None:
    config = ScheduleConfig(name=name, warmup_steps=5, head_steps=5, warmup_limit=1.0)
    assert all(0 < value <= 1 for value in curve(config, total)[-1:])


def test_steps_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 9"):
        schedule_factor(ScheduleConfig(), 10, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "step"), ("warmup_steps", -1), ("warmup_limit", 2.0), ("final_factor", -0.1), ("exponent", 0.0)],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        ScheduleConfig(**{field: value})
