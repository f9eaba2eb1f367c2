"""`nnssl_compare`: which pretraining method is best on my data, and how sure is that."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command
from nnssl_ext.cli.machine import add_machine, default_device, num_train, num_workers, shared_gpus, training_executor

if TYPE_CHECKING:
    from nnssl_ext.core.executor import Executor
    from nnssl_ext.evaluation.comparison_records import MethodComparison
    from nnssl_ext.evaluation.comparison_settings import ComparisonSettings
    from nnssl_ext.evaluation.comparison_tasks import Machine

EPILOG = """examples:
  nnssl_compare -d 4 -tr MAETrainer SparkTrainer --budget 10min --num_train 5 20 --seeds 0 1 2
  nnssl_compare -d 4 -tr MAETrainer DINOv2Trainer --budget 2000 --fractions 0.05 0.25 --sham --pretrain_dataset 1
  nnssl_compare -d 4 -tr MAETrainer SimCLRTrainer --budget 550 --settings protocol.json -f 0 -np 2
  nnssl_compare -d 4 -tr MAETrainer SparkTrainer --budget 10min --list        what would be run

Every method is pretrained for each seed with the same budget, probed by labels beside the untrained network (and, with
--sham, a control run with destroyed targets), and fine-tuned on the same folds, subsets and seeds as a network from
scratch. A second start goes on where the first one stopped. comparison.json, comparison.html, comparison.md and the
evaluation behind them go to $nnssl_results/DATASET/evaluation/NAME. docs/comparison.md says what the numbers mean.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_compare",
        description="Pretrains with several methods under one budget, fine-tunes each and a network from scratch, and "
        "says which is best and how sure that is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("-d", required=True, metavar="DATASET", help="id or name of the labelled dataset")
    add("-tr", nargs="+", required=True, metavar="TRAINER", help="methods; nnssl_train --list shows all")
    add("--budget", required=True, help="of each pretraining run: optimiser steps (500), or time (90s, 10min, 2h)")
    add("--pretrain_dataset", metavar="DATASET", help="what to pretrain on (default: the only other preprocessed one)")
    add("-f", nargs="+", type=int, default=[], metavar="FOLD", help="folds (default: all)")
    add("--num_train", nargs="+", type=num_train, metavar="N", help="training cases per fold, or all (default: all)")
    add("--fractions", nargs="+", type=float, metavar="SHARE", help="shares of the training cases, not --num_train")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds (default: 0 1 2)")
    add(
        "--sham",
        nargs="?",
        const="probe",
        default="no",
        choices=("probe", "finetune"),
        help="control runs with destroyed targets: probed, or fine-tuned as well (default: none; alone: probe)",
    )
    add("--settings", type=Path, metavar="FILE", help="JSON with plans, patches, batches and settings by method")
    add("--splits", type=Path, metavar="FILE", help="JSON of folds with train and val ids (default: splits_final.json)")
    add("--name", help="name of the comparison (default: made from the budget)")
    add(
        "--list",
        action="store_true",
        help="show which runs are finished and which are missing, and leave (new methods are measured first)",
    )
    machine = result.add_argument_group("machine")
    add_machine(machine, "one thread")
    machine.add_argument("--precision", default="auto", help="of pretraining: auto, bf16, fp16 or fp32")
    machine.add_argument(
        "-num_workers", type=int, metavar="N", help="processes that read crops (default: 4, on a CPU 0)"
    )
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_compare`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    if args.fractions and args.num_train:
        raise ValueError("give either --num_train or --fractions, not both")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.evaluation.comparison import compare_methods
    from nnssl_ext.reports.comparison import write_comparison
    from nnssl_ext.reports.page import write_report

    configure_logging()
    settings, machine = _settings(args), _machine(args)
    with _executor(args, machine.device) as executor:
        if args.list:
            _show(settings, executor, machine)
            return
        line = shlex.join(["nnssl_compare", *arguments])
        comparison, evaluation, folder = compare_methods(settings, executor, machine, command=line)
    write_report(evaluation, folder)
    _conclude(comparison, write_comparison(comparison, evaluation, folder))


def _settings(args: argparse.Namespace) -> ComparisonSettings:
    from nnssl_ext.evaluation.comparison_settings import Budget, ComparisonSettings, read_settings

    return ComparisonSettings(
        dataset=args.d,
        trainers=tuple(args.tr),
        budget=Budget.parse(args.budget),
        pretrain_dataset=args.pretrain_dataset,
        seeds=tuple(args.seeds),
        folds=tuple(args.f),
        num_train=tuple(args.num_train or ["all"]),
        fractions=tuple(args.fractions or ()),
        sham=args.sham,
        splits=args.splits,
        name=args.name,
        **read_settings(args.settings, tuple(args.tr)),
    )


def _machine(args: argparse.Namespace) -> Machine:
    from nnssl_ext.evaluation.comparison_tasks import Machine

    device = args.device or default_device()
    return Machine(
        device=device,
        precision=args.precision,
        num_workers=num_workers(args, device),
        gpus=shared_gpus(args, device),
    )


def _executor(args: argparse.Namespace, device: str) -> Executor:
    """Every run is a process of its own with one thread, so that its numbers do not depend on how many run."""
    from nnssl_ext.core.executor import make_executor

    if args.scheduler or args.cluster or device != "cpu":
        return training_executor(args, device)
    return make_executor(1 if args.np is None else args.np)


def _show(settings: ComparisonSettings, executor: Executor, machine: Machine) -> None:
    from nnssl_ext.evaluation.comparison import fix_steps
    from nnssl_ext.evaluation.comparison_plan import plan_comparison
    from nnssl_ext.evaluation.comparison_tasks import pretraining_jobs

    planned = plan_comparison(settings, executor)
    jobs = pretraining_jobs(planned, fix_steps(planned, executor, machine), machine)
    for job in jobs:
        state = "finished" if job.task.checkpoint.is_file() else "missing "
        print(f"{state} {job.key}  {job.task.num_epochs * job.task.steps_per_epoch} steps")
    arms = len(planned.networks) + len(planned.fine_tuned)
    runs = arms * len(settings.seeds) * len(planned.folds) * len(planned.num_train)
    print(f"then {runs} fine-tunings of {arms} arms; the comparison goes to {planned.folder}")


def _conclude(comparison: MethodComparison, report: Path) -> None:
    print(comparison.headline)
    for ranking in comparison.rankings:
        for sentence in ranking.sentences:
            print(f"  {sentence}")
    print(f"  {comparison.certainty}")
    for warning in comparison.warnings:
        print(f"warning: {warning}")
    print(f"report: {report}")
