"""Logging to the terminal, and progress bars that stay silent where nobody watches."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_MILLION = 1e6
_SHORTEST = 1e-9
LOG_SECONDS = 60.0
"""How often progress is logged where there is no terminal to show a bar on."""
logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """Sends the package's log to stderr."""
    root = logging.getLogger("nnssl_ext")
    root.setLevel(logging.INFO)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)


class Speed:
    """How fast cases are done; written as `0.50 cases/s, 2.31 Mvoxels/s`, without voxels where none were counted.

    Args:
        clock: Tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start = clock, clock()
        self._cases = self._voxels = 0

    def add(self, voxels: int = 0) -> None:
        """Counts a case that is done, and its voxels."""
        self._cases += 1
        self._voxels += voxels

    def __str__(self) -> str:
        seconds = max(self._clock() - self._start, _SHORTEST)
        voxels = f", {self._voxels / seconds / _MILLION:.2f} Mvoxels/s" if self._voxels else ""
        return f"{self._cases / seconds:.2f} cases/s{voxels}"


def track(iterable: Iterable[T], total: int, description: str, speed: Speed | None = None) -> Iterator[T]:
    """Passes items through and shows how far they are.

    On a terminal's stderr that is a bar with the remaining time, elsewhere a line in the log, every `LOG_SECONDS`.

    Args:
        iterable: The items.
        total: Their number.
        description: What is done with them.
        speed: Shown as well; whoever takes the items counts what is done.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TextColumn("{task.fields[speed]}"), progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    due = time.monotonic() + LOG_SECONDS
    with progress.Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, speed="")
        for number, item in enumerate(iterable, start=1):
            yield item
            bar.update(task, advance=1, speed=str(speed or ""))
            if not console.is_terminal and time.monotonic() >= due:
                due = time.monotonic() + LOG_SECONDS
                logger.info("%s: %d of %d %s", description, number, total, speed or "")
