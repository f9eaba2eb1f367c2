"""From scores of single cases to means, intervals and paired comparisons; pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.evaluation import convergence, statistics
from nnssl_ext.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from nnssl_ext.evaluation.records import (
    MEAN_CLASS,
    CaseScores,
    Comparison,
    Convergence,
    NumTrain,
    Run,
    Summary,
)

BOOTSTRAP_SEED = 20241
"""Any fixed number: the same scores give the same intervals."""


@dataclass(frozen=True)
class ScoreTable:
    """One metric of one class for one arm and size: (seeds, cases), NaN where undefined."""

    values: statistics.Array
    cases: tuple[str, ...]
    folds: tuple[int, ...]
    """Fold in which each case was validated."""
    patients: tuple[str, ...]
    """The patient of each case."""
    seeds: tuple[int | None, ...]


def one_fold(table: ScoreTable) -> ScoreTable:
    """As if all cases were of one fold: a seed's networks share a pretraining over all folds, so the seed is drawn."""
    return replace(table, folds=(0,) * len(table.folds))


def tabulate(scores: Iterable[CaseScores], metric: str, class_name: str) -> dict[tuple[str, NumTrain], ScoreTable]:
    """Arranges scores by arm and size.

    Args:
        scores: Scores of single cases.
        metric: One of `METRICS`.
        class_name: A class, or `MEAN_CLASS` for the mean over classes. One that no case holds is undefined.

    Raises:
        ValueError: If a case was validated twice by one arm, size and seed.
    """
    groups: dict[tuple[str, NumTrain], list[CaseScores]] = defaultdict(list)
    for score in scores:
        groups[score.arm, score.num_train].append(score)
    held = {name for group in groups.values() for score in group for name in score.classes if _holds(score, name)}
    names = held if class_name == MEAN_CLASS else held & {class_name}
    return {key: _table(group, metric, names) for key, group in groups.items()}


def _holds(score: CaseScores, class_name: str) -> bool:
    return score.classes[class_name].reference_voxels > 0


def num_absent(scores: Iterable[CaseScores], class_name: str) -> int:
    """Cases whose reference lacks a class."""
    return len({score.case for score in scores if not _holds(score, class_name)})


def _table(group: Sequence[CaseScores], metric: str, names: Collection[str]) -> ScoreTable:
    fold_of = {score.case: score.fold for score in group}
    patient_of = {score.case: score.patient or score.case for score in group}
    cases = sorted(fold_of)
    seeds = sorted({score.seed for score in group}, key=lambda seed: -1 if seed is None else seed)
    values = np.full((len(seeds), len(cases)), np.nan)
    seen: set[tuple[int | None, str]] = set()
    for score in group:
        if (score.seed, score.case) in seen:
            raise ValueError(f"case {score.case} was validated more than once by {score.arm} (seed {score.seed})")
        seen.add((score.seed, score.case))
        values[seeds.index(score.seed), cases.index(score.case)] = _value(score, metric, names)
    return ScoreTable(
        values=values,
        cases=tuple(cases),
        folds=tuple(fold_of[case] for case in cases),
        patients=tuple(patient_of[case] for case in cases),
        seeds=tuple(seeds),
    )


def _value(score: CaseScores, metric: str, names: Collection[str]) -> float:
    values = [row.metric(metric) for name, row in score.classes.items() if name in names]
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else float("nan")


def class_names(classes: Mapping[str, Sequence[int]]) -> list[str]:
    """What is reported on: the mean first, then each class; with a single class only that mean."""
    return [MEAN_CLASS] if len(classes) == 1 else [MEAN_CLASS, *classes]


def summarise(scores: Sequence[CaseScores], names: Sequence[str], shared: Collection[str] = ()) -> list[Summary]:
    """Means with bootstrap intervals, per arm, size, metric and class.

    Args:
        scores: Scores of single cases.
        names: As from `class_names`.
        shared: Arms whose seeds have a pretraining each, which all folds share.
    """
    rows = []
    for metric in METRICS:
        for name in names:
            for (arm, size), table in tabulate(scores, metric, name).items():
                rows.append(_summary(arm, size, metric, name, table, one_fold(table) if arm in shared else table))
    return rows


def _summary(arm: str, size: NumTrain, metric: str, name: str, table: ScoreTable, units: ScoreTable) -> Summary:
    per_case = statistics.mean_over_seeds(table.values)
    known = per_case[np.isfinite(per_case)]
    folds = np.array(table.folds)
    per_seed = {seed: row[np.isfinite(row)] for seed, row in zip(table.seeds, table.values, strict=True)}
    return Summary(
        arm=arm,
        num_train=size,
        metric=metric,
        class_name=name,
        mean=float(known.mean()) if len(known) else None,
        interval=_interval(units, "mean", metric, name),
        num_cases=len(known),
        num_seeds=len(table.seeds),
        fold_means=_means_of({int(f): _finite(per_case[folds == f]) for f in np.unique(folds)}),
        seed_means=_means_of({seed: row for seed, row in per_seed.items() if seed is not None}),
    )


