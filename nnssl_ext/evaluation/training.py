"""Runs the fold trainings that are missing: in this process, in several, on several GPUs, or on a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nnssl_ext.core.executor import Executor


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What a worker needs to train one fold; plain data."""

    dataset: str
    plans_name: str
    configuration: str
    fold: int
    trainer: str
    device: str
    """`cpu`, `cuda` or `mps`."""
    gpus: tuple[str, ...]
    """CUDA devices that the workers share out among themselves; empty where each sees its own."""
    log_file: Path
    """Receives what nnU-Net prints."""


Trainer = Callable[[TrainingTask], None]


def train_fold(task: TrainingTask) -> None:
    """Trains and validates one fold, going on from its last checkpoint.

    Raises:
        FileNotFoundError: If plans or preprocessed cases are missing.
        ValueError: If the plans lack the fold, or a run in progress was started with other settings.
        RuntimeError: If every GPU is taken.
    """
    from nnssl_ext.finetuning.run import run_fold

    task.log_file.parent.mkdir(parents=True, exist_ok=True)
    use_gpu(task.gpus, task.log_file.parent)
    with task.log_file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        run_fold(
            task.dataset,
            task.plans_name,
            task.configuration,
            task.fold,
            device=task.device,
            trainer=task.trainer,
            verbose=True,
        )


def train_missing(
    tasks: Mapping[str, TrainingTask], executor: Executor, train: Trainer = train_fold
) -> Iterator[tuple[str, str | None]]:
    """Trains folds and yields each key with its error, or None, in the order in which they finish."""
    for result in executor.run(train, {key: (task,) for key, task in tasks.items()}):
        yield result.key, result.error


_lease: IO[str] | None = None
"""The lock of the GPU that this process owns, held until the process ends."""


def use_gpu(gpus: Sequence[str], folder: Path) -> None:
    """Takes one GPU for the rest of this process' life, before CUDA starts in it; none where none are shared out.

    nnU-Net always trains on the first visible device, so the choice is made through `CUDA_VISIBLE_DEVICES`. A lock file
    per GPU keeps workers apart; the system releases it also when a worker is killed.

    Raises:
        RuntimeError: If other workers hold all of them.
    """
    global _lease
    if _lease is not None or not gpus:
        return
    for gpu in gpus:
        handle = (folder / f".gpu_{gpu}.lock").open("w")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lease = handle
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return
        handle.close()
    raise RuntimeError(f"all GPUs ({', '.join(gpus)}) are taken by other workers of this evaluation")
