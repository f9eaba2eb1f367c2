"""`nnssl_extract_fingerprint`: checks and measures every case of a dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl_ext.cli.common import command, record

DEFAULT_PROCESSES = 8
"""nnU-Net's number; each may hold six volumes in memory."""
SHOWN_PROBLEMS = 20


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(prog="nnssl_extract_fingerprint", description=__doc__, allow_abbrev=False)
    result.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="ids or full names of datasets")
    add_arguments(result)
    return result


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Arguments shared with `nnssl_plan_and_preprocess`."""
    target.add_argument(
        "-np",
        type=int,
        metavar="N",
        help=f"worker processes, 0 for none (default: one per core, at most {DEFAULT_PROCESSES})",
    )
    target.add_argument("--scheduler", metavar="ADDRESS", help="run on a Dask scheduler, such as tcp://host:8786")
    target.add_argument("--cluster", choices=("slurm", "lsf", "pbs"), help="start the workers as jobs of a cluster")
    target.add_argument(
        "--skip_failed", action="store_true", help="end with status 0 although cases failed; they are left out"
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parser().parse_args(argv)
    for dataset in arguments.d:
        run(dataset, arguments)
        record(dataset, "nnssl_extract_fingerprint", argv)


def run(dataset: str, arguments: argparse.Namespace) -> None:
    """Extracts the fingerprint of one dataset and reports what is wrong with it.

    Args:
        dataset: Id or full name.
        arguments: Those of `add_arguments`.

    Raises:
        ValueError: If cases failed and `--skip_failed` is not given, or none can be used.
    """
    from nnssl_ext.core.executor import available_cores, make_executor
    from nnssl_ext.core.logs import configure_logging
    from nnssl_ext.core.paths import find_dataset, preprocessed_root, raw_root
    from nnssl_ext.dataset.manifest import Manifest, overlooked
    from nnssl_ext.fingerprint.extract import extract_fingerprint
    from nnssl_ext.fingerprint.record import FINGERPRINT_FILE

    configure_logging()
    manifest = Manifest.load(find_dataset(dataset, raw_root()))
    folder = preprocessed_root() / manifest.dataset_name
    processes = min(available_cores(), DEFAULT_PROCESSES) if arguments.np is None else arguments.np
    with make_executor(processes, arguments.scheduler, arguments.cluster) as executor:
        fingerprint = extract_fingerprint(manifest, folder, executor)
    print(f"{manifest.dataset_name}: {len(fingerprint.cases)} of {len(manifest.cases)} cases described")
    for problem in fingerprint.problems[:SHOWN_PROBLEMS]:
        print(f"  {problem}")
    for sentence in overlooked(manifest):
        print(f"  {sentence}")
    hidden = len(fingerprint.problems) - SHOWN_PROBLEMS
    if hidden > 0:
        print(f"  and {hidden} more")
    print(f"  written to {folder / FINGERPRINT_FILE}")
    failed = len(manifest.cases) - len(fingerprint.cases)
    if failed and not arguments.skip_failed:
        raise ValueError(
            f"{failed} of {len(manifest.cases)} cases of {manifest.dataset_name} cannot be used (listed above). "
            "Repair or remove them, or go on without them: --skip_failed"
        )
