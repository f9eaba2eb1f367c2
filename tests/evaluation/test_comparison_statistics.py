import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from nnssl_ext.core.random import generator
from nnssl_ext.evaluation import comparison_statistics as compared
from nnssl_ext.evaluation import statistics


@pytest.mark.parametrize(
    ("num_arms", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (10, 3.164)]
)
def test_nemenyis_difference_has_the_published_constants(num_arms: int, q: float) -> None:
    """Table 5(a) of Demsar 2006. Fails where the studentised range is not divided by the root of 2."""
    expected = q * np.sqrt(num_arms * (num_arms + 1) / (6 * 14))
    assert compared.nemenyi_difference(num_arms, 14) == pytest.approx(expected, abs=6e-4)


def test_the_papers_own_example() -> None:
    """Demsar 2006, section 3.2.3: mean ranks of 4 classifiers on 14 data sets, CD = 1.25, nothing is told apart."""
    difference = compared.nemenyi_difference(4, 14)
    assert difference == pytest.approx(1.25, abs=0.005)
    assert compared.groups_within(np.array([3.143, 2.000, 2.893, 1.964]), difference) == ((3, 1, 2, 0),)


@pytest.mark.parametrize("num_arms", [3, 5])
def test_friedman_agrees_with_scipy_also_on_ties(num_arms: int) -> None:
    """Fails where ties are not corrected for."""
    scores = generator("friedman", num_arms).integers(0, 4, (num_arms, 12)).astype(float)
    assert compared.rank_test(scores).p_value == pytest.approx(friedmanchisquare(*scores).pvalue)


def test_two_arms_and_all_ties() -> None:
    wins = np.array([[1.0] * 9 + [0.0], [0.0] * 9 + [1.0]])
    assert compared.rank_test(wins).p_value == pytest.approx(0.0114, abs=1e-4)  # (9 - 1)^2 / 10 = 6.4, one degree
    assert compared.rank_test(np.ones((3, 5))).p_value == 1.0
    assert compared.rank_test(np.ones((3, 1))) is None
    assert compared.rank_test(np.ones((1, 5))) is None


def test_ranks_are_one_for_the_highest_and_shared_by_ties() -> None:
    np.testing.assert_array_equal(compared.ranks_of(np.array([[0.9], [0.5], [0.5], [0.1]]))[:, 0], [1, 2.5, 2.5, 4])


@pytest.mark.parametrize(
    ("ranks", "difference", "groups"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0, ((0, 1), (1, 2), (2, 3))),
        ([4.0, 1.0, 2.0, 2.5], 1.5, ((1, 2, 3), (3, 0))),
        ([1.0, 3.0], 1.0, ()),
        ([1.0, 1.5, 2.0], 2.0, ((0, 1, 2),)),
    ],
)
def test_groups_are_the_largest_that_cannot_be_told_apart(ranks, difference, groups) -> None:
    assert compared.groups_within(np.array(ranks), difference) == groups


def test_rank_probabilities_count_resamples_and_share_ties() -> None:
    means = np.array([[0.9, 0.5, 0.1], [0.9, 0.1, 0.5], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2]])
    expected = np.array([[2.5 + 1 / 3, 0.5 + 1 / 3, 1 / 3], [0.5 + 1 / 3, 1.5 + 1 / 3, 1 + 1 / 3]]) / 4
    found = compared.rank_probabilities(means)
    np.testing.assert_allclose(found[:2], expected)
    np.testing.assert_allclose(found.sum(axis=0), 1)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_arms_share_the_draws_of_seeds_and_cases() -> None:
    """Two arms that differ by a constant differ by it in every resample; fails where each arm has draws of its own."""
    first = generator("paired").normal(0.7, 0.1, (3, 20))
    means = statistics.bootstrap_means(np.stack([first, first - 0.01]), [0] * 20, generator("draws"), 200)
    np.testing.assert_allclose(means[:, 0] - means[:, 1], 0.01)
    assert np.std(means[:, 0]) > 0.005


