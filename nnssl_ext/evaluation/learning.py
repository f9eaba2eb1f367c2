"""Whether a method learned anything of its own: pure functions of the scores of its runs on the same cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.evaluation.statistics import (
    CONFIDENCE,
    Array,
    bootstrap_interval,
    mean_over_seeds,
    undecidable_below,
)

HIGHER_IS_BETTER = ("accuracy", "retrieval", "known", "dice", "iou", "hit", "rank", "agreement", "ncc")
"""In the names of metrics that rise; all others are errors."""
_BEATEN = {"_chance": "", "_untouched": " beside the untouched input", "_other_case": " by the second view"}
"""Ends of the names of metrics that another one should beat, and what is then added to its name."""
_STRICTER = tuple(words for words in _BEATEN.values() if words)
"""What is harder to beat than chance."""
MARGIN = 3.0
"""Standard errors of the mean over seeds by which a metric must beat its chance. A metric at chance does with two seeds
one time in ten, with three one in twenty, with five one in fifty."""
FAILED, NOT_SHOWN = "failed", "not shown"
"""Of a gate: no metric is above chance; one is, but by no more than the luck of the seeds."""
_NOT_LEARNED = {FAILED: "did not learn its task", NOT_SHOWN: "learning its task not shown"}


def case_dice(dice: Any) -> Array:
    """Mean Dice of each test case over label subsets and foreground classes, (cases,), NaN where undefined.

    Args:
        dice: Nested lists (subsets, cases, classes) with null for what is undefined.
    """
    values = np.array(dice, dtype=float)
    defined = np.isfinite(values)
    counts, totals = defined.sum(axis=(0, 2)), np.where(defined, values, 0).sum(axis=(0, 2))
    return np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def without_nan(values: Any) -> Any:
    """Nested lists with null for what is undefined, which JSON can hold."""
    if isinstance(values, np.ndarray | list | tuple):
        return [without_nan(value) for value in values]
    return float(values) if np.isfinite(values) else None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference with its two-level bootstrap interval."""

    mean: float
    low: float
    high: float
    undecidable_below: float | None
    """What the luck of the trainings alone could make, in any row of the table; None with one seed."""
    num_seeds: int
    excludes_zero: bool = True
    """Whether the interval that holds for all rows of the table at once leaves 0 out, too."""

    @property
    def decided(self) -> bool:
        """Whether neither the luck of the trainings nor that of the cases could make it."""
        limit, outside = self.undecidable_below, not self.low <= 0 <= self.high
        return limit is not None and abs(self.mean) > limit and outside and self.excludes_zero

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{'' if self.decided else '?'}"


@dataclass(frozen=True)
class Luck:
    """How far the seeds of a difference scatter, pooled over the methods of a table."""

    variance: float = 0.0
    """Between the seeds of one method."""
    freedom: int = 1
    """Degrees of freedom, 1 or more."""
    num_methods: int = 1
    """Rows of the table, by which the level of what decides is divided (Bonferroni)."""

    def limit(self, num_seeds: int) -> float:
        """Size of difference that it could make in any row."""
        from scipy.stats import t

        return float(t.ppf(1 - (1 - CONFIDENCE) / (2 * self.num_methods), self.freedom)) * sqrt(
            self.variance / num_seeds
        )


def luck(pairs: Iterable[tuple[Mapping[int, Array], Mapping[int, Array]]]) -> Luck:
    """The luck of the seeds in a table, from the scores of each method and its reference, as `compare` takes them."""
    means = [np.array([np.nanmean(arm[s] - other[s]) for s in set(arm) & set(other)]) for arm, other in pairs]
    freedom = sum(max(len(values) - 1, 0) for values in means)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in means if len(values))
    return Luck(squares / max(freedom, 1), max(freedom, 1), max(len(means), 1))


