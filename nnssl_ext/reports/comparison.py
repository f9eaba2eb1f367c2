"""`comparison.html` and `comparison.md`: which method is best, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import write_text
from nnssl_ext.evaluation.comparison_records import (
    REPORT_FILE,
    TABLE_FILE,
    MethodComparison,
    MethodResult,
    Pair,
    Ranking,
)
from nnssl_ext.evaluation.learning import Difference
from nnssl_ext.evaluation.records import Evaluation, NumTrain
from nnssl_ext.evaluation.statistics import coverage_note
from nnssl_ext.evaluation.verdict import still_rising, unfair_to
from nnssl_ext.reports import comparison_figures as figures
from nnssl_ext.reports.page import fill
from nnssl_ext.reports.tables import DASH, interval, number, p_text

TEMPLATE = "comparison.html"
OUTCOMES = {"helped": "helped", "hurt": "hurt", "undecided": "undecided", "unfair": "not a fair comparison"}


@dataclass(frozen=True)
class SizeCells:
    """One method at one training set size."""

    rank: int
    place: str
    """The rank as text; empty where it was not fine-tuned."""
    dice: str
    dice_interval: str
    difference: str
    difference_interval: str
    outcome: str


@dataclass(frozen=True)
class MethodRow:
    """One method of the table."""

    label: str
    colour: str
    network: str
    steps: str
    cost: str
    pretext: str
    gate: str
    probe: str
    over_random: str
    over_sham: str
    verdict: str
    sizes: list[SizeCells]


def write_comparison(comparison: MethodComparison, evaluation: Evaluation, folder: Path) -> Path:
    """Writes the page and the table for documents into a folder, atomically; the path of the page."""
    write_text(folder / TABLE_FILE, markdown(comparison, evaluation))
    path = folder / REPORT_FILE
    write_text(path, fill(TEMPLATE, context(comparison, evaluation)))
    return path


def context(comparison: MethodComparison, evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the template shows."""
    several = len(comparison.rankings[0].arms) > 1
    return {
        "c": comparison,
        "title": f"{comparison.dataset}: {len([m for m in comparison.methods if m.trainer and not m.sham])} methods",
        "rows": rows(comparison, evaluation),
        "fine_tuned": figures.fine_tuned(comparison),
        "ranks": [figures.rank_probabilities(ranking) for ranking in comparison.rankings] if several else [],
        "diagrams": [(ranking, _diagrams(ranking)) for ranking in comparison.rankings],
        "pairs": [(figures.pairs(ranking), pair_rows(ranking)) for ranking in comparison.rankings],
        "probes": figures.probes(comparison),
        "protocols": [(row.label, row.protocol, row.steps) for row in comparison.methods if row.trainer],
        "commands": [(row.label, row.commands) for row in comparison.methods if row.commands],
        "num_cases": max(ranking.num_cases for ranking in comparison.rankings),
        "p_text": p_text,
        "coverage": coverage_note(len(comparison.seeds)),
    }


def _diagrams(ranking: Ranking) -> list[figures.Picture]:
    found = []
    if ranking.over_cases is not None:
        title = f"{ranking.over_cases.num_blocks} patients as blocks: these networks"
        found.append(figures.critical_difference(ranking, ranking.over_cases, title))
    if ranking.over_seeds is not None:
        title = f"{ranking.over_seeds.num_blocks} seeds as blocks: the methods"
        found.append(figures.critical_difference(ranking, ranking.over_seeds, title))
    return found


def rows(comparison: MethodComparison, evaluation: Evaluation) -> list[MethodRow]:
    """The methods, best first by the first training set size; what was not fine-tuned comes last."""
    colours = figures.colours_of(comparison)
    places = {arm.label: place for place, arm in enumerate(comparison.rankings[0].arms)}
    ordered = sorted(comparison.methods, key=lambda row: places.get(row.label, len(places)))
    return [
        MethodRow(
            label=row.label,
            colour=colours[row.label],
            network={"cnn": "U-Net", "vit": "transformer"}[row.network],
            steps=str(row.steps) if row.trainer else DASH,
            cost=DASH if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
            pretext=row.pretext,
            gate=row.gate,
            probe=number(row.probe_mean),
            over_random=difference_text(row.over_random),
            over_sham=difference_text(row.over_sham),
            verdict=row.verdict,
            sizes=[_cells(comparison, evaluation, row, size) for size in comparison.num_train],
        )
        for row in ordered
    ]


