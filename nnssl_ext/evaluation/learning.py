"""Whether a method learned anything of its own: pure functions of the scores of its arms on the same cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.evaluation.statistics import Array, bootstrap_interval, undecidable_below

HIGHER_IS_BETTER = ("accuracy", "retrieval", "known", "dice", "iou", "hit", "rank", "agreement")
"""In the names of metrics that rise; all others are errors."""


def case_dice(record: Mapping[str, Any], source: str) -> Array:
    """Mean Dice of each test case over foreground classes and label subsets, (cases,), NaN where undefined."""
    values = np.array(record[source]["dice"], dtype=float)
    values = values if values.ndim == 3 else values[None]
    defined = np.isfinite(values)
    counts, totals = defined.sum(axis=(0, 2)), np.where(defined, values, 0).sum(axis=(0, 2))
    return np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference with its two-level bootstrap interval."""

    mean: float
    low: float
    high: float
    undecidable_below: float | None
    """What the luck of the trainings alone could make; None with one seed."""
    num_seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def compare(arm: Mapping[int, Array], reference: Mapping[int, Array], name: str) -> Difference | None:
    """Arm minus reference over the seeds that both have; None without one."""
    seeds = sorted(set(arm) & set(reference))
    if not seeds:
        return None
    differences = np.stack([arm[seed] - reference[seed] for seed in seeds])
    folds = [0] * differences.shape[1]
    interval = bootstrap_interval(differences, folds, generator("learning", name))
    assert interval is not None, "there are two test cases or more"
    mean = float(np.nanmean(differences))
    return Difference(mean, interval.low, interval.high, undecidable_below(differences, folds), len(seeds))


def verdict(difference: Difference | None) -> str:
    """What a difference to the sham run says of a method."""
    if difference is None:
        return "no sham"
    if difference.undecidable_below is None:
        return "undecided (one seed)"
    if difference.low > 0 and difference.mean > difference.undecidable_below:
        return "beats sham"
    if difference.mean <= 0:
        return "does not help here"
    return "undecided"


def gate(pretext: Sequence[Mapping[str, Sequence[float]]]) -> tuple[str, str]:
    """Whether every seed beats chance on held-out cases, and the metrics beside their chance, for the table."""
    if not pretext or not pretext[0]:
        return "no chance known", "-"
    texts, beaten = [], []
    for name in pretext[0]:
        pairs = np.array([record[name] for record in pretext])
        rising = any(word in name for word in HIGHER_IS_BETTER)
        better = pairs[:, 0] > pairs[:, 1] if rising else pairs[:, 0] < pairs[:, 1]
        beaten.append(bool(better.all()))
        texts.append(f"{name} {pairs[:, 0].mean():.3f} (chance {pairs[:, 1].mean():.3f})")
    words = "passed" if all(beaten) else "failed" if not any(beaten) else "in part"
    return words, "; ".join(texts)
