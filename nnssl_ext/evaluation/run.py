"""The evaluation from arms to `evaluation.json`: check, plan, train what is missing, score, conclude."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.evaluation import analysis, folds, scoring, training, verdict
from nnssl_ext.evaluation.arms import PlannedArm, describe_arm
from nnssl_ext.evaluation.metrics import ClassScores
from nnssl_ext.evaluation.preparation import EvaluationSettings, Prepared, prepare, write_plans
from nnssl_ext.evaluation.provenance import commands_of, find_pretraining_run, version_warnings, versions
from nnssl_ext.evaluation.records import Arm, CaseScores, Evaluation, Run, save_evaluation

logger = logging.getLogger(__name__)


def train(
    prepared: Prepared,
    executor: Executor,
    device: str,
    gpus: Sequence[str] = (),
    trainer: training.Trainer = training.train_fold,
) -> None:
    """Trains the runs that are missing. A failing one does not stop the others.

    Raises:
        ValueError: If some failed, with the first reason, after all the others have run.
    """
    missing = prepared.missing
    tasks = {
        run.key: training.TrainingTask(
            dataset=prepared.preprocessed.name,
            plans_name=run.plans_name,
            configuration=prepared.settings.configuration,
            fold=run.fold,
            trainer=run.arm.trainer,
            device=device,
            gpus=tuple(gpus),
            log_file=prepared.folder / "logs" / f"{run.key}.log",
        )
        for run in missing
    }
    logger.info("%d of %d fold runs are still to be trained", len(tasks), len(prepared.runs))
    failed = {}
    for key, error in track(training.train_missing(tasks, executor, trainer), len(tasks), "training folds"):
        if error is None:
            logger.info("trained %s", key)
        else:
            failed[key] = error
            logger.error("%s failed: %s", key, error)
    if failed:
        key, error = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(tasks)} trainings failed, the first is {key}: {error}. See "
            f"{prepared.folder / 'logs'}; the same command goes on with what is missing"
        )


def collect(prepared: Prepared, executor: Executor) -> tuple[list[Run], list[CaseScores]]:
    """Scores every run on whole volumes and reads its learning curves.

    Raises:
        ValueError: If a run did not validate exactly the cases of its fold, or a file cannot be scored.
    """
    ending = prepared.manifest.file_ending
    for run in prepared.runs:
        scoring.check_validated(run.folder, run.val_cases, ending)
    tasks = {run.key: (_scoring_task(prepared, run),) for run in prepared.runs}
    scores: dict[str, dict[str, dict[str, ClassScores]]] = {}
    for result in track(executor.run(scoring.score_run, tasks), len(tasks), "scoring"):
        if result.error is not None:
            raise ValueError(f"{result.key} could not be scored: {result.error}")
        scores[result.key] = result.value
    runs = [_run_record(run) for run in prepared.runs]
    patients = prepared.manifest.subjects()
    rows = [
        CaseScores(
            arm=run.arm.name,
            num_train=run.num_train,
            seed=run.seed,
            fold=run.fold,
            case=case,
            classes=scores[run.key][case],
            patient=patients[case],
        )
        for run in prepared.runs
        for case in run.val_cases
    ]
    return runs, rows


def _scoring_task(prepared: Prepared, run: folds.FoldRun) -> scoring.ScoringTask:
    labels = {case: prepared.manifest.case(case).label for case in run.val_cases}
    unlabelled = sorted(case for case, label in labels.items() if label is None)
    if unlabelled:
        raise ValueError(f"{len(unlabelled)} validation cases have no label file, such as {unlabelled[0]}")
    return scoring.ScoringTask(
        fold_folder=run.folder,
        references={case: label for case, label in labels.items() if label is not None},
        file_ending=prepared.manifest.file_ending,
        classes=prepared.classes,
        ignore_label=prepared.ignore_label,
        tolerance_mm=prepared.settings.tolerance_mm,
        cache=prepared.folder / "scores" / f"{run.key}.json",
    )


def _run_record(run: folds.FoldRun) -> Run:
    return Run(
        arm=run.arm.name,
        num_train=run.num_train,
        seed=run.seed,
        fold=run.fold,
        plans_name=run.plans_name,
        folder=str(run.folder),
        train_cases=run.train_cases,
        val_cases=run.val_cases,
        curve=scoring.read_curve(run.folder),
    )


def conclude(prepared: Prepared, runs: Sequence[Run], scores: Sequence[CaseScores], command: str) -> Evaluation:
    """Statistics, verdicts and warnings for the scores of all runs."""
    settings, classes = prepared.settings, prepared.classes
    names = analysis.class_names(classes)
    reference_first = sorted(prepared.arms, key=lambda arm: arm is not prepared.reference)
    described = tuple(_describe(arm, prepared) for arm in reference_first)
    shared = {arm.name for arm in prepared.arms if arm.per_seed}
    summaries = analysis.summarise(scores, names, shared)
    comparisons = analysis.compare(scores, {k: v.name for k, v in prepared.baselines.items()}, names, shared)
    trends = analysis.judge_convergence(runs)
    evaluation = Evaluation(
        name=prepared.folder.name,
        dataset=prepared.preprocessed.name,
        configuration=settings.configuration,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        folds=prepared.folds,
        num_train=prepared.num_train,
        seeds=settings.seeds,
        tolerance_mm=settings.tolerance_mm,
        classes=classes,
        arms=described,
        runs=tuple(runs),
        cases=tuple(scores),
        summaries=tuple(summaries),
        comparisons=tuple(comparisons),
        convergence=tuple(trends),
        verdicts=tuple(verdict.decide(described, summaries, comparisons, trends)),
        warnings=prepared.warnings,
        versions=versions(),
        absent={name: analysis.num_absent(scores, name) for name in classes},
    )
    made = [Path(folder) for folder in (*(r.folder for r in runs), *(a.pretraining_run for a in described)) if folder]
    found = (*version_warnings(made), *verdict.warnings_about(evaluation, len(prepared.splits)))
    return replace(evaluation, warnings=(*prepared.warnings, *found))


def _describe(arm: PlannedArm, prepared: Prepared) -> Arm:
    run, base = find_pretraining_run(arm), prepared.baselines.get(arm.name)
    return describe_arm(arm, base, prepared.settings.configuration, run, commands_of(arm, run))


def evaluate(
    settings: EvaluationSettings,
    executor: Executor,
    *,
    device: str,
    gpus: Sequence[str] = (),
    command: str = "",
    trainer: training.Trainer = training.train_fold,
) -> tuple[Evaluation, Path]:
    """The whole evaluation; a second start goes on where the first was stopped.

    Args:
        settings: What is compared.
        executor: Where trainings and scorings run.
        device: `cpu`, `cuda` or `mps`.
        gpus: CUDA devices to be shared out among the workers, by number.
        command: The command line, kept in the result.
        trainer: What trains one fold.

    Returns:
        The evaluation and the folder that holds its `evaluation.json`.

    Raises:
        FileNotFoundError: If a dataset or plans are missing.
        ValueError: If the comparison would not be fair, or trainings failed.
    """
    prepared = prepare(settings, executor)
    write_plans(prepared)
    train(prepared, executor, device, gpus, trainer)
    runs, scores = collect(prepared, executor)
    evaluation = conclude(prepared, runs, scores, command)
    save_evaluation(evaluation, prepared.folder)
    return evaluation, prepared.folder
