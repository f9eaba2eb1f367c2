"""`nnssl_report`: draws the report of an evaluation, or of a comparison of methods, again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.cli.common import command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_report",
        description="Draws report.html again from an evaluation.json, and comparison.html where a comparison.json lies "
        "beside it, without training or scoring anything. Pictures of cases and of the pretraining appear where their "
        "files are still there.",
        allow_abbrev=False,
    )
    result.add_argument(
        "evaluation", type=Path, help="evaluation.json or its folder: $nnssl_results/DATASET/evaluation/NAME"
    )
    result.add_argument("-o", type=Path, metavar="FOLDER", help="folder for the pages (default: the evaluation's)")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nnssl_report`."""
    args = parser().parse_args(argv)
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.evaluation.comparison_records import COMPARISON_FILE, load_comparison
    from nnssl_ext.evaluation.records import load_evaluation
    from nnssl_ext.reports.comparison import write_comparison
    from nnssl_ext.reports.page import write_report

    configure_logging()
    evaluation = load_evaluation(args.evaluation)
    folder = args.evaluation if args.evaluation.is_dir() else args.evaluation.parent
    target = args.o or folder
    print(f"report: {write_report(evaluation, target)}")
    if (folder / COMPARISON_FILE).is_file():
        print(f"comparison: {write_comparison(load_comparison(folder), evaluation, target)}")
