"""The rows of the report's tables, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_ext.evaluation.analysis import class_names
from nnssl_ext.evaluation.records import MEAN_CLASS, Comparison, Evaluation, NumTrain, Outcome, Summary, Verdict
from nnssl_ext.evaluation.statistics import Interval

DASH = "\u2013"
_DIGITS = {"dice": 3, "nsd": 3, "hd95": 2}
_SMALLEST_P = 0.001


@dataclass(frozen=True)
class Card:
    """One training set size of a verdict, in large type."""

    size: str
    reference: str
    arm: str
    difference: str
    interval: str
    outcome: Outcome


@dataclass(frozen=True)
class ScoreRow:
    """One arm at one size and class."""

    size: str
    class_name: str
    arm: str
    arm_name: str
    mean: str
    interval: str
    difference: str
    difference_interval: str
    p_holm: str
    counts: str
    significant: bool
    first_of_size: bool
    first_of_class: bool


def number(value: float | None, metric: str = "dice", *, signed: bool = False) -> str:
    """A value with the digits that its metric deserves, with a true minus sign; a dash where there is none."""
    if value is None:
        return DASH
    text = f"{value:+.{_DIGITS[metric]}f}" if signed else f"{value:.{_DIGITS[metric]}f}"
    return text.replace("-", "\u2212")


def interval(value: Interval | None, metric: str = "dice", *, signed: bool = False) -> str:
    """`low to high`, or a dash."""
    if value is None:
        return DASH
    return f"{number(value.low, metric, signed=signed)} to {number(value.high, metric, signed=signed)}"


def p_text(p: float | None) -> str:
    """A p value with three digits."""
    if p is None:
        return DASH
    return f"< {_SMALLEST_P}" if p < _SMALLEST_P else f"{p:.3f}"


def cards(evaluation: Evaluation, verdict: Verdict) -> list[Card]:
    """The sizes of a verdict with their headline numbers."""
    rows = []
    for size in verdict.sizes:
        base = evaluation.summary(evaluation.baseline(verdict.arm).name, size.num_train, "dice")
        own = evaluation.summary(verdict.arm, size.num_train, "dice")
        row = evaluation.comparison(verdict.arm, size.num_train, "dice")
        rows.append(
            Card(
                size=str(size.num_train),
                reference=number(base.mean if base else None),
                arm=number(own.mean if own else None),
                difference=number(row.difference if row else None, signed=True),
                interval=interval(row.interval if row else None, signed=True),
                outcome=size.outcome,
            )
        )
    return rows


def scores(evaluation: Evaluation, metric: str) -> list[ScoreRow]:
    """Every arm's mean and difference to its baseline, by size and class."""
    rows: list[ScoreRow] = []
    for size in evaluation.num_train:
        names = class_names(evaluation.classes)
        for name in names:
            found = [(arm, evaluation.summary(arm.name, size, metric, name)) for arm in evaluation.arms]
            present = [(arm, row) for arm, row in found if row is not None]
            for position, (arm, summary) in enumerate(sorted(present, key=lambda pair: pair[0].role != "reference")):
                comparison = evaluation.comparison(arm.name, size, metric, name)
                first = (name == names[0] and position == 0, position == 0)
                rows.append(_score_row(size, name, arm.label, summary, comparison, metric, first))
    return rows


def _score_row(
    size: NumTrain,
    class_name: str,
    label: str,
    summary: Summary,
    comparison: Comparison | None,
    metric: str,
    first: tuple[bool, bool],
) -> ScoreRow:
    known = comparison is not None
    return ScoreRow(
        size=str(size),
        class_name="mean of classes" if class_name == MEAN_CLASS else class_name,
        arm=label,
        arm_name=summary.arm,
        mean=number(summary.mean, metric),
        interval=interval(summary.interval, metric),
        difference=number(comparison.difference, metric, signed=True) if comparison else "",
        difference_interval=interval(comparison.interval, metric, signed=True) if comparison else "",
        p_holm=p_text(comparison.p_holm) if comparison else "",
        counts=f"{comparison.num_better} / {comparison.num_worse}" if comparison else "",
        significant=known and _is_significant(comparison),
        first_of_size=first[0],
        first_of_class=first[1],
    )


def _is_significant(comparison: Comparison | None) -> bool:
    from nnssl_ext.evaluation.verdict import SIGNIFICANCE

    return comparison is not None and comparison.p_holm is not None and comparison.p_holm < SIGNIFICANCE


def folds(evaluation: Evaluation) -> list[tuple[str, str, list[str], str]]:
    """Size, arm, mean Dice of each fold, and their range."""
    rows = []
    for size in evaluation.num_train:
        for arm in evaluation.arms:
            row = evaluation.summary(arm.name, size, "dice")
            if row is not None:
                means = [row.fold_means.get(fold) for fold in evaluation.folds]
                known = [value for value in means if value is not None]
                spread = number(max(known) - min(known)) if known else DASH
                rows.append((str(size), arm.label, [number(value) for value in means], spread))
    return rows


def convergence(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Size, arm, state, and what it was judged on."""
    curves = {"dice": "Dice", "loss": "loss better by"}
    words = {"settled": "settled", "rising": "still rising", "unknown": "cannot be told"}
    rows = []
    for size in evaluation.num_train:
        of_size = [row for row in evaluation.convergence if row.num_train == size]
        for row in sorted(of_size, key=lambda row: evaluation.arm(row.arm).role != "reference"):
            trend, label = row.trend, evaluation.arm(row.arm).label
            runs = f"mean of {row.num_runs} runs" if row.num_runs > 1 else "1 run"
            basis = f"{runs}, {trend.epochs} epochs"
            if trend.gain is not None:
                gain = f"{curves[trend.curve]} {number(trend.gain, signed=True)}"
                basis = f"validation {gain} over the last {trend.epochs} epochs ({runs})"
            rows.append((str(size), label, words[trend.state], basis))
    return rows


def settings(evaluation: Evaluation) -> list[tuple[str, list[str], bool]]:
    """Fine-tuning settings: name, value per arm, and whether the arms differ in it."""
    names = list(dict.fromkeys(name for arm in evaluation.arms for name in arm.training))
    rows = [
        ("start", ["pretrained" if arm.pretrained else "from scratch" for arm in evaluation.arms]),
        ("trainer", [arm.trainer for arm in evaluation.arms]),
        *((name.replace("_", " "), [arm.training.get(name, DASH) for arm in evaluation.arms]) for name in names),
    ]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def commands(evaluation: Evaluation) -> list[tuple[str, Sequence[str]]]:
    """What each group of commands is for, and the commands."""
    groups: list[tuple[str, Sequence[str]]] = [(arm.label, arm.commands) for arm in evaluation.arms if arm.commands]
    if evaluation.command:
        groups.append(("this evaluation", [evaluation.command]))
    return groups


def train_sizes(evaluation: Evaluation) -> str:
    """The number of training cases behind `all`, such as `56` or `55 to 57`."""
    counts = {len(run.train_cases) for run in evaluation.runs if run.num_train == "all"}
    if not counts:
        return ""
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