def difference_text(difference: Difference | None) -> str:
    """A difference with its interval, and a question mark where it is not decided."""
    if difference is None:
        return DASH
    text = f"{number(difference.mean, signed=True)} ({number(difference.low, signed=True)} to "
    return f"{text}{number(difference.high, signed=True)}){'' if difference.decided else '?'}"


def _cells(comparison: MethodComparison, evaluation: Evaluation, row: MethodResult, size: NumTrain) -> SizeCells:
    ranking = next(ranking for ranking in comparison.rankings if ranking.num_train == size)
    labels = [arm.label for arm in ranking.arms]
    if row.label not in labels:
        return SizeCells(len(labels) + 1, "", DASH, "", "", "", "not fine-tuned")
    place = labels.index(row.label)
    arm, pair = ranking.arms[place], ranking.pair(row.label, row.scratch)
    if pair is None or pair.row.difference is None or pair.row.interval is None:
        return SizeCells(place + 1, str(place + 1), number(arm.mean), interval(arm.interval), "", "", "")
    ahead = pair.first == row.label
    low, high = pair.row.interval.low, pair.row.interval.high
    difference = pair.row.difference if ahead else -pair.row.difference
    ends = (low, high) if ahead else (-high, -low)
    return SizeCells(
        rank=place + 1,
        place=str(place + 1),
        dice=number(arm.mean),
        dice_interval=interval(arm.interval),
        difference=number(difference, signed=True),
        difference_interval=" to ".join(number(end, signed=True) for end in ends),
        outcome=_outcome(pair, ahead, ranking, comparison.method(row.scratch), evaluation),
    )


def _outcome(pair: Pair, ahead: bool, ranking: Ranking, scratch: MethodResult, evaluation: Evaluation) -> str:
    """What the difference to its own network from scratch says: the pair's decision, unless it is unfair."""
    if not pair.decided:
        return OUTCOMES["undecided"]
    if not ahead:
        return OUTCOMES["hurt"]
    mean = next(arm.mean for arm in ranking.arms if arm.label == scratch.label)
    rising = (scratch.arm, ranking.num_train) in still_rising(evaluation.convergence)
    return OUTCOMES["unfair" if unfair_to(scratch.label, mean, rising) else "helped"]


def pair_rows(ranking: Ranking) -> list[tuple[str, ...]]:
    """Every pair: who, difference, interval, corrected p, undecidable below, seeds, decided."""
    num_seeds = len(ranking.arms[0].seed_means)
    return [
        (
            f"{pair.first} \u2212 {pair.second}",
            number(pair.row.difference, signed=True),
            interval(pair.row.interval, signed=True),
            p_text(pair.row.p_holm),
            number(pair.row.undecidable_below),
            f"{pair.seeds_in_favour} of {num_seeds}",
            "decided" if pair.decided else "undecided",
        )
        for pair in ranking.pairs
    ]


def markdown(comparison: MethodComparison, evaluation: Evaluation) -> str:
    """The table and what can be said, for documents; sham runs that were only probed stand in their methods' rows."""
    head = ["method", "network", "steps", "s a step", "pretext on held-out cases", "gate", "probe", "over untrained"]
    head += ["over sham", "verdict"]
    for size in comparison.num_train:
        head += [f"Dice, {size} cases", "over scratch", "outcome"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    shown = {row.label for row in comparison.methods if row.arm or not row.sham}
    for row in rows(comparison, evaluation):
        if row.label not in shown:
            continue
        cells = [row.label, row.network, row.steps, row.cost, row.pretext, row.gate, row.probe]
        cells += [row.over_random, row.over_sham, row.verdict]
        for cell in row.sizes:
            over = f"{cell.difference} ({cell.difference_interval})" if cell.difference else DASH
            cells += [cell.dice, over, cell.outcome or DASH]
        lines.append(f"| {' | '.join(cells)} |")
    said = [comparison.headline, *(s for ranking in comparison.rankings for s in ranking.sentences)]
    seeds = f"{len(comparison.seeds)} seed{'' if len(comparison.seeds) == 1 else 's'}"
    notes = [
        " ".join(said),
        f"Budget {comparison.budget} a run, {seeds}, {len(comparison.folds)} of the folds of {comparison.dataset}; "
        f"pretrained on {comparison.pretrain_dataset}. Dice: foreground, whole volumes; probe: linear, on frozen "
        "features. In brackets: 95% of a bootstrap over seeds and patients. A question mark: not decided, "
        "since the difference is within the luck of the seeds or an interval holds zero, both at the level of the "
        "whole table.",
        comparison.certainty,
        *(f"Warning: {warning}" for warning in comparison.warnings),
        *comparison.conditions,
        f"Made by: `{comparison.command}`",
    ]
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"
