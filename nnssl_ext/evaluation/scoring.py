"""What a fold run left behind: the cases it really validated, its scores on whole volumes, its learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import from_dict, read_json, to_dict, write_json
from nnssl_ext.evaluation.metrics import METRICS_VERSION, ClassScores, score_case
from nnssl_ext.evaluation.records import Curve

VALIDATION_FOLDER = "validation"
SUMMARY_FILE = "summary.json"
CURVES_FILE = "finetuning_metrics.jsonl"
FINAL_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """One fold run to be scored; plain data, so that it can travel to a worker."""

    fold_folder: Path
    references: dict[str, Path]
    """Label file of each validation case."""
    file_ending: str
    classes: dict[str, tuple[int, ...]]
    ignore_label: int | None
    tolerance_mm: float
    cache: Path
    """Where the scores are kept; used again while predictions, references and settings are the same."""


def is_finished(fold_folder: Path) -> bool:
    """Whether a fold run was trained to its end and validated."""
    trained = (fold_folder / FINAL_CHECKPOINT).is_file()
    return trained and (fold_folder / VALIDATION_FOLDER / SUMMARY_FILE).is_file()


def validated_cases(fold_folder: Path, file_ending: str) -> tuple[str, ...]:
    """Ids of the cases that nnU-Net's `summary.json` of a fold run lists, sorted.

    Raises:
        ValueError: If the file is not a summary.
    """
    path = fold_folder / VALIDATION_FOLDER / SUMMARY_FILE
    summary = read_json(path)
    try:
        files = [Path(row["prediction_file"]) for row in summary["metric_per_case"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a summary of nnU-Net; delete {path.parent} to validate again") from error
    return tuple(sorted(file.name.removesuffix(file_ending) for file in files))


def check_validated(fold_folder: Path, planned: Sequence[str], file_ending: str) -> None:
    """Compares the cases that were really validated with those that should have been.

    Raises:
        ValueError: If they differ, or a prediction is missing.
    """
    found = {path.name.removesuffix(file_ending) for path in (fold_folder / VALIDATION_FOLDER).glob(f"*{file_ending}")}
    for what, cases in (
        ("summary.json lists", set(validated_cases(fold_folder, file_ending))),
        ("there are predictions for", found),
    ):
        if cases != set(planned):
            missing, extra = sorted(set(planned) - cases), sorted(cases - set(planned))
            raise ValueError(
                f"{fold_folder} did not validate the cases of its fold: {what} {len(cases)} cases instead of "
                f"{len(planned)} (missing: {_some(missing)}; not of this fold: {_some(extra)}). "
                "Delete that folder to train it again with the planned folds"
            )


def _some(cases: Sequence[str]) -> str:
    return ", ".join(cases[:3]) + (" ..." if len(cases) > 3 else "") if cases else "none"


def score_run(task: ScoringTask) -> dict[str, dict[str, ClassScores]]:
    """Scores of every validation case of a fold run, from its cache where nothing has changed.

    Raises:
        FileNotFoundError: If a reference or prediction is missing.
        ValueError: If one cannot be read, or they differ in shape or in geometry.
    """
    stamp = _stamp(task)
    if task.cache.is_file():
        cached = read_json(task.cache)
        if cached["stamp"] == stamp:
            return _from_builtins(cached["scores"], str(task.cache))
    scores = {case: _score_files(task, case) for case in task.references}
    rows = {case: {name: to_dict(row) for name, row in classes.items()} for case, classes in scores.items()}
    write_json(task.cache, {"stamp": stamp, "scores": rows})
    return scores


def _prediction(task: ScoringTask, case: str) -> Path:
    return task.fold_folder / VALIDATION_FOLDER / f"{case}{task.file_ending}"


def _stamp(task: ScoringTask) -> dict[str, Any]:
    """What the scores depend on: metrics, settings, and size and time of every file."""
    stamp: dict[str, Any] = {
        "metrics": METRICS_VERSION,
        "tolerance_mm": task.tolerance_mm,
        "classes": {name: list(values) for name, values in task.classes.items()},
        "ignore_label": task.ignore_label,
        "files": {},
    }
    for case, reference in task.references.items():
        states = [path.stat() for path in (reference, _prediction(task, case))]
        stamp["files"][case] = [[state.st_size, state.st_mtime_ns] for state in states]
    return stamp


def _score_files(task: ScoringTask, case: str) -> dict[str, ClassScores]:
    from nnssl_ext.imageio import read_segmentation

    reference, geometry = read_segmentation(task.references[case])
    prediction, own = read_segmentation(_prediction(task, case))
    if not own.same_place(geometry):
        raise ValueError(
            f"{_prediction(task, case)} lies elsewhere than {task.references[case]}: its spacing {own.spacing}, origin "
            f"{own.origin} or direction differs from {geometry.spacing}, {geometry.origin}. Delete {task.fold_folder} "
            "to train and predict that fold again"
        )
    return score_case(
        reference, prediction, geometry.spacing, task.classes, task.tolerance_mm, ignore_label=task.ignore_label
    )


def _from_builtins(rows: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, ClassScores]]:
    return {
        case: {name: from_dict(ClassScores, row, where) for name, row in classes.items()}
        for case, classes in rows.items()
    }


def read_curve(fold_folder: Path) -> Curve:
    """Learning curves of a fold run; empty where none were recorded.

    `SSLFinetuneTrainer` writes a line per epoch; stock nnU-Net keeps them in its final checkpoint.

    Raises:
        ValueError: If a line of the metrics file is not JSON.
    """
    path = fold_folder / CURVES_FILE
    if not path.is_file():
        return _curve_of_checkpoint(fold_folder / FINAL_CHECKPOINT)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}") from error
    return Curve(
        train_loss=tuple(row.get("train_loss") for row in rows),
        val_loss=tuple(row.get("val_loss") for row in rows),
        dice=tuple(row.get("pseudo_dice") for row in rows),
    )


def _curve_of_checkpoint(path: Path) -> Curve:
    import torch

    if not path.is_file():
        return Curve()
    # nnU-Net keeps numpy scalars there, so it cannot be read with weights_only; it was written by this user's own run
    logged = torch.load(path, map_location="cpu", weights_only=False).get("logging", {})
    train, val, dice = (logged.get(key, []) for key in ("train_losses", "val_losses", "mean_fg_dice"))
    return Curve(train_loss=_floats(train), val_loss=_floats(val), dice=_floats(dice))


def _floats(values: Sequence[Any]) -> tuple[float | None, ...]:
    numbers = (float(value) for value in values)
    return tuple(number if abs(number) < float("inf") else None for number in numbers)
