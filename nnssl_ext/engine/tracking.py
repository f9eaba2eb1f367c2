"""What a run leaves behind while it goes: records, TensorBoard, pictures and a line on the terminal.

`metrics.jsonl` holds numbers that depend on the run alone, so a run that was killed and resumed leaves the very same
file; what depends on the machine (speed, memory, waiting) goes to `timing.jsonl`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch

from nnssl_ext.core.records import atomic_path, write_text
from nnssl_ext.engine.pictures import DPI, draw_progress, draw_reconstruction
from nnssl_ext.engine.recovery import INTERVENTIONS_FILE
from nnssl_ext.engine.saturation import solved, verdict

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL = 30.0
"""Seconds between two drawings of `progress.png`; the last epoch is always drawn."""


class JsonLines:
    """A file of one JSON record per epoch, appended and synced; what lies beyond the checkpoint is cut off first.

    Args:
        path: The file.
        num_epochs: Records of epochs from this one on are dropped, as is a last line that a crash cut short.
    """

    def __init__(self, path: Path, num_epochs: int) -> None:
        self.path = path
        self.records = [record for record in read_records(path) if record["epoch"] < num_epochs]
        write_text(path, "".join(_line(record) for record in self.records))

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; numbers that are not finite become null, which JSON can hold."""
        record = {name: _finite(value) for name, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none where there is no file; a last line without its end is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker:
    """Writes a run's records, pictures and TensorBoard events; used by rank 0 alone. A context manager.

    Args:
        folder: The run's folder.
        title: Names the run in pictures.
        num_epochs: Epochs of the run.
        start_epoch: Epochs that a resumed run has finished; records beyond are cut off.
        tensorboard: Whether to write TensorBoard events.
    """

    def __init__(self, folder: Path, title: str, num_epochs: int, start_epoch: int, tensorboard: bool = True) -> None:
        self.folder = folder
        self.title = title
        self.num_epochs = num_epochs
        self.metrics = JsonLines(folder / "metrics.jsonl", start_epoch)
        self.timing = JsonLines(folder / "timing.jsonl", start_epoch)
        self._drawn = -math.inf
        self._undrawn = False
        self._writer: SummaryWriter | None = _writer(folder / "tensorboard", start_epoch) if tensorboard else None

    def epoch(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """Writes the records of a finished epoch; both begin with its number, `epoch`."""
        self.metrics.append(metrics)
        self.timing.append(timing)
        epoch = metrics["epoch"]
        if self._writer is not None:
            for name, value in {**metrics, **timing}.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, epoch)
        logger.info(epoch_line(metrics, timing, self.num_epochs))
        for name, since in solved(self.metrics.records).items():
            if since == epoch:
                logger.warning(verdict(name, since))
        if time.monotonic() - self._drawn > PROGRESS_INTERVAL or epoch == self.num_epochs - 1:
            self.draw_progress()
        else:
            self._undrawn = True

    def rewind(self, num_epochs: int) -> None:
        """Drops the records from that epoch on: the run has gone back and will make them again."""
        self.metrics = JsonLines(self.metrics.path, num_epochs)
        self.timing = JsonLines(self.timing.path, num_epochs)

    def draw_progress(self) -> None:
        """Draws `progress.png` from all records."""
        self._drawn, self._undrawn = time.monotonic(), False
        interventions = read_records(self.folder / INTERVENTIONS_FILE)
        figure = draw_progress(self.metrics.records, self.timing.records, self.title, interventions)
        with atomic_path(self.folder / "progress.png") as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")

    def reconstruction(self, epoch: int, images: Mapping[str, torch.Tensor], spacing: Sequence[float]) -> None:
        """Draws mid-slices of the first sample to `reconstructions/epoch_NNNN.png` and to TensorBoard.

        Args:
            epoch: The finished epoch.
            images: Name to (B, C, *patch); see `draw_reconstruction`.
            spacing: In mm, in the order of the axes.
        """
        first = {name: image[0].cpu() for name, image in images.items()}
        arrays = {name: (each.float() if each.is_floating_point() else each).numpy() for name, each in first.items()}
        figure = draw_reconstruction(arrays, spacing, f"{self.title}, epoch {epoch + 1}")
        with atomic_path(self.folder / "reconstructions" / f"epoch_{epoch + 1:04d}.png") as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", facecolor=figure.get_facecolor())
        if self._writer is not None:
            self._writer.add_figure("reconstruction", figure, epoch)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._undrawn:
            self.draw_progress()
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, start_epoch: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_epoch)


def epoch_line(metrics: Mapping[str, Any], timing: Mapping[str, Any], num_epochs: int) -> str:
    """One line about an epoch, for the log."""
    parts = [f"epoch {metrics['epoch'] + 1}/{num_epochs}"]
    parts += [
        f"{name.removesuffix('_loss')} {metrics[name]:.4f}"
        for name in ("train_loss", "val_loss")
        if metrics.get(name) is not None
    ]
    parts.append(f"lr {metrics['lr']:.2e}")
    parts += [
        f"{name.replace('_', ' ')} {metrics[name]:.2f}"
        for name in ("effective_rank", "token_spread", "same_case_retrieval", "probe_dice", "probe_knn_dice")
        if metrics.get(name) is not None
    ]
    parts.append(f"{timing['steps_per_second']:.2f} steps/s")
    parts.append(f"waiting for data {timing['data_wait_share']:.0%}")
    if "gpu_memory_gb" in timing:
        parts.append(f"{timing['gpu_memory_gb']:.1f} GB")
    parts.append(f"left {clock(timing['eta_seconds'])}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as `1 d 02:03:04` or `02:03:04`."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


class Bar:
    """A progress bar of the run on stderr, with loss, speed, share of waiting, GPU memory and remaining time.

    It stays silent where stderr is no terminal, and on ranks other than 0.

    Args:
        total: Optimiser steps of the run.
        done: Steps that are already done.
        enabled: False switches it off.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._progress: Progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task: TaskID = self._progress.add_task("pretraining", total=total, completed=done, state="")

    def step(self, loss: float, timing: Mapping[str, float]) -> None:
        """Advances by one optimiser step."""
        state = f"loss {loss:.4f}  {timing['steps_per_second']:.2f} steps/s  data {timing['data_wait_share']:.0%}"
        if "gpu_memory_gb" in timing:
            state += f"  {timing['gpu_memory_gb']:.1f} GB"
        self._progress.update(self._task, advance=1, state=state)

    def rewind(self, done: int) -> None:
        """Shows so many steps as done: the run has gone back and will take the others again."""
        self._progress.update(self._task, completed=done)

    def __enter__(self) -> Bar:
        self._progress.start()
        self._redirect(sys.__stderr__, sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirect(sys.stderr, sys.__stderr__)
        self._progress.stop()

    def _redirect(self, old: TextIO | None, new: TextIO | None) -> None:
        """Let log lines appear above a live bar: rich catches `sys.stderr`, not the stream that handlers hold."""
        if self._progress.disable or new is None:
            return
        for handler in logging.getLogger("nnssl_ext").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
