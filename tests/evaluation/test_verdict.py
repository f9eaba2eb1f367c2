from dataclasses import replace

import pytest

from nnssl_ext.evaluation.convergence import Trend
from nnssl_ext.evaluation.records import Arm, Comparison, Convergence, Summary
from nnssl_ext.evaluation.statistics import Interval
from nnssl_ext.evaluation.verdict import certainty, convergence_warnings, decide

SCRATCH = Arm(name="s", role="reference", trainer="T", pretrained=False, label="scratch")
MAE = Arm(name="m", role="arm", trainer="T", pretrained=True, pretrained_per_seed=True, label="mae")
CLEAR = Comparison(
    arm="m",
    num_train=5,
    metric="dice",
    class_name="mean",
    difference=0.06,
    interval=Interval(0.03, 0.09),
    p_value=0.001,
    p_holm=0.002,
    num_pairs=30,
    num_better=25,
    num_worse=5,
    undecidable_below=0.04,
)


def summary(arm: str, mean: float, size=5, num_seeds=3) -> Summary:
    return Summary(
        arm=arm,
        num_train=size,
        metric="dice",
        class_name="mean",
        mean=mean,
        interval=None,
        num_cases=30,
        num_seeds=num_seeds,
        fold_means={},
        seed_means={},
    )


def verdict(row: Comparison = CLEAR, base: float = 0.7, state: str = "settled"):
    summaries = [summary("s", base), summary("m", base + 0.06)]
    trend = Convergence(arm="s", num_train=5, trend=Trend(state, "dice", 0.03, 5.0, 10), num_runs=5)
    return decide([SCRATCH, MAE], summaries, [row], [trend])[0]


def test_a_clear_gain() -> None:
    found = verdict()
    assert found.outcome == "helped"
    assert found.headline == "Pretraining helped with 5 training cases (+0.060 Dice)."
    assert found.sizes[0].sentence == (
        "With 5 training cases mae reached a mean Dice of 0.760 against 0.700 for scratch: +0.060 (95% interval +0.030 "
        "to +0.090), corrected p = 0.002, 30 paired patients (25 better, 5 worse)."
    )


def test_a_clear_loss() -> None:
    row = replace(CLEAR, difference=-0.06, interval=Interval(-0.09, -0.03))
    assert verdict(row).outcome == "hurt"
    assert verdict(row).headline == "Pretraining hurt with 5 training cases (-0.060 Dice)."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interval": Interval(-0.01, 0.13)}, "not enough to call it a difference"),
        ({"interval": None}, "not enough to call it a difference"),
    ],
)
def test_what_is_not_enough(change: dict, reason: str) -> None:
    found = verdict(replace(CLEAR, **change))
    assert found.outcome == "undecided"
    assert reason in found.sizes[0].sentence
    assert "made no difference that this evaluation can show" in found.headline


LOSS = {"difference": -0.06, "interval": Interval(-0.09, -0.03)}


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"p_holm": 0.06}, "not enough to call it a difference", "ahead with 5 training cases (+0.060 Dice)"),
        ({"undecidable_below": 0.07}, "within the luck of the trainings", "ahead with 5 training cases (+0.060 Dice)"),
        (LOSS | {"undecidable_below": None}, "more folds or seeds", "behind with 5 training cases (-0.060 Dice)"),
    ],
)
def test_a_difference_that_may_be_luck_is_not_called_none(change: dict, reason: str, words: str) -> None:
    """Catches a headline that says \"no difference\" over a difference whose interval excludes zero."""
    found = verdict(replace(CLEAR, **change))
    assert found.outcome == "undecided"
    assert reason in found.sizes[0].sentence
    assert found.headline == f"Pretraining came out {words}, which may be luck."


def test_a_gain_over_a_baseline_that_was_still_rising_is_not_called_one() -> None:
    found = verdict(state="rising")
    assert found.outcome == "unfair"
    assert "the baseline had not finished learning" in found.headline
    assert "scratch was still rising when it stopped" in found.sizes[0].sentence


def test_arms_that_had_not_finished_share_a_sentence() -> None:
    def row(arm: str, state: str, gain: float | None = None, size: int = 5) -> Convergence:
        return Convergence(arm=arm, num_train=size, trend=Trend(state, "dice", gain, 5.0, 10), num_runs=1)

    rows = [row("s", "rising", 0.4), row("m", "rising", 0.2), row("x", "settled", 0.0)]
    rows += [row("m", "rising", 0.1, 20), row("s", "unknown", size=20)]
    assert convergence_warnings(rows, {"s": "scratch", "m": "mae", "x": "dino"}) == [
        "scratch and mae were still rising with 5 training cases: over their last 10 epochs the validation Dice rose "
        "by 0.200 to 0.400. Train longer before believing differences to them.",
        "mae was still rising with 20 training cases: over its last 10 epochs the validation Dice rose by 0.100. Train "
        "longer before believing differences to it.",
        "Whether scratch had converged with 20 training cases cannot be told: too few epochs were recorded.",
    ]


