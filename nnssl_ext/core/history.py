"""Which commands made what is in a folder: one line each, in `nnssl_commands.txt`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

HISTORY_FILE = "nnssl_commands.txt"


def record_command(folder: Path, program: str, argv: Sequence[str] | None) -> None:
    """Adds a command that has made something in a folder.

    Args:
        folder: It must be there.
        program: Name of the command.
        argv: Its arguments; None: those of this process.
    """
    with (folder / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(shlex.join([program, *(sys.argv[1:] if argv is None else argv)]) + "\n")


def recorded_commands(folder: Path) -> tuple[str, ...]:
    """The commands that made what is in a folder, in the order of their last use, each once; none where unknown."""
    path = folder / HISTORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return tuple(reversed(dict.fromkeys(reversed(lines))))