def test_bootstrap_means_as_drawn_one_by_one() -> None:
    """Against a slow copy of the definition, with a score that is missing in one seed."""
    scores = generator("slow").normal(size=(2, 3, 5))
    scores[1, 0, 2] = np.nan
    folds = [0, 0, 1, 1, 1]
    found = statistics.bootstrap_means(scores, folds, generator("same"), 4)
    random = generator("same")
    cases = random.multinomial(5, np.full(5, 0.2), 4)
    seeds = {fold: random.multinomial(3, np.full(3, 1 / 3), 4) for fold in (0, 1)}
    for resample in range(4):
        for arm in range(2):
            values, weights = [], []
            for case, fold in enumerate(folds):
                drawn = [
                    s for s in range(3) for _ in range(seeds[fold][resample, s]) if np.isfinite(scores[arm, s, case])
                ]
                if drawn:
                    values.append(np.mean([scores[arm, s, case] for s in drawn]))
                    weights.append(cases[resample, case])
            assert found[resample, arm] == pytest.approx(np.average(values, weights=weights))


def simulate(num_seeds: int, trial: int, num_cases: int = 20) -> np.ndarray:
    """Differences (seeds, cases) of two arms that do not differ: of each .02 over seeds, .02 of seeds and cases."""
    random = generator("coverage", num_seeds, trial)
    luck, noise = random.normal(0, 0.02, (2, num_seeds, 1)), random.normal(0, 0.02, (2, num_seeds, num_cases))
    return np.subtract(*(luck + noise))


@pytest.mark.parametrize(("num_seeds", "lowest", "highest"), [(3, 0.72, 0.86), (10, 0.86, 0.98)])
def test_coverage_of_the_interval_over_seeds_and_cases(num_seeds: int, lowest: float, highest: float) -> None:
    """The interval holds the truth about as often as it says with ten seeds; with three in 80%, and captions say so.

    Fails where seeds are not drawn.
    """
    assert ("too narrow" in statistics.coverage_note(num_seeds)) is (highest < 0.9)
    held = []
    for trial in range(200):
        means = statistics.bootstrap_means(simulate(num_seeds, trial)[None], [0] * 20, generator("x", trial), 400)[:, 0]
        interval = statistics.percentiles(means)
        held.append(interval.low <= 0 <= interval.high)
    assert lowest <= np.mean(held) <= highest


def test_the_luck_of_three_seeds_is_seldom_called_a_difference() -> None:
    """What is decided has to exceed Student's interval over seeds too; without that, a tenth of nothing is decided."""
    beyond = []
    for trial in range(400):
        differences = simulate(3, trial, num_cases=200)
        beyond.append(abs(differences.mean()) > statistics.undecidable_below(differences, [0] * 200))
    assert np.mean(beyond) < 0.08


def test_seeds_in_favour_and_pairs() -> None:
    assert compared.seeds_in_favour(np.array([[0.1, 0.2], [-0.3, 0.1], [0.0, 0.1]])) == 2
    assert compared.pairs_of([2, 0, 1]) == [(2, 0), (2, 1), (0, 1)]


def test_tukeys_difference_of_two_arms_is_half_of_students_paired_interval() -> None:
    """Fails where the studentised range is not that of a difference, or the degrees of freedom are of one arm alone."""
    scores = generator("tukey").normal(size=(2, 4, 6))
    own = statistics.undecidable_below(scores[0] - scores[1], [0] * 6)
    assert compared.honest_difference(scores) == pytest.approx(own)
    assert compared.honest_difference(scores[:, :1]) is None
    assert compared.honest_difference(scores[:1]) is None


def test_among_many_equal_arms_luck_is_seldom_called_a_difference() -> None:
    """Six arms that do not differ, three seeds: fifteen pairs. Fails where the limit is that of single pairs."""
    wrong, wrong_alone = [], []
    for trial in range(150):
        random = generator("equal arms", trial)
        scores = np.repeat(random.normal(0, 0.02, (6, 3, 1)), 2, axis=2)
        means, limit = scores.mean(axis=(1, 2)), compared.honest_difference(scores)
        pairs = compared.pairs_of(range(6))
        alone = [statistics.undecidable_below(scores[a] - scores[b], [0, 0]) for a, b in pairs]
        apart = [abs(means[a] - means[b]) for a, b in pairs]
        wrong.append(any(gap > max(own, limit) for gap, own in zip(apart, alone, strict=True)))
        wrong_alone.append(any(gap > own for gap, own in zip(apart, alone, strict=True)))
    assert np.mean(wrong) < 0.08
    assert np.mean(wrong_alone) > 0.15
