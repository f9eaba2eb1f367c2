"""Whether a method learned anything of its own: the arithmetic, and what it leaves undecided."""

from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.evaluation.comparison_settings import read_settings
from nnssl_ext.evaluation.learning import (
    FAILED,
    NOT_SHOWN,
    Difference,
    case_dice,
    compare,
    gate,
    luck,
    pretext_metrics,
    verdict,
)

NAN = float("nan")
PROTOCOLS = Path(__file__).parents[2] / "benchmarks" / "learning"


def runs(level: float, spread: float = 0.0) -> dict[int, np.ndarray]:
    """Thirty cases around a level, the same ones for three seeds of other luck."""
    luck = {0: -spread, 1: 0.0, 2: spread}
    return {seed: np.random.default_rng(seed).normal(level + luck[seed], 0.05, 30) for seed in luck}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (0.6, "beats sham"),
        (0.3, "worse than sham"),
        (0.44, "no gain over sham shown"),
        (0.46, "no gain over sham shown"),
    ],
)
def test_the_verdict_follows_the_difference_to_sham(method, words):
    """Catches a loss that is called one because of its sign alone."""
    difference = compare(runs(method, 0.01), runs(0.45), "FooTrainer sham")
    assert difference.mean == pytest.approx(method - 0.45)
    assert difference.low < method - 0.45 < difference.high
    assert verdict(difference, "in part") == words


def test_luck_of_seeds_makes_a_difference_undecided():
    difference = compare(runs(0.52, 0.1), runs(0.45), "FooTrainer sham")
    assert verdict(difference, "passed") == "no gain over sham shown"
    assert difference.undecidable_below > 0.07


def test_a_difference_among_many_methods_is_decided_at_their_level():
    """Catches limits and intervals that are those of a single method in a table of twenty, and a method whose seeds are
    alike by chance. The seeds of each of the twenty scatter by .01, so 40 degrees of freedom stand behind that.
    """
    constant = {seed: np.full(30, 0.4) for seed in range(3)}
    arm = {seed: np.full(30, 0.5 + 0.01 * seed) for seed in range(3)}
    table = luck([(arm, constant)] * 20)
    assert (table.variance, table.freedom, table.num_methods) == (pytest.approx(1e-4), 40, 20)
    assert compare(arm, constant, "x").undecidable_below == pytest.approx(4.302653 * 0.01 / 3**0.5)
    assert compare(arm, constant, "x", table).undecidable_below == pytest.approx(4.302653 * 0.01 / 3**0.5)
    alike = {seed: np.full(30, 0.5) for seed in range(3)}
    assert compare(alike, constant, "x", table).undecidable_below == pytest.approx(3.226628 * 0.01 / 3**0.5)
    cases = {seed: np.array([-1.0, *[0.2] * 19]) for seed in range(3)}  # one case speaks against all others
    nothing = {seed: np.zeros(20) for seed in range(3)}
    alone, among = (compare(cases, nothing, "x", luck([(nothing, nothing)] * number)) for number in (1, 200))
    assert (alone.decided, among.decided) == (True, False)


@pytest.mark.parametrize(
    ("difference", "decided"),
    [
        (Difference(0.1, 0.05, 0.15, 0.04, 3), True),
        (Difference(-0.1, -0.15, -0.05, 0.04, 3), True),
        (Difference(0.1, -0.01, 0.2, 0.04, 3), False),
        (Difference(0.1, 0.05, 0.15, 0.12, 3), False),
        (Difference(0.1, 0.05, 0.15, None, 1), False),
        (Difference(0.1, 0.05, 0.15, 0.04, 3, excludes_zero=False), False),
    ],
)
def test_a_difference_that_cannot_be_decided_bears_a_question_mark(difference, decided):
    """Catches a table that shows differences within the luck of the trainings like any other."""
    assert difference.decided is decided
    assert str(difference).endswith("]" if decided else "]?")


@pytest.mark.parametrize(
    ("difference", "words"),
    [(None, "no sham"), (Difference(0.2, 0.1, 0.3, None, 1), "undecided (one seed)")],
)
def test_nothing_is_decided_without_sham_or_from_one_seed(difference, words):
    assert verdict(difference, "passed") == words
    assert verdict(difference, FAILED) == "did not learn its task"
    assert verdict(difference, NOT_SHOWN) == "learning its task not shown"


def test_every_case_counts_once_however_many_seeds_have_a_score_of_it():
    """Catches a mean over all scores, in which a case without a score in one seed weighs less than in its interval."""
    difference = compare({0: np.array([1.0, NAN]), 1: np.array([1.0, 3.0])}, {0: np.zeros(2), 1: np.zeros(2)}, "x")
    assert difference.mean == pytest.approx(2.0)


