"""Did pretraining help, by how much, and how sure is that: numbers turned into sentences by written rules.

An arm *helped* (or *hurt*) at a training set size when three things hold: the two-level bootstrap interval of the mean
Dice difference excludes zero; the Holm-corrected Wilcoxon test over patients is under `SIGNIFICANCE`; and the
difference is larger than the luck of the trainings explains (`undecidable_below`; a bootstrap of two or three seeds
alone is too narrow). Else the matter is *undecided*. Where the comparison is *unfair* (the arm compared with learned
next to nothing, or was still rising), a gain is not called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnssl_ext.evaluation import statistics
from nnssl_ext.evaluation.convergence import NEAR_ZERO_DICE
from nnssl_ext.evaluation.records import (
    MEAN_CLASS,
    Arm,
    Comparison,
    Convergence,
    Evaluation,
    NumTrain,
    Outcome,
    SizeVerdict,
    Summary,
    Verdict,
)

SIGNIFICANCE = 0.05
HEADLINE_METRIC = "dice"
TYPICAL_SEED_SPREAD = 0.02
"""Standard deviation of a mean Dice over seeds seen in trials on small data; used with one seed only."""
FEW_SEEDS = 5
"""Under this, the spread over seeds is itself only roughly known."""
_FEW_SEEDS_NOTE = (
    " A spread measured on so few seeds is itself rough: on small data, be wary of differences under about "
    f"{2 * TYPICAL_SEED_SPREAD}."
)
_SMALLEST_P = 0.001

Key = tuple[str, NumTrain]


def decide(
    arms: Sequence[Arm],
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    trends: Sequence[Convergence],
) -> list[Verdict]:
    """One verdict per arm that is compared with another one."""
    reference, named = next(arm for arm in arms if arm.role == "reference"), {arm.name: arm for arm in arms}
    means = {(s.arm, s.num_train): s for s in summaries if (s.metric, s.class_name) == (HEADLINE_METRIC, MEAN_CLASS)}
    rising = still_rising(trends)
    headline = [c for c in comparisons if (c.metric, c.class_name) == (HEADLINE_METRIC, MEAN_CLASS)]
    verdicts = []
    for arm in arms:
        rows = [row for row in headline if row.arm == arm.name]
        if rows:
            base = named.get(arm.baseline, reference)
            sizes = tuple(_judge_size(arm, base, row, means, rising) for row in rows)
            seeds = {side.name: means[side.name, rows[0].num_train].num_seeds for side in (arm, base)}
            verdicts.append(_judge_arm(arm, base, sizes, rows, seeds))
    return verdicts


def _judge_size(arm: Arm, reference: Arm, row: Comparison, means: dict[Key, Summary], rising: set[Key]) -> SizeVerdict:
    base, own = means[reference.name, row.num_train].mean, means[arm.name, row.num_train].mean
    if row.difference is None or base is None or own is None:
        text = f"With {size_text(row.num_train)}: no case could be scored in both arms."
        return SizeVerdict(num_train=row.num_train, outcome="undecided", sentence=text)
    outcome = _outcome(row)
    numbers = (
        f"With {size_text(row.num_train)} {arm.label} reached a mean Dice of {own:.3f} against {base:.3f} for "
        f"{reference.label}: {row.difference:+.3f}{_interval_text(row)}, {_p_text(row.p_holm)}, "
        f"{row.num_pairs} paired patients ({row.num_better} better, {row.num_worse} worse)."
    )
    reason = unfair_to(reference.label, base, (reference.name, row.num_train) in rising)
    if reason and outcome == "helped":
        return SizeVerdict(num_train=row.num_train, outcome="unfair", sentence=f"{numbers} {reason}")
    tail = ""
    if outcome == "undecided":
        tail = f" {_why_undecided(row)}"
    note = f" {reason}" if reason else ""
    return SizeVerdict(num_train=row.num_train, outcome=outcome, sentence=f"{numbers}{tail}{note}")


def _outcome(row: Comparison) -> Outcome:
    significant = row.p_holm is not None and row.p_holm < SIGNIFICANCE
    if not significant or row.interval is None or not row.interval.excludes_zero():
        return "undecided"
    if row.undecidable_below is None or _within_luck(row):
        return "undecided"
    return "helped" if row.interval.low > 0 else "hurt"


def _why_undecided(row: Comparison) -> str:
    if row.undecidable_below is None:
        return "A single training of each arm cannot tell its luck from a difference: run more folds or seeds."
    if _within_luck(row):
        return "That is within the luck of the trainings, so it cannot be called a difference."
    return "That is not enough to call it a difference."


def _within_luck(row: Comparison) -> bool:
    """Whether the luck of the trainings alone could make such a difference."""
    limit = row.undecidable_below
    return limit is not None and row.difference is not None and abs(row.difference) <= limit


def still_rising(trends: Sequence[Convergence]) -> set[Key]:
    """The arms and sizes that had not finished learning."""
    return {(row.arm, row.num_train) for row in trends if row.trend.state == "rising"}


def unfair_to(label: str, mean: float, rising: bool) -> str:
    """Why a gain over a baseline is none, from its mean Dice and whether it was still rising; empty: it is one."""
    if mean < NEAR_ZERO_DICE:
        return (
            f"{label} learned next to nothing there (Dice under {NEAR_ZERO_DICE}), "
            "so the difference compares nothing with something: train longer, or check its learning rate."
        )
    if rising:
        return (
            f"{label} was still rising when it stopped, "
            "so the difference may be speed of training rather than its end: train longer."
        )
    return ""


def _judge_arm(
    arm: Arm, reference: Arm, sizes: Sequence[SizeVerdict], rows: Sequence[Comparison], seeds: Mapping[str, int]
) -> Verdict:
    groups: dict[str, list[Comparison]] = {}
    for size, row in zip(sizes, rows, strict=True):
        groups.setdefault(_finding(size.outcome, row), []).append(row)
    parts = [_clause(finding, groups[finding]) for finding in _CLAUSES if finding in groups]
    alike = not (reference.pretrained or arm.other_network)
    pretraining = "Pretraining" if arm.pretrained_per_seed else "This pretraining"
    subject = pretraining if arm.pretrained and alike else arm.label
    unseeded = next((side.label for side in (arm, reference) if seeds[side.name] < max(seeds.values())), "")
    once = [side.label for side in (arm, reference) if side.pretrained and not side.pretrained_per_seed]
    outcomes = {size.outcome for size in sizes}
    return Verdict(
        arm=arm.name,
        outcome=next(outcome for outcome in _ORDER if outcome in outcomes),
        headline=f"{subject} {'; '.join(parts)}.",
        sizes=tuple(sizes),
        certainty=certainty(rows, min(seeds.values()), unseeded) + _one_run(once),
    )


_ORDER: tuple[Outcome, ...] = ("unfair", "helped", "hurt", "undecided")


_CLAUSES = {
    "unfair": "looks better {where}, but the baseline had not finished learning",
    "helped": "helped {where}",
    "hurt": "hurt {where}",
    "higher": "came out ahead {where}, which may be luck",
    "lower": "came out behind {where}, which may be luck",
    "undecided": "made no difference that this evaluation can show {where}",
}
"""Words of the headline, in its order. `higher` and `lower` are undecided, although the interval excludes zero."""


def _finding(outcome: Outcome, row: Comparison) -> str:
    if outcome != "undecided" or row.interval is None or not row.interval.excludes_zero():
        return outcome
    return "higher" if row.interval.low > 0 else "lower"


def _clause(finding: str, rows: Sequence[Comparison]) -> str:
    *others, last = [str(row.num_train) for row in rows]
    sizes = f"{', '.join(others)} and {last}" if others else last
    noun = "case" if [row.num_train for row in rows] == [1] else "cases"
    known = ", ".join(f"{row.difference:+.3f}" for row in rows if row.difference is not None)
    where = f"with {sizes} training {noun}" + (f" ({known} Dice)" if known else "")
    return _CLAUSES[finding].format(where=where)


def _one_run(labels: Sequence[str]) -> str:
    """What is said of arms whose seeds share a pretraining."""
    if not labels:
        return ""
    what = "this checkpoint, not the method" if len(labels) == 1 else "these checkpoints, not the methods"
    return f" One pretraining run stands behind {' and one behind '.join(labels)}: this is about {what}."


def certainty(rows: Sequence[Comparison], num_seeds: int, unseeded: str = "") -> str:
    """What stands behind the verdict, and what the seeds cannot decide.

    Args:
        rows: The comparisons that it stands on.
        num_seeds: Of the arm that has fewer.
        unseeded: Label of that arm, where the other one has more.
    """
    limits = ", ".join(
        f"{row.undecidable_below:.3f} with {size_text(row.num_train)}"
        for row in rows
        if row.undecidable_below is not None
    )
    if num_seeds == 1:
        limit = f" By the spread over folds they cannot decide Dice differences under {limits}." if limits else ""
        who = f"{unseeded} has no seed" if unseeded else "One seed stands behind this"
        advice = "" if unseeded else ", and give --seeds 0 1 2 or more"
        return (
            f"{who}, so each fold was trained once, and the tests speak about these trained networks.{limit} Another "
            f"training alone can move a mean Dice by about {TYPICAL_SEED_SPREAD} on small data: be wary of differences "
            f"under about {2 * TYPICAL_SEED_SPREAD}{advice}."
        )
    rough = _FEW_SEEDS_NOTE if num_seeds < FEW_SEEDS else ""
    return (
        f"{num_seeds} seeds stand behind this. The Wilcoxon test over patients speaks about these trained networks; "
        f"the interval resamples seeds as well as patients. What {num_seeds} seeds cannot decide: Dice differences "
        f"under {limits}; and a sign test over {num_seeds} seeds cannot give a p under "
        f"{statistics.sign_test_floor(num_seeds):g} even if every seed agrees.{rough}"
    )


def size_text(num_train: NumTrain) -> str:
    """`5 training cases` or `all training cases`."""
    return f"{num_train} training case{'' if num_train == 1 else 's'}"


def listed(labels: Sequence[str], word: str = "and") -> str:
    """`A`, `A and B`, `A, B and C`."""
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} {word} {labels[-1]}"


def _interval_text(row: Comparison) -> str:
    return f" (95% interval {row.interval.low:+.3f} to {row.interval.high:+.3f})" if row.interval else ""


def _p_text(p: float | None) -> str:
    if p is None:
        return "no test possible"
    return f"corrected p < {_SMALLEST_P}" if p < _SMALLEST_P else f"corrected p = {p:.3f}"


def warnings_about(evaluation: Evaluation, num_planned_folds: int) -> list[str]:
    """What a reader has to know before believing the numbers."""
    warnings = convergence_warnings(evaluation.convergence, {arm.name: arm.label for arm in evaluation.arms})
    bases = {evaluation.reference.name, *(arm.baseline for arm in evaluation.arms)}
    for arm, size in ((arm, size) for arm in evaluation.arms if arm.name in bases for size in evaluation.num_train):
        row = evaluation.summary(arm.name, size, HEADLINE_METRIC)
        if row is not None and row.mean is not None and row.mean < NEAR_ZERO_DICE:
            warnings.append(
                f"{arm.label} has a mean Dice of {row.mean:.3f} with {size_text(size)}: it learned "
                "next to nothing, so nothing can be compared with it."
            )
    if len(evaluation.folds) < num_planned_folds:
        warnings.append(
            f"Only {len(evaluation.folds)} of {num_planned_folds} folds were evaluated; the result stands on part "
            "of the cases."
        )
    return warnings


def convergence_warnings(rows: Sequence[Convergence], labels: Mapping[str, str]) -> list[str]:
    """Which arms had not finished learning, by label; one sentence for all of which the same can be said."""
    alike: dict[tuple[NumTrain, str, str, int], list[Convergence]] = {}
    for row in rows:
        if row.trend.state != "settled":
            alike.setdefault((row.num_train, row.trend.state, row.trend.curve, row.trend.epochs), []).append(row)
    return [_convergence_warning(found, listed([labels[row.arm] for row in found])) for found in alike.values()]


def _convergence_warning(rows: Sequence[Convergence], names: str) -> str:
    size, trend = size_text(rows[0].num_train), rows[0].trend
    if trend.state == "unknown":
        return f"Whether {names} had converged with {size} cannot be told: too few epochs were recorded."
    gains = sorted(row.trend.gain or 0.0 for row in rows)
    gained = f"{gains[0]:.3f}" if len(rows) == 1 else f"{gains[0]:.3f} to {gains[-1]:.3f}"
    what = "Dice rose" if trend.curve == "dice" else "loss fell"
    was, over, them = ("was", "its", "it") if len(rows) == 1 else ("were", "their", "them")
    return (
        f"{names} {was} still rising with {size}: over {over} last {trend.epochs} epochs the validation "
        f"{what} by {gained}. Train longer before believing differences to {them}."
    )
