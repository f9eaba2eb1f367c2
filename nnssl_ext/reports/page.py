"""`report.html`: one file with everything in it, the verdict first."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import write_text
from nnssl_ext.evaluation.metrics import METRICS
from nnssl_ext.evaluation.records import MEAN_CLASS, REPORT_FILE, Evaluation, NumTrain
from nnssl_ext.evaluation.statistics import coverage_note
from nnssl_ext.reports import figures, overlays, tables
from nnssl_ext.reports.pretraining import Pretraining, read_pretraining
from nnssl_ext.reports.style import CLASS_COLOURS, Picture, arm_colours

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "report.html"


@dataclass(frozen=True)
class CasePicture:
    """One case in the report."""

    rank: str
    case: str
    picture: Picture


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Renders the report into a folder, atomically, and returns its path.

    Pictures of cases need the raw images and the predictions, those of the pretraining its run folder; where files are
    gone, the report says so in their place.
    """
    path = folder / REPORT_FILE
    write_text(path, render(evaluation))
    return path


def render(evaluation: Evaluation) -> str:
    """The report as HTML text, with its style and all pictures inside."""
    return fill(TEMPLATE, context(evaluation))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with everything that it shows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = minus
    return environment.get_template(template).render(values)


def minus(text: str) -> str:
    """A sentence of the verdict with true minus signs in front of its numbers, as the tables have them."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)


def context(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the template shows."""
    pictured_size = evaluation.num_train[0]
    gap = overlays.missing_files(evaluation, pictured_size)
    shared = any(arm.pretrained_per_seed for arm in evaluation.arms)
    return {
        "e": evaluation,
        "title": f"{evaluation.dataset}: {' vs '.join(arm.label for arm in evaluation.arms)}",
        "colours": arm_colours(evaluation.arms),
        "class_colours": dict(zip(evaluation.classes, CLASS_COLOURS, strict=False)),
        "verdicts": [(verdict, tables.cards(evaluation, verdict)) for verdict in evaluation.verdicts],
        "efficiency": figures.data_efficiency(evaluation),
        "scores": [(metric, figures.metric_label(metric), tables.scores(evaluation, metric)) for metric in METRICS],
        "fold_spread": figures.fold_spread(evaluation) if len(evaluation.folds) > 1 else None,
        "folds": tables.folds(evaluation),
        "paired": [
            (arm, [figures.paired_cases(evaluation, arm.name, row) for row in figures.rows_of(sizes)])
            for arm in evaluation.arms
            if (sizes := _compared_sizes(evaluation, arm.name))
        ],
        "curves": _curves(evaluation),
        "convergence": tables.convergence(evaluation),
        "pictured_size": pictured_size,
        "pictures": [] if gap else _pictures(evaluation, pictured_size),
        "pictures_gap": gap,
        "pretrainings": _pretrainings(evaluation),
        "settings": tables.settings(evaluation),
        "commands": tables.commands(evaluation),
        "num_cases": len({row.case for row in evaluation.cases}),
        "train_sizes": tables.train_sizes(evaluation),
        "mean_class": MEAN_CLASS,
        "coverage": coverage_note(len(evaluation.seeds), 1 if shared else len(evaluation.folds)),
    }


def _compared_sizes(evaluation: Evaluation, arm: str) -> list[NumTrain]:
    return [size for size in evaluation.num_train if evaluation.comparison(arm, size, "dice")]


def _curves(evaluation: Evaluation) -> list[Picture]:
    if not any(run.curve.val_loss or run.curve.dice for run in evaluation.runs):
        return []
    return [figures.learning_curves(evaluation, row) for row in figures.rows_of(evaluation.num_train)]


def _pictures(evaluation: Evaluation, size: NumTrain) -> list[CasePicture]:
    ranked = overlays.rank_cases(evaluation, size)
    return [CasePicture(row.rank, row.case, overlays.draw_case(evaluation, row, size)) for row in ranked]


def _pretrainings(evaluation: Evaluation) -> list[tuple[str, Pretraining | None]]:
    """Label and pretraining of every pretrained arm; None where its run folder is not on this machine."""
    rows: list[tuple[str, Pretraining | None]] = []
    for arm in evaluation.arms:
        if arm.pretrained:
            folder = Path(arm.pretraining_run) if arm.pretraining_run else None
            rows.append((arm.label, read_pretraining(folder) if folder and folder.is_dir() else None))
    return rows
