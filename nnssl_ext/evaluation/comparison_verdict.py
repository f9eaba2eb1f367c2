"""From the scores of an evaluation to a ranking, and to sentences that say no more than the numbers bear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.evaluation import comparison_statistics as ranks
from nnssl_ext.evaluation import statistics
from nnssl_ext.evaluation.analysis import BOOTSTRAP_SEED, ScoreTable, tabulate
from nnssl_ext.evaluation.comparison_records import Pair, RankedArm, Ranking
from nnssl_ext.evaluation.convergence import NEAR_ZERO_DICE
from nnssl_ext.evaluation.records import MEAN_CLASS, CaseScores, Comparison, Evaluation, NumTrain
from nnssl_ext.evaluation.statistics import Array
from nnssl_ext.evaluation.verdict import HEADLINE_METRIC, SIGNIFICANCE, listed, size_text, still_rising

CONDITIONS = (
    "Intervals and probabilities of ranks resample seeds (each a pretraining and its fine-tunings) and patients, the "
    "same draws for all arms. They are conditional on this data, this budget and these settings; with two or three "
    "seeds they are too narrow, so to count as decided a difference also has to exceed what the luck of the "
    "seeds could make: half of Student's interval over seeds, and Tukey's honest difference over all pairs.",
    "Wilcoxon's test, and Friedman's test with Nemenyi's critical difference over patients, are conditional on the "
    "networks that were trained: they say nothing about what another seed would give.",
    "Friedman's test over seeds speaks about the methods, but its blocks are as few as the seeds.",
)


_MOST_NAMES = 3


def rank_arms(
    scores: Sequence[CaseScores],
    labels: Mapping[str, str],
    sizes: Sequence[NumTrain],
    reservations: Mapping[NumTrain, str] | None = None,
) -> tuple[Ranking, ...]:
    """Ranks all arms at every training set size.

    Args:
        scores: Of `evaluation.json`; every arm has the same seeds and cases.
        labels: Arm to label.
        sizes: Training set sizes.
        reservations: As from `reservations_about`.

    Raises:
        ValueError: If there are fewer than two patients, or none of them has a class.
    """
    tables = tabulate(scores, HEADLINE_METRIC, MEAN_CLASS)
    found = [_rank(size, {label: tables[arm, size] for arm, label in labels.items()}) for size in sizes]
    adjusted = iter(statistics.holm([pair.row.p_value for ranking in found for pair in ranking.pairs]))
    corrected = []
    for ranking in found:
        rows = [replace(pair.row, p_holm=next(adjusted)) for pair in ranking.pairs]
        pairs = tuple(
            replace(pair, row=row, decided=is_decided(row)) for pair, row in zip(ranking.pairs, rows, strict=True)
        )
        known = replace(ranking, pairs=pairs, reservation=(reservations or {}).get(ranking.num_train, ""))
        corrected.append(replace(known, sentences=sentences(known)))
    return tuple(corrected)


def reservations_about(evaluation: Evaluation) -> dict[NumTrain, str]:
    """What takes from a ranking, by training set size: who had not finished learning, or from scratch did not begin."""
    rising = still_rising(evaluation.convergence)
    found: dict[NumTrain, str] = {}
    for size in evaluation.num_train:
        late = [arm.label for arm in evaluation.arms if (arm.name, size) in rising]
        rows = {a.label: evaluation.summary(a.name, size, HEADLINE_METRIC) for a in evaluation.arms if not a.pretrained}
        nothing = [label for label, row in rows.items() if row and row.mean is not None and row.mean < NEAR_ZERO_DICE]
        parts = [f"{listed(nothing)} learned next to nothing"] if nothing else []
        if late:
            who = listed(late) if len(late) <= _MOST_NAMES else f"{len(late)} of {len(evaluation.arms)} arms"
            parts.append(f"{who} had not finished learning")
        if parts:
            found[size] = f", but {listed(parts)}"
    return found


def _rank(size: NumTrain, tables: Mapping[str, ScoreTable]) -> Ranking:
    labels, scores = list(tables), np.stack([table.values for table in tables.values()])
    patients = next(iter(tables.values())).patients
    if len(set(patients)) < ranks.MIN_BLOCKS or not np.isfinite(scores).all():
        raise ValueError(
            f"a ranking needs 2 patients or more with a class in some label; there are {len(set(patients))}"
        )
    order = [int(index) for index in np.argsort(-scores.mean(axis=(1, 2)), kind="stable")]
    scores, labels = scores[order], [labels[index] for index in order]
    random = generator(BOOTSTRAP_SEED, "ranking", str(size))
    means = statistics.bootstrap_means(scores, [0] * scores.shape[2], random, statistics.NUM_RESAMPLES, patients)
    probabilities = ranks.rank_probabilities(means)
    arms = [
        RankedArm(
            label=label,
            mean=float(scores[index].mean()),
            interval=statistics.percentiles(means[:, index]),
            seed_means=tuple(float(mean) for mean in scores[index].mean(axis=1)),
            probabilities=tuple(float(share) for share in probabilities[index]),
        )
        for index, label in enumerate(labels)
    ]
    honest = ranks.honest_difference(scores)
    over_patients = statistics.mean_over_patients(scores.mean(axis=1), patients)
    pairs = [
        _pair(size, labels, scores, over_patients, means, honest, *two) for two in ranks.pairs_of(range(len(labels)))
    ]
    return Ranking(
        num_train=size,
        arms=tuple(arms),
        num_cases=scores.shape[2],
        pairs=tuple(pairs),
        over_cases=ranks.rank_test(over_patients),
        over_seeds=ranks.rank_test(scores.mean(axis=2)),
        sentences=(),
    )


def _pair(
    size: NumTrain,
    labels: Sequence[str],
    scores: Array,
    over_patients: Array,
    means: Array,
    honest: float | None,
    first: int,
    second: int,
) -> Pair:
    differences, per_patient = scores[first] - scores[second], over_patients[first] - over_patients[second]
    own = statistics.undecidable_below(differences, [0] * differences.shape[1])
    row = Comparison(
        arm=labels[first],
        num_train=size,
        metric=HEADLINE_METRIC,
        class_name=MEAN_CLASS,
        difference=float(differences.mean()),
        interval=statistics.percentiles(means[:, first] - means[:, second]),
        p_value=statistics.wilcoxon(per_patient),
        p_holm=None,
        num_pairs=len(per_patient),
        num_better=int((per_patient > 0).sum()),
        num_worse=int((per_patient < 0).sum()),
        undecidable_below=None if own is None or honest is None else max(own, honest),
    )
    favour = ranks.seeds_in_favour(differences)
    return Pair(first=labels[first], second=labels[second], row=row, seeds_in_favour=favour, decided=False)


def is_decided(row: Comparison) -> bool:
    """Whether a difference is more than patients, tests and seeds can explain by chance: the rule of `verdict`."""
    limit = row.undecidable_below
    return (
        row.p_holm is not None
        and row.p_holm < SIGNIFICANCE
        and row.interval is not None
        and row.interval.excludes_zero()
        and limit is not None
        and row.difference is not None
        and abs(row.difference) > limit
    )


def sentences(ranking: Ranking) -> tuple[str, ...]:
    """What can be said about a ranking: of its first arm, and of every pair that is decided."""
    top = ranking.arms[0]
    others = [arm.label for arm in ranking.arms[1:]]
    beaten = [label for label in others if _decided(ranking, top.label, label)]
    open_ = [label for label in others if label not in beaten]
    what = "seeds and patients" if len(top.seed_means) > 1 else "patients"
    first = (
        f"With {size_text(ranking.num_train)} {top.label} has the highest mean Dice ({top.mean:.3f}) and comes first "
        f"in {share_text(top.probabilities[0])} of the resamples of {what}"
    )
    if not open_:
        return (f"{first}; it is better than all others{ranking.reservation}.",)
    tail = (
        f"; it is better than {listed(beaten)}, and cannot be told from {listed(open_)}"
        if beaten
        else (f"; it cannot be told from {listed(open_)}")
    )
    decided = [p for p in ranking.pairs if p.decided and p.first != top.label]
    rest = [f"{p.first} is better than {p.second} ({p.row.difference:+.3f})." for p in decided]
    return (f"{first}{tail}{ranking.reservation}.", *rest)


def _decided(ranking: Ranking, first: str, second: str) -> bool:
    pair = ranking.pair(first, second)
    return pair is not None and pair.decided


def headline(rankings: Sequence[Ranking]) -> str:
    """One sentence about all sizes: which arms may be the best."""
    sizes: dict[str, list[str]] = {}
    for ranking in rankings:
        sizes.setdefault(_finding(ranking), []).append(str(ranking.num_train))
    text = "; ".join(f"with {listed(numbers)} training cases {finding}" for finding, numbers in sizes.items())
    return f"{text[0].upper()}{text[1:]}."


def _finding(ranking: Ranking) -> str:
    top, others = ranking.arms[0].label, [arm.label for arm in ranking.arms[1:]]
    equals = [label for label in others if not _decided(ranking, top, label)]
    beaten = {pair.second for pair in ranking.pairs if pair.decided and pair.first in equals}
    candidates = [top, *(label for label in equals if label not in beaten)]
    if len(candidates) == 1:
        return f"{top} is best{ranking.reservation}"
    if not any(pair.decided for pair in ranking.pairs):
        return f"no method can be told from another{ranking.reservation}"
    return f"the best is {listed(candidates, 'or')}, which cannot be told apart{ranking.reservation}"


def certainty(rankings: Sequence[Ranking], num_seeds: int) -> str:
    """What stands behind a ranking, and what its seeds cannot decide."""
    if num_seeds == 1:
        return (
            "One seed stands behind this: one pretraining of each method. Its luck is unknown, so no difference "
            "between methods is called decided, however many cases agree. Give --seeds 0 1 2 or more."
        )
    limits = [
        f"{_span(found)} with {size_text(ranking.num_train)}"
        for ranking in rankings
        if (found := [p.row.undecidable_below for p in ranking.pairs if p.row.undecidable_below is not None])
    ]
    return (
        f"{num_seeds} seeds stand behind this, each a pretraining of every method and its fine-tunings. Differences "
        f"under what the spread over these seeds leaves open cannot be decided: {'; '.join(limits)}. A sign "
        f"test over {num_seeds} seeds cannot give a p under {statistics.sign_test_floor(num_seeds):g} even if every "
        "seed agrees."
    )


def _span(values: Sequence[float]) -> str:
    ends = f"{min(values):.3f}", f"{max(values):.3f}"
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}, by pair,"


def share_text(share: float) -> str:
    """A percentage that is never rounded to certainty."""
    if 0 < share < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < share < 1 else "all" if share == 1 else f"{share:.0%}"
