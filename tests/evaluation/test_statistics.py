import numpy as np
import pytest
from scipy.stats import t

from nnssl_ext.evaluation import statistics


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_holm_equals_the_published_example() -> None:
    # Holm 1979 as worked through in many textbooks: p-values .01 .04 .03 .005
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_unknown_p_out_of_the_family() -> None:
    adjusted = statistics.holm([0.02, None, 0.5, 0.9])
    assert adjusted[1] is None
    assert [adjusted[i] for i in (0, 2, 3)] == pytest.approx([0.06, 1.0, 1.0])


def test_wilcoxon_is_exact_for_small_samples() -> None:
    # all n differences positive: two-sided p is 2 / 2^n
    assert statistics.wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)
    assert statistics.wilcoxon(np.array([0.1, np.nan, 0.2, 0.3])) == pytest.approx(2 / 2**3)


def test_wilcoxon_of_nothing_and_of_no_difference() -> None:
    assert statistics.wilcoxon(np.array([np.nan, np.nan])) is None
    assert statistics.wilcoxon(np.zeros(4)) == 1.0


def test_means_over_seeds_skip_undefined_scores() -> None:
    scores = np.array([[0.2, np.nan, np.nan], [0.4, 0.6, np.nan]])
    means = statistics.mean_over_seeds(scores)
    assert means[:2] == pytest.approx([0.3, 0.6])
    assert np.isnan(means[2])
    patients = statistics.mean_over_patients(np.stack([means, [0.0, 1.0, 0.7]]), ["b", "a", "b"])
    assert patients == pytest.approx(np.array([[0.3, 0.6], [0.35, 1.0]]))  # b comes first


