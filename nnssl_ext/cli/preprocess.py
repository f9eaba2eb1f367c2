"""`nnssl_preprocess`: crops, normalises and resamples every case into a store that training reads from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl_ext.cli.common import command, record
from nnssl_ext.cli.extract_fingerprint import DEFAULT_PROCESSES
from nnssl_ext.cli.extract_fingerprint import add_arguments as add_executor_arguments


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(prog="nnssl_preprocess", description=__doc__, allow_abbrev=False)
    result.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="ids or full names of datasets")
    result.add_argument("-plans_name", "-p", default="nnsslPlans", metavar="PLANS", help="plans (default: nnsslPlans)")
    add_executor_arguments(result)
    add_arguments(result)
    return result


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Arguments shared with `nnssl_plan_and_preprocess`, beside those of the executor."""
    target.add_argument(
        "-c", nargs="+", metavar="CONFIGURATION", help="configurations of the plans (default: all of them)"
    )
    target.add_argument("--overwrite", action="store_true", help="make everything anew instead of what is missing")
    target.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="number type on disk (default: float16)"
    )
    target.add_argument(
        "-device", default="cpu", help="where images are resampled: cpu, or cuda on every worker (default: cpu)"
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parser().parse_args(argv)
    for dataset in arguments.d:
        run(dataset, arguments.plans_name, arguments)
        record(dataset, "nnssl_preprocess", argv)


def run(dataset: str, plans_name: str, arguments: argparse.Namespace) -> None:
    """Preprocesses one dataset and prints where its stores are.

    Args:
        dataset: Id or full name.
        plans_name: Name of its plans file.
        arguments: Those of the executor and of `add_arguments`.

    Raises:
        FileNotFoundError: If dataset or plans are missing.
        ValueError: If cases failed and `--skip_failed` is not given, or none can be used.
    """
    from nnssl_ext.core.executor import available_cores, make_executor
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.preprocessing.run import preprocess_configurations

    configure_logging()
    processes = min(available_cores(), DEFAULT_PROCESSES) if arguments.np is None else arguments.np
    with make_executor(processes, arguments.scheduler, arguments.cluster) as executor:
        stores = preprocess_configurations(
            dataset,
            plans_name,
            arguments.c,
            executor,
            skip_failed=arguments.skip_failed,
            overwrite=arguments.overwrite,
            dtype=arguments.dtype,
            device=arguments.device,
        )
    for store in stores:
        size = sum(entry.num_bytes for entry in store.entries.values())
        print(f"{store.folder}: {len(store.entries)} cases, {size / 1e6:.1f} MB")
