"""Earlier states of a run to go back to, and the account of every time that the engine intervened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import write_text
from nnssl_ext.engine.checkpoint import save_checkpoint

KEEP = 3
SHARE = 50
"""A state is kept every fiftieth part of a run."""
LEAST_STEPS = 50
INTERVENTIONS_FILE = "interventions.jsonl"


@dataclass(frozen=True)
class Ring:
    """The newest states that gave no alarm, in a folder of the run; what a run goes on from, without a network."""

    folder: Path

    @staticmethod
    def interval(total: int, steps_per_epoch: int, every: int) -> int:
        """Steps between two states: an epoch or more, since states are large, and in step with looks `every` steps."""
        return -(-max(total // SHARE, LEAST_STEPS, steps_per_epoch) // every) * every

    def path(self, step: int) -> Path:
        """Where the state after so many steps lies."""
        return self.folder / f"step_{step:09d}.pth"

    def save(self, step: int, resume: Mapping[str, Any]) -> None:
        """Keeps a state; later ones are of a past that was given up, and the oldest one makes room."""
        save_checkpoint(self.path(step), {"resume": resume})
        self.forget_after(step)
        for path in sorted(self.folder.glob("step_*.pth"))[:-KEEP]:
            path.unlink()

    def forget_after(self, step: int) -> None:
        """Removes the states of a past that was given up: those of more steps."""
        for path in self.folder.glob("step_*.pth"):
            if path > self.path(step):
                path.unlink()

    def newest(self, tried: int | None = None) -> Path | None:
        """The newest state, or the one before it where the newest was tried; None where there is none.

        Args:
            tried: Steps of the state that the run last went back to: if none was kept since, it did not help.
        """
        paths = sorted(self.folder.glob("step_*.pth"))[-2:]
        if tried is not None and paths and paths[-1] == self.path(tried):
            return paths[0]
        return paths[-1] if paths else None

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_intervention(folder: Path, record: Mapping[str, Any]) -> None:
    """Appends a line to `interventions.jsonl`."""
    with (folder / INTERVENTIONS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def keep_interventions(folder: Path, number: int) -> None:
    """Keeps so many lines of `interventions.jsonl`, the first; without any it is removed."""
    path = folder / INTERVENTIONS_FILE
    if path.exists() and number:
        write_text(path, "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:number]))
    else:
        path.unlink(missing_ok=True)