def test_only_seeds_that_both_arms_have_are_paired():
    arm, reference = {seed: np.full(30, 0.5 + seed) for seed in (0, 1)}, {1: np.full(30, 1.0), 2: np.zeros(30)}
    difference = compare(arm, reference, "x")
    assert (difference.mean, difference.num_seeds) == (pytest.approx(0.5), 1)
    assert compare(arm, {}, "x") is None


@pytest.mark.parametrize(
    ("pretext", "words"),
    [
        ([{"mse": [0.5, 0.9]}, {"mse": [0.6, 0.9]}], "passed"),
        ([{"mse": [0.5, 0.9]}, {"mse": [0.91, 0.9]}], "not shown"),
        ([{"mse": [0.91, 0.9]}, {"mse": [0.9, 0.9]}], "failed"),
        ([{"accuracy": [1.0, 0.1]}] * 2, "passed"),
        ([{"accuracy": [0.5, 0.1]}], "above chance (one seed)"),
        ([{"accuracy": [0.05, 0.1]}], "failed"),
        ([{"mse": [0.5, 0.9], "accuracy": [0.05, 0.1]}], "in part (one seed)"),
        ([{"l1": [0.5, 0.9], "l1 beside the untouched input": [0.5, 0.4]}], "in part (one seed)"),
        ([{"l1": [0.95, 0.9], "l1 beside the untouched input": [0.95, 1.2]}], "failed"),
        ([{}], "no chance known"),
    ],
)
def test_the_gate_wants_more_than_luck_over_chance_in_its_metric_s_direction(pretext, words):
    """Catches a method that passes because another reference than chance is beaten."""
    assert gate(pretext)[0] == words


def test_the_gate_s_margin_is_three_standard_errors_of_the_seeds():
    """Catches a gate that seeds pass which lie above chance by luck."""
    seeds = [{"mse": [0.8 - 0.1 * seed, 0.9]} for seed in range(3)]  # mean excess .2, standard error .0577
    assert gate(seeds)[0] == "passed"
    assert gate([{"mse": [0.82 - 0.1 * seed, 0.9], "accuracy": [1.0, 0.1]} for seed in range(3)])[0] == "passed"
    assert gate([{"mse": [0.83 - 0.1 * seed, 0.9], "accuracy": [1.0, 0.1]} for seed in range(3)])[0] == "in part"
    assert gate([{"mse": [0.85 - 0.1 * seed, 0.9]} for seed in range(3)])[0] == "not shown"


def test_dice_of_a_case_is_the_mean_of_what_is_defined():
    dice = [[[0.5, None], [None, None]], [[0.7, 0.3], [None, None]]]
    assert case_dice(dice).tolist() == pytest.approx([0.5, NAN], nan_ok=True)


def test_pretext_metrics_are_those_of_held_out_cases_with_something_to_beat():
    epoch = {"val_mse": 0.5, "val_mse_chance": 0.9, "val_mse_other_case": 0.6, "val_loss": 1.0, "train_mse": 0.4}
    epoch |= {"val_l1": 0.3, "val_l1_untouched": 0.4}
    monitors = {"train_mse_chance": 0.8, "same_case_retrieval": 0.5, "same_case_retrieval_chance": 0.1}
    expected = {"mse": [0.5, 0.9], "l1 beside the untouched input": [0.3, 0.4], "mse by the second view": [0.5, 0.6]}
    assert pretext_metrics(epoch | monitors) == expected


def test_a_method_that_does_not_look_at_its_second_view_passes_in_part():
    """Catches a gate that takes beating the mean for looking where the method should look."""
    words, text = gate([{"mse": [0.94, 1.0], "mse by the second view": [0.941, 0.94]}])
    assert words == "in part (one seed)"
    assert text == "mse 0.940 (chance 1.000); mse by the second view 0.941 (chance 0.940)"


def test_the_sham_s_own_metric_stands_beside_but_decides_nothing():
    sham = [{"mse": [0.7, 0.9]}, {"mse": [0.8, 0.9]}]
    assert gate([{"mse": [0.85, 0.9]}], sham) == (
        "above chance (one seed)",
        "mse 0.850 (chance 0.900, sham 0.750)",
    )


@pytest.mark.parametrize(("file", "backbone"), [("unet.json", "cnn"), ("primus.json", "vit")])
def test_the_protocols_of_the_table_fit_every_method(file, backbone):
    trainers = tuple(name for name in TRAINERS.names() if backbone in TRAINERS.get(name).task.info.encoders)
    for name, protocol in read_settings(PROTOCOLS / file, trainers)["protocols"].items():
        assert TRAINERS.get(name).configured(protocol.settings, backbone).val_steps_per_epoch == 8
