"""nnssl_env: prints what a shell should export for nnU-Net's own commands."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from nnssl_ext.cli.common import command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return argparse.ArgumentParser(
        prog="nnssl_env",
        allow_abbrev=False,
        description="Print the environment that nnU-Net's own commands need after nnssl_plan_finetuning: its folders "
        "where only nnssl_raw and the like are set, and where it finds -tr SSLFinetuneTrainer.",
        epilog='Use it as: eval "$(nnssl_env)"',
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prints one export per line."""
    parser().parse_args(argv)
    from nnssl_ext.finetuning.environment import exports

    for name, value in exports().items():
        print(f"export {name}={shlex.quote(value)}")
