"""Paired statistics over cases and seeds: intervals, tests, correction, and what the number of seeds cannot decide.

Scores come as arrays (seeds, cases). A case is the unit of pairing: arms are compared on the same case, after averaging
the case over seeds. Two sources of chance stand behind a difference: which cases were looked at, and which random seeds
(initialisation, label subset, order of batches) the networks were trained with. A test over cases is conditional on the
networks that were trained; only the two-level bootstrap, which resamples seeds and cases, speaks about the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """A two-sided interval at the level `CONFIDENCE`."""

    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def mean_over_seeds(scores: Array) -> Array:
    """Mean of each case over the seeds in which it is defined: (seeds, cases) to (cases,), NaN where it never is."""
    defined = np.isfinite(scores)
    counts = defined.sum(axis=0)
    totals = np.where(defined, scores, 0.0).sum(axis=0)
    return np.divide(totals, counts, out=np.full(scores.shape[1], np.nan), where=counts > 0)


def paired_differences(arm: Array, reference: Array) -> Array:
    """Arm minus reference, per seed and case.

    Args:
        arm: (seeds, cases).
        reference: (seeds, cases); either side may have a single seed (plain nnU-Net is not seeded), which then meets
            every seed of the other.

    Returns:
        (seeds, cases), NaN where either side is undefined.

    Raises:
        ValueError: If the cases differ in number, or the seeds differ and neither side has just one.
    """
    if arm.shape[1] != reference.shape[1]:
        raise ValueError(f"{arm.shape[1]} cases cannot be paired with {reference.shape[1]}")
    if arm.shape[0] != reference.shape[0] and 1 not in (arm.shape[0], reference.shape[0]):
        raise ValueError(f"{arm.shape[0]} seeds cannot be paired with {reference.shape[0]}")
    return np.asarray(arm - reference)


def bootstrap_interval(
    scores: Array, random: np.random.Generator, num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """Two-level percentile bootstrap of the mean: seeds and cases are resampled with replacement, crossed.

    They are crossed, not nested: every seed scores the same cases, so one draw of cases serves all drawn seeds. With
    one seed only cases are resampled, and the interval is conditional on that seed.

    Args:
        scores: (seeds, cases), NaN where undefined.
        random: Source of the draws.
        num_resamples: Number of resamples.

    Returns:
        The interval, or None with fewer than two cases.
    """
    scores = scores[:, np.isfinite(scores).any(axis=0)]
    seeds, cases = scores.shape
    if cases < 2:
        return None
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        case_weights = random.multinomial(cases, np.full(cases, 1 / cases), size).astype(float)
        seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size).astype(float)
        means[start : start + size] = _weighted_means(scores, seed_weights, case_weights)
    means = means[np.isfinite(means)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _weighted_means(scores: Array, seed_weights: Array, case_weights: Array) -> Array:
    """Mean over cases of the mean over seeds, one per row of weights."""
    defined = np.isfinite(scores)
    totals = seed_weights @ np.where(defined, scores, 0.0)
    counts = seed_weights @ defined.astype(float)
    per_case = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
    present = case_weights * (counts > 0)
    norm = present.sum(axis=1)
    return np.divide((present * per_case).sum(axis=1), norm, out=np.full(len(norm), np.nan), where=norm > 0)


def wilcoxon(differences: Array) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test on paired differences; 1 when all are zero, None without a pair.

    Zero differences are dropped (Wilcoxon 1945).

    Args:
        differences: (cases,), NaN where undefined.
    """
    from scipy.stats import wilcoxon as signed_rank

    values = differences[np.isfinite(differences)]
    if len(values) == 0:
        return None
    if not np.any(values):
        return 1.0
    return float(signed_rank(values).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Holm 1979) over one family of tests; None stays None and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = highest
    return adjusted


def sign_test_floor(num_seeds: int) -> float:
    """Smallest two-sided p that a sign test over `num_seeds` independent seeds can reach: 2^(1 - seeds)."""
    return float(2.0 ** (1 - num_seeds))


def undecidable_below(differences: Array) -> float | None:
    """Size of mean difference under which this number of seeds cannot tell an effect from the luck of the seeds.

    It is the half width of Student's interval over the seeds' own mean differences.

    Args:
        differences: (seeds, cases).

    Returns:
        The size, in units of the metric, or None with fewer than two seeds (their spread is then unknown).
    """
    from scipy.stats import t

    per_seed = mean_over_seeds(differences.T)
    per_seed = per_seed[np.isfinite(per_seed)]
    if len(per_seed) < 2:
        return None
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(per_seed) - 1))
    return quantile * float(per_seed.std(ddof=1)) / float(np.sqrt(len(per_seed)))