def _interval(units: ScoreTable, *draws: str) -> statistics.Interval | None:
    random = generator(BOOTSTRAP_SEED, *draws)
    return statistics.bootstrap_interval(units.values, units.folds, random, patients=units.patients)


def _finite(values: statistics.Array) -> statistics.Array:
    return values[np.isfinite(values)]


def _means_of(groups: Mapping[int, statistics.Array]) -> dict[int, float]:
    return {key: float(values.mean()) for key, values in groups.items() if len(values)}


def compare(
    scores: Sequence[CaseScores], baselines: Mapping[str, str], names: Sequence[str], shared: Collection[str] = ()
) -> list[Comparison]:
    """Arms against their baselines, paired by case and tested over patients; `names` as from `class_names`.

    There are two families of tests for each metric: the mean over classes (arms x sizes), on which the verdict stands,
    and the single classes (arms x sizes x classes). Holm's correction and the limit of the seeds count their rows. In
    arms that are `shared` the seeds have a pretraining each, which all folds share: the unit of luck is the seed.

    Raises:
        ValueError: If an arm and its baseline were not validated on the same cases.
    """
    rows: list[Comparison] = []
    for metric in METRICS:
        for family in ([n for n in names if n == MEAN_CLASS], [n for n in names if n != MEAN_CLASS]):
            pairs = [(name, *pair) for name in family for pair in _pairs(scores, baselines, metric, name, shared)]
            rows += _correct([_comparison(arm, metric, name, table, len(pairs)) for name, arm, table in pairs])
    return rows


def _pairs(
    scores: Sequence[CaseScores], baselines: Mapping[str, str], metric: str, name: str, shared: Collection[str]
) -> list[tuple[tuple[str, NumTrain], ScoreTable]]:
    """Differences of every arm and size to the baseline."""
    tables = tabulate(scores, metric, name)
    rows = []
    for (arm, size), table in tables.items():
        reference = baselines.get(arm, "")
        if (reference, size) not in tables:
            continue
        base = tables[reference, size]
        if table.cases != base.cases:
            odd = sorted(set(table.cases) ^ set(base.cases))
            raise ValueError(
                f"{arm} and {reference} were not validated on the same cases with {size} training cases "
                f"({len(odd)} differ, for example {odd[0]}), so they cannot be paired"
            )
        pairs = _paired(table, base)
        rows.append(((arm, size), one_fold(pairs) if {arm, reference} & {*shared} else pairs))
    return rows


def _paired(table: ScoreTable, base: ScoreTable) -> ScoreTable:
    """Differences per seed and case; averaged over seeds where one side has just one, whose luck is not known."""
    differences = statistics.paired_differences(table.values, base.values)
    if 1 in (len(table.seeds), len(base.seeds)):
        differences = statistics.mean_over_seeds(differences)[None]
    return replace(table, values=differences)


def _comparison(key: tuple[str, NumTrain], metric: str, name: str, pairs: ScoreTable, num_tests: int) -> Comparison:
    per_case = statistics.mean_over_seeds(pairs.values)
    known, per_patient = _finite(per_case), _finite(statistics.mean_over_patients(per_case, pairs.patients))
    gains = per_patient if HIGHER_IS_BETTER[metric] else -per_patient
    return Comparison(
        arm=key[0],
        num_train=key[1],
        metric=metric,
        class_name=name,
        difference=float(known.mean()) if len(known) else None,
        interval=_interval(pairs, "difference", metric, name),
        p_value=statistics.wilcoxon(per_patient),
        p_holm=None,
        num_pairs=len(per_patient),
        num_better=int((gains > 0).sum()),
        num_worse=int((gains < 0).sum()),
        undecidable_below=statistics.undecidable_below(pairs.values, pairs.folds, num_tests),
    )


def _correct(rows: Sequence[Comparison]) -> list[Comparison]:
    adjusted = statistics.holm([row.p_value for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def judge_convergence(runs: Sequence[Run]) -> list[Convergence]:
    """The still-rising rule on the mean curve of each arm and size."""
    groups: dict[tuple[str, NumTrain], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.arm, run.num_train].append(run)
    rows = []
    for (arm, size), group in groups.items():
        dice = convergence.mean_curve([run.curve.dice for run in group])
        loss = convergence.mean_curve([run.curve.val_loss for run in group])
        trend = convergence.judge(dice, loss)
        rows.append(Convergence(arm=arm, num_train=size, trend=trend, num_runs=len(group)))
    return rows
