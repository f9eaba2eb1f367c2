from itertools import pairwise

import pytest

from nnssl_ext.dataset.splits import Split
from nnssl_ext.finetuning.config import FinetuningConfig
from nnssl_ext.finetuning.schedules import encoder_is_frozen, rate_factor

FOLDS = (Split(("a",), ("b",)),)


def config(**settings: object) -> FinetuningConfig:
    values = {"splits": FOLDS, "num_epochs": 100, "iterations_per_epoch": 1, **settings}
    return FinetuningConfig(**values)  # type: ignore[arg-type]


def test_poly_is_nnunets_formula_per_step() -> None:
    run = config()
    for step in (0, 1, 50, 99):
        assert rate_factor(run, step) == pytest.approx((1 - step / 100) ** 0.9)


def test_warmup_rises_evenly_to_exactly_the_full_rate_and_never_jumps() -> None:
    run = config(schedule="warmup", warmup_epochs=4)
    assert [rate_factor(run, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate_factor(run, 4) == 1.0
    assert rate_factor(run, 5) == pytest.approx((1 - 1 / 96) ** 0.9)
    factors = [rate_factor(run, step) for step in range(100)]
    assert max(abs(b - a) for a, b in pairwise(factors)) <= 0.2 + 1e-9


def test_sawtooth_trains_the_decoder_alone_then_everything() -> None:
    run = config(schedule="sawtooth", warmup_epochs=10, decoder_warmup_epochs=4, decoder_decay_epochs=5)
    encoder = [rate_factor(run, step, "encoder") for step in range(100)]
    decoder = [rate_factor(run, step, "rest") for step in range(100)]
    assert encoder[:9] == [0.0] * 9
    assert decoder[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert decoder[4:9] == pytest.approx([(1 - i / 5) ** 0.9 for i in range(5)])
    assert encoder[9:] == decoder[9:]
    assert decoder[9] == pytest.approx(1 / 11)
    assert decoder[19] == 1.0
    assert decoder[99] == pytest.approx((1 - 80 / 81) ** 0.9)


def test_a_frozen_encoder_rests_under_any_schedule() -> None:
    run = config(frozen_encoder_epochs=30)
    assert encoder_is_frozen(run, 29)
    assert not encoder_is_frozen(run, 30)
    assert rate_factor(run, 29, "encoder") == 0.0
    assert rate_factor(run, 30, "encoder") == rate_factor(run, 30, "rest")
    assert rate_factor(run, 29, "rest") > 0.0


@pytest.mark.parametrize("step", [-1, 100])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside the run of 100 steps"):
        rate_factor(config(), step)
