"""`nnssl_report`: draws the report of an evaluation again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.cli.common import command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_report",
        description="Draws report.html again from an evaluation.json, without training or scoring anything. Pictures "
        "of cases and of the pretraining appear where their files are still there.",
        allow_abbrev=False,
    )
    result.add_argument(
        "evaluation", type=Path, help="evaluation.json or its folder: $nnssl_results/DATASET/evaluation/NAME"
    )
    result.add_argument("-o", type=Path, metavar="FOLDER", help="folder for report.html (default: the evaluation's)")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_report`."""
    args = parser().parse_args(argv)
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.evaluation.records import load_evaluation
    from nnssl_ext.reports.page import write_report

    configure_logging()
    evaluation = load_evaluation(args.evaluation)
    folder = args.evaluation if args.evaluation.is_dir() else args.evaluation.parent
    print(f"report: {write_report(evaluation, args.o or folder)}")
