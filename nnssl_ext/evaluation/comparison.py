"""A comparison of methods from settings to `comparison.json`: check, fix steps, pretrain, probe, fine-tune, rank.

Every stage does what is missing and nothing else, so a second start goes on where the first one was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.evaluation import comparison_jobs as jobs
from nnssl_ext.evaluation import training
from nnssl_ext.evaluation.comparison_plan import Planned, plan_comparison
from nnssl_ext.evaluation.comparison_records import MethodComparison, save_comparison
from nnssl_ext.evaluation.comparison_settings import ComparisonSettings
from nnssl_ext.evaluation.comparison_table import conclude
from nnssl_ext.evaluation.comparison_tasks import (
    Job,
    Machine,
    arm_pattern,
    finetuning_task,
    pretraining_jobs,
    pretraining_task,
    probe_tasks,
)
from nnssl_ext.evaluation.preparation import EvaluationSettings
from nnssl_ext.evaluation.records import Evaluation
from nnssl_ext.evaluation.run import evaluate
from nnssl_ext.finetuning.nnunet_dataset import preprocess

logger = logging.getLogger(__name__)
BUDGET_FILE = "budget.json"


def compare_methods(
    settings: ComparisonSettings,
    executor: Executor,
    machine: Machine,
    *,
    command: str = "",
    train_fold: training.Trainer = training.train_fold,
) -> tuple[MethodComparison, Evaluation, Path]:
    """The whole comparison; a second start goes on where the first was stopped.

    Args:
        settings: What is compared.
        executor: Where runs are carried out.
        machine: On what.
        command: The command line, kept in the result.
        train_fold: What trains one fold.

    Returns:
        The comparison, the evaluation behind it, and the folder that holds both.

    Raises:
        FileNotFoundError: If a dataset or plans are missing.
        ValueError: If the comparison would not be fair, or runs failed.
    """
    planned = plan_comparison(settings, executor)
    costs = fix_steps(planned, executor, machine)
    runs = pretraining_jobs(planned, costs, machine)
    run_all(jobs.pretrain_method, {job.key: job.task for job in runs if not job.task.checkpoint.is_file()}, executor)
    probes = probe_tasks(planned, runs)
    run_all(jobs.probe_method, {k: task for k, task in probes.items() if not task.done}, executor)
    arms = plan_arms(planned, runs, executor, machine.device)
    evaluation, folder = evaluate(
        EvaluationSettings(
            dataset=planned.dataset,
            plans=tuple(arms.values()),
            labels=tuple(arms),
            configuration=planned.configuration,
            folds=planned.folds,
            num_train=planned.num_train,
            seeds=settings.seeds,
            reference=next(iter(arms.values())),
            name=settings.folder_name,
        ),
        executor,
        device=machine.device,
        gpus=machine.gpus,
        command=command,
        trainer=train_fold,
    )
    comparison = conclude(planned, runs, probes, costs, evaluation, command, machine)
    save_comparison(comparison, folder)
    return comparison, evaluation, folder


def run_all(
    function: Callable[[Any], Any], tasks: Mapping[str, Any], executor: Executor, *, alone: bool = False
) -> dict[str, Any]:
    """Runs keyed tasks and returns their values; a failing one does not stop the others.

    Args:
        function: A module-level function of one task.
        tasks: Each has a `log_file`.
        executor: Where they run.
        alone: Whether no two of them run at a time.

    Raises:
        ValueError: If some failed, with the first reason, after all the others have run.
    """
    batches = [{key: (task,)} for key, task in tasks.items()] if alone else [{k: (t,) for k, t in tasks.items()}]
    values, failed = {}, {}
    title = f"{function.__name__.replace('_', ' ')}s"
    results = (result for batch in batches for result in executor.run(function, batch))
    for result in track(results, len(tasks), title):
        if result.error is None:
            values[result.key] = result.value
            logger.info("done: %s %s", function.__name__.replace("_", " "), result.key)
        else:
            failed[result.key] = result.error
            logger.error("%s failed: %s", result.key, result.error)
    if failed:
        key, error = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(tasks)} runs failed, the first is {key}: {error}. See {tasks[key].log_file}; the "
            "same command goes on with what is missing"
        )
    return values


def fix_steps(planned: Planned, executor: Executor, machine: Machine) -> dict[str, dict[str, float]]:
    """Steps of every method, and the seconds that one takes, from `budget.json`; measured where it lacks a method.

    What stands there is never measured again, so a run that is taken up elsewhere, or on a busier machine, has the same
    steps and the same schedule.

    Returns:
        Code of a real method to `seconds_per_step` and `steps`.

    Raises:
        ValueError: If the folder belongs to a comparison with another budget, device or precision, or a measurement
            failed.
    """
    path = planned.folder / BUDGET_FILE
    now = {"budget": planned.settings.budget.text, "device": machine.device, "precision": machine.precision}
    kept: dict[str, Any] = read_json(path) if path.is_file() else {**now, "methods": {}}
    for name, value in now.items():
        if (begun := kept.get(name)) != value:
            raise ValueError(
                f"{planned.folder} was begun with {name} {begun}, not {value}. Give that one, or another --name"
            )
    real = {method.code: method for method in planned.methods if not method.sham}
    missing = {
        code: pretraining_task(planned, m, 1, 0, machine) for code, m in real.items() if code not in kept["methods"]
    }
    tasks = {f"{real[code].short}-{code}": task for code, task in missing.items()}
    measured = run_all(jobs.measure_step, tasks, executor, alone=True)
    for code in missing:
        method, seconds = real[code], measured[f"{real[code].short}-{code}"]
        steps = planned.settings.budget.num_steps(seconds)
        kept["methods"][code] = {"trainer": method.trainer, "seconds_per_step": seconds, "steps": steps}
        logger.info("%s: %.3f s a step, %d steps in %s", method.trainer, seconds, steps, now["budget"])
    if missing:
        write_json(path, kept)
    return kept["methods"]


def plan_arms(planned: Planned, runs: list[Job], executor: Executor, device: str) -> dict[str, str]:
    """Plans of every arm, and the preprocessed cases: label to plans name, from scratch first."""
    first = planned.settings.seeds[0]
    scratch, tasks, arms = {}, {}, {}
    for network, method in planned.networks.items():
        job = next(job for job in runs if job.method == method and job.seed == first)
        name = planned.scratch_name(network, device)
        arms[planned.scratch_label(network)] = name
        scratch[name] = finetuning_task(planned, job, name, from_scratch=True)
    for job in runs:
        if job.method in planned.fine_tuned:
            pattern = arm_pattern(planned, job)
            arms[job.method.label] = pattern
            name = pattern.format(seed=job.seed)
            tasks[name] = finetuning_task(planned, job, name, from_scratch=False)
    run_all(jobs.plan_arm, {**scratch, **tasks}, executor)
    for task in scratch.values():
        preprocess(task.plans_path, planned.configuration, executor)
    return arms
