"""Earlier states of a run to go back to, and the account of every time that the engine intervened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.engine.checkpoint import save_checkpoint

KEEP = 3
SHARE = 50
"""A state is kept every fiftieth part of a run."""
LEAST_STEPS = 50


@dataclass(frozen=True)
class Ring:
    """The newest states that gave no alarm, each a checkpoint as good as any other, in a folder of the run."""

    folder: Path

    @staticmethod
    def interval(total: int) -> int:
        """Steps between two states of a run of so many steps."""
        return max(total // SHARE, LEAST_STEPS)

    def path(self, step: int) -> Path:
        """Where the state after so many steps lies."""
        return self.folder / f"step_{step:09d}.pth"

    def save(self, step: int, checkpoint: Mapping[str, Any]) -> None:
        """Keeps a state; later ones are of a past that was given up, and the oldest one makes room."""
        save_checkpoint(self.path(step), checkpoint)
        entries = sorted(self.folder.glob("step_*.pth"))
        place = entries.index(self.path(step))
        for path in (*entries[place + 1 :], *entries[: max(place + 1 - KEEP, 0)]):
            path.unlink()

    def newest(self) -> Path | None:
        """The newest state; None where there is none."""
        return max(self.folder.glob("step_*.pth"), default=None)

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_intervention(folder: Path, record: Mapping[str, Any]) -> None:
    """Appends a line to `interventions.jsonl`."""
    with (folder / "interventions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