def test_a_gain_over_nothing_is_not_called_one() -> None:
    found = verdict(base=0.02)
    assert found.outcome == "unfair"
    assert "learned next to nothing" in found.sizes[0].sentence


def test_a_loss_against_a_rising_baseline_stays_a_loss() -> None:
    row = replace(CLEAR, difference=-0.06, interval=Interval(-0.09, -0.03))
    assert verdict(row, state="rising").outcome == "hurt"


def test_several_sizes_share_a_headline() -> None:
    nothing = replace(CLEAR, num_train="all", difference=0.001, interval=Interval(-0.01, 0.01), p_holm=0.9)
    sizes = [replace(CLEAR, num_train=2), CLEAR, replace(CLEAR, num_train=20), nothing]
    summaries = [summary(arm, 0.7, size) for arm in "sm" for size in (2, 5, 20, "all")]
    (found,) = decide([SCRATCH, MAE], summaries, sizes, [])
    assert found.outcome == "helped"
    assert found.headline == (
        "Pretraining helped with 2, 5 and 20 training cases (+0.060, +0.060, +0.060 Dice); made no difference that "
        "this evaluation can show with all training cases (+0.001 Dice)."
    )


def test_an_arm_without_pretraining_is_called_by_its_name() -> None:
    plain = replace(MAE, pretrained=False, role="plain", label="nnUNetPlans")
    (found,) = decide([SCRATCH, plain], [summary("s", 0.7), summary("m", 0.8)], [CLEAR], [])
    assert found.headline == "nnUNetPlans helped with 5 training cases (+0.060 Dice)."
    assert found.certainty.startswith("3 seeds stand behind this. ")


def test_an_arm_without_seeds_is_not_said_to_have_those_of_the_others() -> None:
    """Catches "3 seeds stand behind this" of a comparison whose one side was trained once."""
    plain = replace(MAE, pretrained=False, role="plain", label="nnUNetPlans")
    summaries = [summary("s", 0.7), summary("m", 0.8, num_seeds=1)]
    (found,) = decide([SCRATCH, plain], summaries, [replace(CLEAR, undecidable_below=None)], [])
    assert found.certainty == (
        "nnUNetPlans has no seed, so each fold was trained once, and the tests speak about these trained networks. "
        "Another training alone can move a mean Dice by about 0.02 on small data: be wary of differences under about "
        "0.04."
    )


def test_one_pretraining_for_all_seeds_is_no_method() -> None:
    """Catches a verdict about pretraining that stands on a single checkpoint and does not say so."""
    (found,) = decide(
        [SCRATCH, replace(MAE, pretrained_per_seed=False)], [summary("s", 0.7), summary("m", 0.8)], [CLEAR], []
    )
    assert found.headline == "This pretraining helped with 5 training cases (+0.060 Dice)."
    assert found.certainty.endswith(
        " One pretraining run stands behind mae: this is about this checkpoint, not the method."
    )
    assert "One pretraining run" not in verdict().certainty


def test_a_network_of_another_kind_is_called_by_its_name() -> None:
    """Catches a difference of networks that is called one of pretraining."""
    other = replace(MAE, other_network=True)
    (found,) = decide([SCRATCH, other], [summary("s", 0.7), summary("m", 0.8)], [CLEAR], [])
    assert found.headline == "mae helped with 5 training cases (+0.060 Dice)."


def test_one_seed_speaks_about_the_networks_only() -> None:
    text = certainty([CLEAR], 1)
    assert "each fold was trained once, and the tests speak about these trained networks" in text
    assert "By the spread over folds they cannot decide Dice differences under 0.040 with 5 training cases." in text
    assert "be wary of differences under about 0.04" in text
    assert "spread over folds" not in certainty([replace(CLEAR, undecidable_below=None)], 1)


def test_three_seeds_say_what_they_cannot_decide() -> None:
    text = certainty([CLEAR, replace(CLEAR, num_train="all", undecidable_below=0.011)], 3)
    assert "Dice differences under 0.040 with 5 training cases, 0.011 with all training cases" in text
    assert "a sign test over 3 seeds cannot give a p under 0.25" in text
    assert "so few seeds" in text
    assert "so few seeds" not in certainty([CLEAR], 6)
