"""Paired statistics over patients and seeds: intervals, tests, correction, and what the trainings cannot decide.

Scores come as arrays (seeds, cases). Arms are compared on the same case, after averaging the case over seeds; the unit
of chance is the patient, since the cases of one are alike. Two sources of chance stand behind a difference: which
patients were looked at, and the luck of a training (initialisation, label subset, order of batches). The unit of that
luck is one seed in one fold: the networks of two folds share nothing, although they share the number of a seed. A test
over patients is conditional on the networks that were trained; only what resamples or compares seeds speaks about the
method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
FEW_TRAININGS = 5
"""Under so many, bootstrap intervals are clearly too narrow."""
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


def patient_numbers(patients: Sequence[str] | NDArray[Any]) -> NDArray[np.int_]:
    """The patient of each case, numbered in the order of their first cases."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients])


def mean_over_patients(scores: Array, patients: Sequence[str] | NDArray[Any]) -> Array:
    """Mean of each patient over its defined cases: (..., cases) to (..., patients), NaN where there is none.

    Args:
        scores: (..., cases).
        patients: The patient of each case; their order becomes that of the first cases.
    """
    numbers = patient_numbers(patients)
    membership = (numbers[:, None] == np.unique(numbers)).astype(float)
    defined = np.isfinite(scores)
    totals, counts = np.where(defined, scores, 0.0) @ membership, defined @ membership
    return np.divide(totals, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


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
    scores: Array,
    folds: Sequence[int],
    random: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
    patients: Sequence[str] | NDArray[Any] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Two-level percentile bootstrap of the mean over cases: seeds and patients are resampled with replacement.

    Within a fold they are crossed: every seed's network scores the same cases, so a drawn patient's cases are averaged
    over the drawn seeds. Seeds are drawn for each fold by itself, patients over all folds with all of their cases.
    With one seed only patients are resampled.

    Args:
        scores: (seeds, cases), NaN where undefined.
        folds: Fold in which each case was validated, (cases,).
        random: Source of the draws.
        num_resamples: Number of resamples.
        patients: The patient of each case; None: every case is another's.
        confidence: Share of the resampled means that it holds.

    Returns:
        The interval, or None with fewer than two patients.
    """
    known = np.asarray(np.isfinite(scores).any(axis=0))
    chosen = (np.arange(len(known)) if patients is None else np.asarray(patients))[known]
    if len(set(chosen.tolist())) < 2:
        return None
    means = bootstrap_means(scores[None, :, known], np.asarray(folds)[known], random, num_resamples, chosen)
    return percentiles(means[:, 0], confidence)


def percentiles(means: Array, confidence: float = CONFIDENCE) -> Interval:
    """The interval that holds a share of the resampled means, as much beneath it as above."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(means[np.isfinite(means)], [tail, 1 - tail])
    return Interval(float(low), float(high))


def coverage_note(num_seeds: int, num_folds: int = 1) -> str:
    """What a caption has to say of bootstrap intervals over so few trainings; empty where they are enough.

    The shares come from simulations of differences whose luck is that of the seeds (docs/comparison.md).

    Args:
        num_seeds: 1 or more.
        num_folds: Folds whose networks share nothing; 1 where a seed's pretraining serves all folds.
    """
    if num_seeds == 1:
        return "With one seed the intervals hold the choice of patients alone, not the luck of a training."
    if num_seeds * num_folds >= FEW_TRAININGS:
        return ""
    return (
        "Over so few trainings the intervals are too narrow: those of differences hold the truth in about 80% of the "
        "trials with three seeds, 70% with two."
    )


def bootstrap_means(
    scores: Array,
    folds: Sequence[int] | NDArray[np.int_],
    random: np.random.Generator,
    num_resamples: int,
    patients: Sequence[str] | NDArray[Any] | None = None,
) -> Array:
    """Means of several arms over the same drawn seeds and patients; see `bootstrap_interval`.

    Args:
        scores: (arms, seeds, cases), NaN where undefined.
        folds: Fold in which each case was validated, (cases,).
        random: Source of the draws.
        num_resamples: Number of resamples.
        patients: The patient of each case; None: every case is another's.

    Returns:
        (resamples, arms), NaN where nothing that is defined was drawn.
    """
    fold_of, (num_arms, _, num_cases) = np.asarray(folds), scores.shape
    numbers = np.arange(num_cases) if patients is None else patient_numbers(patients)
    chances = np.full(numbers.max() + 1, 1 / (numbers.max() + 1))
    means = np.empty((num_resamples, num_arms))
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        weights = random.multinomial(len(chances), chances, size)[:, numbers].astype(float)
        per_case = np.empty((num_arms, size, num_cases))
        for fold in np.unique(fold_of):
            per_case[:, :, fold_of == fold] = _resampled_seeds(scores[:, :, fold_of == fold], random, size)
        drawn = weights * np.isfinite(per_case)
        totals, norm = (drawn * np.nan_to_num(per_case)).sum(axis=2), drawn.sum(axis=2)
        means[start : start + size] = np.divide(totals, norm, out=np.full(norm.shape, np.nan), where=norm > 0).T
    return means


def _resampled_seeds(scores: Array, random: np.random.Generator, size: int) -> Array:
    """Each case's mean over drawn seeds: (arms, seeds, cases) to (arms, size, cases), NaN where none is defined."""
    num_seeds = scores.shape[1]
    weights = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size).astype(float)
    defined = np.isfinite(scores)
    totals = weights @ np.where(defined, scores, 0.0)
    counts = weights @ defined.astype(float)
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)


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


def undecidable_below(differences: Array, folds: Sequence[int], num_tests: int = 1) -> float | None:
    """Size of mean difference that the luck of the trainings alone could make; a smaller one cannot be decided.

    It is the half width of Student's interval of the mean, in which a fold weighs as much as it has cases. With several
    seeds its spread is that of the seeds within each fold, with Satterthwaite's degrees of freedom for these weights
    (alike folds: pooled). With one seed all that is known is the spread over folds, which holds the luck of a training
    and the difficulty of a fold's cases together, so it is rather too large.

    Args:
        differences: (seeds, cases), NaN where undefined.
        folds: Fold in which each case was validated, (cases,).
        num_tests: How many differences are judged side by side; the level is divided by them (Bonferroni).

    Returns:
        The size, in units of the metric, or None with a single training, whose luck nothing tells.
    """
    from scipy.stats import t

    known = np.isfinite(differences).all(axis=0)
    fold_of = np.asarray(folds)[known]
    present, counts = np.unique(fold_of, return_counts=True)
    if len(present) == 0:
        return None
    units = np.stack([differences[:, known][:, fold_of == fold].mean(axis=1) for fold in present], axis=1)
    num_seeds, num_folds = units.shape
    if num_seeds * num_folds == 1:
        return None
    squares = (counts / counts.sum()) ** 2
    variances = units.var(axis=0, ddof=1) if num_seeds > 1 else units.var(ddof=1)
    freedom = (num_seeds - 1) * squares.sum() ** 2 / (squares**2).sum() if num_seeds > 1 else num_folds - 1
    error = np.sqrt((squares * variances).sum() / num_seeds)
    return float(t.ppf(1 - (1 - CONFIDENCE) / (2 * num_tests), freedom) * error)
