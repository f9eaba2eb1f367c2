"""`nnssl_plan_and_preprocess`: fingerprint, plans and preprocessed data of a dataset, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl_ext.cli import extract_fingerprint, plan_experiment, preprocess
from nnssl_ext.cli.common import command, record


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(prog="nnssl_plan_and_preprocess", description=__doc__, allow_abbrev=False)
    result.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="ids or full names of datasets")
    extract_fingerprint.add_arguments(result)
    plan_experiment.add_arguments(result)
    preprocess.add_arguments(result)
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parser().parse_args(argv)
    plan_experiment.options_of(arguments)  # a mistake is told before the hours of the fingerprint
    for dataset in arguments.d:
        extract_fingerprint.run(dataset, arguments)
        plan_experiment.run(dataset, arguments)
        preprocess.run(dataset, arguments.plans_name, arguments)
        record(dataset, "nnssl_plan_and_preprocess", argv)
