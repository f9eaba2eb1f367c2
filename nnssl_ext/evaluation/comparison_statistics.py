"""Which of several methods is best, and how sure that is: pure functions of scores (arms, seeds, cases).

Three views, each conditional on something else:

- The *two-level bootstrap* draws seeds and patients, the same ones for all arms, and says how often each arm gets each
  rank, and between what limits every difference lies. It speaks about methods, as far as a few seeds can; with two or
  three it is rather too sure, hence a difference must also exceed what the luck of the seeds could make: half of
  Student's interval for the pair, and Tukey's honest difference for all pairs at once.
- *Friedman's test over patients* with *Nemenyi's critical difference* (Demsar 2006) speaks about the networks that were
  trained: another seed might rank them otherwise.
- The same *over seeds* (means over cases as blocks) speaks about methods, and can hardly ever separate them: there are
  too few blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from nnssl_ext.evaluation.statistics import CONFIDENCE, Array

MIN_BLOCKS = 2
MIN_ARMS = 2


@dataclass(frozen=True)
class RankTest:
    """Friedman's test and Nemenyi's critical difference over some blocks."""

    num_blocks: int
    mean_ranks: tuple[float, ...]
    """Of each arm, 1 is best; ties share their ranks."""
    p_value: float
    """Of Friedman's test that all arms are alike (chi-squared approximation; rough under ten blocks)."""
    critical_difference: float
    """Mean ranks further apart than this differ at the level .05, whatever pairs are looked at."""
    groups: tuple[tuple[int, ...], ...]
    """Largest sets of arms (by index, best first) whose mean ranks lie within the critical difference."""


def ranks_of(scores: Array) -> Array:
    """Ranks along the first axis, 1 for the highest; ties share the mean of their ranks.

    Args:
        scores: (arms, ...).
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(-scores, axis=0), dtype=float)


@cache
def studentised_range(num_arms: int, freedom: float) -> float:
    """The quantile at `CONFIDENCE` of the range of `num_arms` normal means in units of their standard error."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, num_arms, freedom))


def nemenyi_difference(num_arms: int, num_blocks: int) -> float:
    """Nemenyi's critical difference of mean ranks at the level .05 (Demsar 2006, eq. in section 3.2.2).

    `q * sqrt(k (k + 1) / (6 N))`, q the studentised range for infinite degrees of freedom divided by the root of 2.

    Args:
        num_arms: k, 2 or more.
        num_blocks: N, 1 or more.
    """
    q = studentised_range(num_arms, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(num_arms * (num_arms + 1) / (6 * num_blocks)))


def rank_test(scores: Array) -> RankTest | None:
    """Friedman's test over blocks, and who cannot be told apart.

    Args:
        scores: (arms, blocks), all defined, higher is better.

    Returns:
        The test, or None with fewer than two arms or blocks.
    """
    num_arms, num_blocks = scores.shape
    if num_arms < MIN_ARMS or num_blocks < MIN_BLOCKS:
        return None
    ranks = ranks_of(scores)
    means = ranks.mean(axis=1)
    difference = nemenyi_difference(num_arms, num_blocks)
    return RankTest(
        num_blocks=num_blocks,
        mean_ranks=tuple(float(rank) for rank in means),
        p_value=friedman(ranks),
        critical_difference=difference,
        groups=groups_within(means, difference),
    )


def friedman(ranks: Array) -> float:
    """The p of Friedman's test, corrected for ties; 1 where every block ties all arms.

    Args:
        ranks: (arms, blocks), 1 is best. Two arms will do, which scipy's function refuses.
    """
    from scipy.stats import chi2

    num_arms, num_blocks = ranks.shape
    between = float(((ranks.mean(axis=1) - (num_arms + 1) / 2) ** 2).sum()) * num_blocks
    within = float(((ranks - (num_arms + 1) / 2) ** 2).sum()) / (num_blocks * (num_arms - 1))
    return float(chi2.sf(between / within, num_arms - 1)) if within > 0 else 1.0


def groups_within(mean_ranks: Array, difference: float) -> tuple[tuple[int, ...], ...]:
    """Largest runs of arms, in the order of their mean ranks, whose ends are no further apart than `difference`.

    A run of a single arm is no group.
    """
    order = np.argsort(mean_ranks, kind="stable")
    found: list[tuple[int, ...]] = []
    for start in range(len(order)):
        gaps = mean_ranks[order[start:]] - mean_ranks[order[start]]
        run = tuple(int(index) for index in order[start : start + int((gaps <= difference).sum())])
        if len(run) > 1 and not (found and set(run) <= set(found[-1])):
            found.append(run)
    return tuple(found)


def rank_probabilities(means: Array) -> Array:
    """How often each arm got each rank in the resamples: (arms, ranks), rows and columns sum to 1.

    Args:
        means: (resamples, arms), higher is better. Ties share their ranks' probability equally.
    """
    num_resamples, num_arms = means.shape
    order = np.argsort(-means, axis=1, kind="stable")
    shares = np.zeros((num_arms, num_arms))
    for rank in range(num_arms):
        shares[:, rank] = np.bincount(order[:, rank], minlength=num_arms)
    tied = np.flatnonzero((np.diff(np.sort(means, axis=1), axis=1) == 0).any(axis=1))
    for row in tied:
        _share_ties(shares, means[row], order[row])
    return shares / num_resamples


def _share_ties(shares: Array, values: Array, order: Array) -> None:
    """Spreads the ranks of arms that tie in one resample evenly over those arms."""
    for value in np.unique(values):
        arms = np.flatnonzero(values == value)
        if len(arms) > 1:
            places = np.flatnonzero(np.isin(order, arms))
            shares[order[places], places] -= 1
            shares[np.ix_(arms, places)] += 1 / len(arms)


def honest_difference(scores: Array) -> float | None:
    """Tukey's honest significant difference of arms' means, with seeds as blocks: less may be the luck of the seeds.

    That luck is what is left of an arm's mean in a seed beside the arm's and the seed's own, pooled over arms, so it is
    steadier than a single pair's; and the limit holds for all pairs at once. For two arms it is half of Student's
    paired interval.

    Args:
        scores: (arms, seeds, cases), all defined.

    Returns:
        The difference at the level .05, in units of the scores, or None with fewer than two arms or seeds.
    """
    means = scores.mean(axis=2)
    num_arms, num_seeds = means.shape
    freedom = (num_arms - 1) * (num_seeds - 1)
    if freedom < 1:
        return None
    left = means - means.mean(axis=0, keepdims=True) - means.mean(axis=1, keepdims=True) + means.mean()
    variance = float((left**2).sum()) / freedom
    return studentised_range(num_arms, freedom) * float(np.sqrt(variance / num_seeds))


def seeds_in_favour(differences: Array) -> int:
    """In how many seeds the mean over cases is above zero: (seeds, cases)."""
    return int((differences.mean(axis=1) > 0).sum())


def pairs_of(order: Sequence[int]) -> list[tuple[int, int]]:
    """Every pair of arms, the better one first, the best arm's pairs first."""
    return [(first, second) for place, first in enumerate(order) for second in order[place + 1 :]]
