"""Which commands made what is in a folder: one line each, in `nnssl_commands.jsonl`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

HISTORY_FILE = "nnssl_commands.jsonl"


def record_command(folder: Path, program: str, argv: Sequence[str] | None) -> None:
    """Adds a command that has made something in a folder.

    Args:
        folder: It must be there.
        program: Name of the command.
        argv: Its arguments; None: those of this process.
    """
    line = {
        "command": shlex.join([program, *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version("nnssl_ext"),
    }
    with (folder / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def recorded_commands(folder: Path) -> tuple[str, ...]:
    """The commands that made what is in a folder, in the order of their last use, each once; none where unknown."""
    path = folder / HISTORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    latest_first = dict.fromkeys(json.loads(line)["command"] for line in reversed(lines))
    return tuple(reversed(latest_first))
