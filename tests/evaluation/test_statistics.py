import numpy as np
import pytest

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
    own = statistics.bootstrap_interval(values[None], np.random.default_rng(1))
    result = bootstrap((values,), np.mean, method="percentile", random_state=np.random.default_rng(2))
    assert (own.low, own.high) == pytest.approx(tuple(result.confidence_interval), abs=2e-3)


def slow_two_level(scores: np.ndarray, rng: np.random.Generator, num: int) -> tuple[float, float]:
    """Draws seeds and cases by index, and averages what was drawn."""
    means = []
    for _ in range(num):
        seeds = rng.integers(0, scores.shape[0], scores.shape[0])
        cases = rng.integers(0, scores.shape[1], scores.shape[1])
        means.append(np.nanmean(np.nanmean(scores[np.ix_(seeds, cases)], axis=0)))
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("with_gaps", [False, True])
def test_the_two_level_bootstrap_equals_a_slow_one(with_gaps: bool) -> None:
    scores = random().normal(0, 0.05, (3, 25)) + np.array([[-0.06], [0.0], [0.06]])
    if with_gaps:
        scores[0, 4] = scores[:, 7] = np.nan
    own = statistics.bootstrap_interval(scores, np.random.default_rng(1))
    assert (own.low, own.high) == pytest.approx(slow_two_level(scores, np.random.default_rng(2), 4000), abs=5e-3)


def test_seeds_that_disagree_widen_the_interval() -> None:
    cases = random().normal(0, 0.02, 30)
    agreeing = statistics.bootstrap_interval(np.stack([cases] * 3), random())
    disagreeing = statistics.bootstrap_interval(np.stack([cases - 0.1, cases, cases + 0.1]), random())
    assert disagreeing.high - disagreeing.low > 3 * (agreeing.high - agreeing.low)


def test_the_interval_of_one_case_is_unknown() -> None:
    assert statistics.bootstrap_interval(np.array([[0.5, np.nan]]), random()) is None


@pytest.mark.parametrize(("low", "high", "excluded"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)])
def test_an_interval_knows_whether_it_excludes_zero(low: float, high: float, excluded: bool) -> None:
    assert statistics.Interval(low, high).excludes_zero() is excluded


def test_the_sign_test_floor() -> None:
    assert [statistics.sign_test_floor(n) for n in (1, 3, 6)] == [1.0, 0.25, 1 / 32]


def test_undecidable_below_is_students_half_width_over_seeds() -> None:
    differences = np.array([[0.00, 0.02], [0.02, 0.04], [0.05, 0.05]])  # seed means .01 .03 .05
    expected = 4.302653 * 0.02 / np.sqrt(3)
    assert statistics.undecidable_below(differences) == pytest.approx(expected, rel=1e-4)
    assert statistics.undecidable_below(differences[:1]) is None
