"""`nnssl_plan_and_preprocess`: fingerprint, plans and preprocessed data of a dataset, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl_ext.cli import extract_fingerprint, plan_experiment, preprocess
from nnssl_ext.cli.common import command, record

EPILOG = """examples:
  nnssl_plan_and_preprocess -d 1                                             for the memory of the GPU at hand
  nnssl_plan_and_preprocess -d 1 -gpu_memory_target 24 -tr DINOv2Trainer     for another GPU and method
  nnssl_plan_and_preprocess -d 1 -spacing 1.5 1.5 1.5 -np 16                 mm as z y x, sixteen processes
  nnssl_plan_and_preprocess -d 1 -pl nnsslPlannerPrimusM                     a vision transformer
  nnssl_plan_and_preprocess -d 1 -pl nnsslPlannerResEncXS                    a small network for CPUs

Files go to $nnssl_preprocessed/DATASET. A second start goes on where the first one stopped.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="nnssl_plan_and_preprocess",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
