"""Logging to the terminal and a file, and progress bars that stay silent where nobody watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def configure_logging(level: int = logging.INFO, file: Path | None = None) -> None:
    """Sends the package's log to stderr and, if given, appends it to a file.

    Args:
        level: Lowest level shown.
        file: A log file; its folder is made when needed.
    """
    root = logging.getLogger("nnssl_ext")
    root.setLevel(level)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)


def track(iterable: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Passes items through and shows a progress bar with speed and remaining time on a terminal's stderr."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            bar.advance(task)
