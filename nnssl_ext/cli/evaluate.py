"""`nnssl_evaluate`: runs the folds that are missing and says whether pretraining helped."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command
from nnssl_ext.cli.machine import add_machine, default_device, num_train, shared_gpus, training_executor

if TYPE_CHECKING:
    from nnssl_ext.evaluation.preparation import EvaluationSettings, Prepared
    from nnssl_ext.evaluation.records import Evaluation

EPILOG = """examples:
  nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch                       all five folds, all training cases
  nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch --num_train 5 20 all --seeds 0 1 2 -device cpu -np 2
  nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch nnUNetPlans           plain nnU-Net as a third arm
  nnssl_evaluate -d 4 -p ptPlans__mae ptPlans__scratch --list                what would be trained

The reference is the arm planned with nnssl_plan_finetuning --from_scratch. A second start goes on where the first one
stopped. evaluation.json and report.html go to $nnssl_results/DATASET/evaluation/NAME.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_evaluate",
        description="Fine-tunes the arms of a comparison on the same folds, training subsets and seeds, as far as that "
        "is missing; scores whole volumes, compares case by case, and writes a report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("-d", required=True, metavar="DATASET", help="id or name of the labelled dataset")
    add(
        "-p",
        nargs="+",
        required=True,
        metavar="PLANS",
        help="plans of the arms, two or more; {seed} stands for the seed",
    )
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration of the plans (default: %(default)s)")
    add("-f", nargs="+", type=int, default=[], metavar="FOLD", help="folds (default: all that are planned)")
    add("--num_train", nargs="+", type=num_train, metavar="N", help="training cases per fold, or all (default: all)")
    add(
        "--fractions",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="shares of the training cases, instead of --num_train",
    )
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="seeds (default: 0); three or more say more")
    add("--reference", metavar="PLANS", help="arm to compare with (default: the one planned from scratch)")
    add(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="MM",
        help="surface tolerance of NSD in mm (default: %(default)s)",
    )
    add("--plain_trainer", default="nnUNetTrainer", metavar="TRAINER", help="trainer of plain nnU-Net plans")
    add("--name", help="name of the evaluation (default: made from the arms)")
    add("--list", action="store_true", help="show which runs are finished and which are missing, and leave")
    add_machine(result.add_argument_group("machine"))
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_evaluate`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    if args.fractions and args.num_train:
        raise ValueError("give either --num_train or --fractions, not both")
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.evaluation.preparation import prepare
    from nnssl_ext.evaluation.run import evaluate
    from nnssl_ext.reports.page import write_report

    configure_logging()
    settings = _settings(args)
    device = args.device or default_device()
    gpus = shared_gpus(args, device)
    with training_executor(args, device) as executor:
        if args.list:
            _show(prepare(settings, executor))
            return
        line = shlex.join(["nnssl_evaluate", *arguments])
        evaluation, folder = evaluate(settings, executor, device=device, gpus=gpus, command=line)
    _conclude(evaluation, write_report(evaluation, folder))


def _settings(args: argparse.Namespace) -> EvaluationSettings:
    from nnssl_ext.evaluation.preparation import EvaluationSettings

    return EvaluationSettings(
        dataset=args.d,
        plans=tuple(args.p),
        configuration=args.c,
        folds=tuple(args.f),
        num_train=tuple(args.num_train or ["all"]),
        fractions=tuple(args.fractions or ()),
        seeds=tuple(args.seeds),
        reference=args.reference,
        tolerance_mm=args.tolerance,
        plain_trainer=args.plain_trainer,
        name=args.name,
    )


def _show(prepared: Prepared) -> None:
    missing = {run.key for run in prepared.missing}
    for run in prepared.runs:
        state = "missing " if run.key in missing else "finished"
        print(f"{state} {run.key}  {len(run.train_cases)} training, {len(run.val_cases)} validation cases")
    print(
        f"{len(missing)} of {len(prepared.runs)} fold runs are to be trained; the evaluation goes to {prepared.folder}"
    )


def _conclude(evaluation: Evaluation, report: Path) -> None:
    for verdict in evaluation.verdicts:
        print(verdict.headline)
        for size in verdict.sizes:
            print(f"  {size.sentence}")
        print(f"  {verdict.certainty}")
    for warning in evaluation.warnings:
        print(f"warning: {warning}")
    print(f"report: {report}")