def test_one_seed_of_plain_nnunet_meets_every_seed_of_the_other_arm() -> None:
    plain, seeded = np.array([[0.5, 0.7]]), np.array([[0.6, 0.6], [0.4, 0.9]])
    assert statistics.paired_differences(plain, seeded) == pytest.approx(np.array([[-0.1, 0.1], [0.1, -0.2]]))
    with pytest.raises(ValueError, match="3 seeds cannot be paired with 2"):
        statistics.paired_differences(np.zeros((3, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="4 cases cannot be paired with 2"):
        statistics.paired_differences(np.zeros((1, 4)), np.zeros((1, 2)))


def test_with_one_seed_the_interval_is_scipys_bootstrap_over_cases() -> None:
    from scipy.stats import bootstrap

    values = random().normal(0.8, 0.1, 40)
    own = statistics.bootstrap_interval(values[None], [0] * 40, np.random.default_rng(1))
    result = bootstrap((values,), np.mean, method="percentile", random_state=np.random.default_rng(2))
    assert (own.low, own.high) == pytest.approx(tuple(result.confidence_interval), abs=2e-3)


def slow_two_level(scores: np.ndarray, folds: np.ndarray, rng: np.random.Generator, num: int) -> tuple[float, float]:
    """Draws cases, and for each fold seeds, by index; averages what was drawn."""
    means = []
    for _ in range(num):
        seeds = {fold: rng.integers(0, len(scores), len(scores)) for fold in set(folds.tolist())}
        drawn = [scores[seeds[folds[case]], case] for case in rng.integers(0, scores.shape[1], scores.shape[1])]
        per_case = [values[np.isfinite(values)].mean() for values in drawn if np.isfinite(values).any()]
        means.append(np.mean(per_case))
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("with_gaps", [False, True])
@pytest.mark.parametrize("num_folds", [1, 3])
def test_the_two_level_bootstrap_equals_a_slow_one(with_gaps: bool, num_folds: int) -> None:
    folds = np.arange(24) % num_folds
    luck = random().normal(0, 0.05, (3, num_folds))
    scores = random().normal(0, 0.05, (3, 24)) + luck[:, folds]
    if with_gaps:
        scores[0, 4] = scores[:, 7] = np.nan
    own = statistics.bootstrap_interval(scores, folds, np.random.default_rng(1))
    expected = slow_two_level(scores, folds, np.random.default_rng(2), 4000)
    assert (own.low, own.high) == pytest.approx(expected, abs=4e-3)


def test_seeds_that_disagree_widen_the_interval() -> None:
    cases = random().normal(0, 0.02, 30)
    agreeing = statistics.bootstrap_interval(np.stack([cases] * 3), [0] * 30, random())
    disagreeing = statistics.bootstrap_interval(np.stack([cases - 0.1, cases, cases + 0.1]), [0] * 30, random())
    assert disagreeing.high - disagreeing.low > 3 * (agreeing.high - agreeing.low)


def test_captions_say_what_few_trainings_leave_out() -> None:
    """Catches two seeds in two folds taken for enough, and one seed whose interval seems to hold its luck."""
    assert "not the luck of a training" in statistics.coverage_note(1, 5)
    assert "about 80% of the trials with three" in statistics.coverage_note(2, 2)
    assert statistics.coverage_note(3, 2) == ""


def test_the_interval_of_one_case_is_unknown() -> None:
    assert statistics.bootstrap_interval(np.array([[0.5, np.nan]]), [0, 0], random()) is None


@pytest.mark.parametrize(("low", "high", "excluded"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)])
def test_an_interval_knows_whether_it_excludes_zero(low: float, high: float, excluded: bool) -> None:
    assert statistics.Interval(low, high).excludes_zero() is excluded


def test_the_sign_test_floor() -> None:
    assert [statistics.sign_test_floor(n) for n in (1, 3, 6)] == [1.0, 0.25, 1 / 32]


def test_undecidable_below_in_one_fold_is_students_half_width_over_seeds() -> None:
    differences = np.array([[0.00, 0.02], [0.02, 0.04], [0.05, 0.05]])  # seed means .01 .03 .05
    expected = 4.302653 * 0.02 / np.sqrt(3)
    assert statistics.undecidable_below(differences, [0, 0]) == pytest.approx(expected, rel=1e-4)
    assert statistics.undecidable_below(differences, [0, 0], 5) == pytest.approx(
        expected * 9.924843 / 4.302653, rel=1e-4
    )


def test_undecidable_below_pools_the_seeds_within_folds() -> None:
    # fold 0 is easy and fold 1 is hard, which is not the seeds' doing: within each the seeds are .02 apart
    differences = np.array([[0.10, 0.30], [0.12, 0.32]])
    expected = (
        4.302653 * np.sqrt(2e-4) / np.sqrt(4)
    )  # variance .01^2 + .01^2 per fold, 2 degrees of freedom, 4 trainings
    assert statistics.undecidable_below(differences, [0, 1]) == pytest.approx(expected, rel=1e-4)


def test_folds_weigh_as_much_as_they_have_cases_in_what_the_seeds_cannot_decide() -> None:
    """Catches the large fold, on which the mean hangs, counting no more than a small one."""
    differences = np.array([[0.10, 0.12, 0.10, 0.30], [0.14, 0.16, 0.14, 0.31]])  # seeds differ by .04 and by .01
    error = np.sqrt((0.75**2 * 8e-4 + 0.25**2 * 5e-5) / 2)
    freedom = (9 + 1) ** 2 / (81 + 1)
    expected = t.ppf(0.975, freedom) * error
    assert statistics.undecidable_below(differences, [0, 0, 0, 1]) == pytest.approx(expected)


def test_undecidable_below_of_one_seed_is_the_spread_over_folds() -> None:
    differences = np.array([[0.01, 0.01, 0.03, 0.05]])
    expected = 4.302653 * 0.02 * np.sqrt(2**2 + 1 + 1) / 4  # fold means .01 .03 .05 of 2, 1 and 1 cases
    assert statistics.undecidable_below(differences, [0, 0, 1, 2]) == pytest.approx(expected, rel=1e-4)
    assert statistics.undecidable_below(differences, [0, 0, 0, 0]) is None
    assert statistics.undecidable_below(np.array([[np.nan]]), [0]) is None


def test_the_limit_catches_an_effect_of_pure_luck_as_often_as_it_says() -> None:
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        luck = rng.normal(0, 0.02, (3, 5))
        differences = luck[:, np.repeat(np.arange(5), 4)]
        wrong += abs(differences.mean()) > statistics.undecidable_below(differences, np.repeat(np.arange(5), 4))
    assert wrong / 400 == pytest.approx(0.05, abs=0.03)