def compare(
    arm: Mapping[int, Array], reference: Mapping[int, Array], name: str, of_table: Luck = Luck()
) -> Difference | None:
    """Arm minus reference over the seeds that both have; None without one, or with a single patient.

    Args:
        arm: Score of each patient, by seed.
        reference: The same.
        name: Of the comparison; its draws depend on it.
        of_table: The luck of the seeds in all rows of the table. A difference has to exceed it as well as that of its
            own few seeds, which may be alike by chance.
    """
    seeds = sorted(set(arm) & set(reference))
    if not seeds:
        return None
    differences = np.stack([arm[seed] - reference[seed] for seed in seeds])
    folds = [0] * differences.shape[1]
    interval, strict = (
        bootstrap_interval(differences, folds, generator("learning", name), confidence=1 - (1 - CONFIDENCE) / number)
        for number in (1, of_table.num_methods)
    )
    if interval is None or strict is None:
        return None
    own = undecidable_below(differences, folds)
    return Difference(
        mean=float(np.nanmean(mean_over_seeds(differences))),
        low=interval.low,
        high=interval.high,
        undecidable_below=None if own is None else max(own, of_table.limit(len(seeds))),
        num_seeds=len(seeds),
        excludes_zero=strict.excludes_zero(),
    )


def verdict(difference: Difference | None, gate: str) -> str:
    """What can be said of a method, from its difference to the sham run and the words of `gate`."""
    if gate in _NOT_LEARNED:
        return _NOT_LEARNED[gate]
    if difference is None:
        return "no sham"
    if difference.undecidable_below is None:
        return "undecided (one seed)"
    if not difference.decided:
        return "no gain over sham shown"
    return "beats sham" if difference.mean > 0 else "worse than sham"


def pretext_metrics(epoch: Mapping[str, float]) -> dict[str, list[float]]:
    """The metrics of an epoch on held-out cases that have something to beat: name to value and that.

    It is chance; of a method that undoes damage or a deformation also what leaving it gives, and of one that restores
    by a second view also its own error with another case's.

    Args:
        epoch: A line of `metrics.jsonl`.
    """
    found = {}
    for suffix, words in _BEATEN.items():
        for name in sorted(name.removesuffix(suffix) for name in epoch if name.endswith(suffix)):
            if name.startswith("val_"):
                found[name.removeprefix("val_") + words] = [epoch[name], epoch[name + suffix]]
    return found


def gate(
    pretext: Sequence[Mapping[str, Sequence[float]]], sham: Sequence[Mapping[str, Sequence[float]]] = ()
) -> tuple[str, str]:
    """Whether the method beats chance on held-out cases, and the metrics beside their chance, for the table.

    A metric does where its excess is more than the luck of the seeds (`_beats`). It is `passed` where all metrics beat
    what they should; `in part` where one beats its chance and another one does not beat what it should: its chance, the
    untouched input, or the second view of another case; `NOT_SHOWN` where none beats its chance, although the mean of
    one is above; else `FAILED`. With one seed, whose luck is unknown, the words say so.

    Args:
        pretext: Of each seed: name to value and chance.
        sham: The same of sham runs, for the table alone. Their value is what knowing all cases' average gives: they
            were asked for another case than the one they saw.
    """
    if not pretext or not pretext[0]:
        return "no chance known", "-"
    by_chance = [name for name in pretext[0] if not name.endswith(_STRICTER)]
    texts, beaten, above = [], {}, {}
    for name in pretext[0]:
        pairs = np.array([record[name] for record in pretext])
        excess = (pairs[:, 0] - pairs[:, 1]) * (1 if any(word in name for word in HIGHER_IS_BETTER) else -1)
        beaten[name], above[name] = _beats(excess), bool(excess.mean() > 0)
        blind = [record[name][0] for record in sham if name in record]
        beside = f", sham {np.mean(blind):.3f}" if blind else ""
        texts.append(f"{name} {pairs[:, 0].mean():.3f} (chance {pairs[:, 1].mean():.3f}{beside})")
    if any(beaten[name] for name in by_chance):
        words = "passed" if all(beaten.values()) else "in part"
        if len(pretext) == 1:
            words = f"{words.replace('passed', 'above chance')} (one seed)"
    else:
        words = NOT_SHOWN if any(above[name] for name in by_chance) else FAILED
    return words, "; ".join(texts)


def _beats(excess: Array) -> bool:
    """Whether the mean excess over seeds is more than `MARGIN` standard errors; with one seed, above 0."""
    error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return bool(excess.mean() > MARGIN * error)
