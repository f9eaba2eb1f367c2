"""Processes that train together: who am I, averages over ranks, and starting torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank: validation pictures and checkpoints are written by rank 0 while the others wait."""

SHUTDOWN_SECONDS = 300
"""What torchrun gives a process to finish its step and write a checkpoint before it kills it."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of this process among those that train together."""

    rank: int = 0
    """Place among all processes, 0 writes the files."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Place on this machine: the index of its GPU, which is not the rank when there are several machines."""

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


def current_world() -> World:
    """The world that torchrun describes in the environment, else a single process."""
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    return World(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the other processes for the length of a block: NCCL on CUDA, gloo elsewhere; nothing for one process."""
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The average of a tensor over all processes; the tensor itself for one process."""
    if not distributed.is_initialized():
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / distributed.get_world_size()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank, so that all ranks take the same branch."""
    if not distributed.is_initialized():
        return flag
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def torchrun(num_processes: int, arguments: Sequence[str]) -> tuple[int, bool]:
    """Run `nnssl_train` with these arguments in several processes of this machine and wait for them.

    A SIGTERM or SIGUSR1 that arrives here is handed to torchrun as SIGTERM, which hands it to every process.

    Args:
        num_processes: Processes to start, one for each GPU.
        arguments: Command line of `nnssl_train`, without the number of GPUs.

    Returns:
        torchrun's exit status, and whether it was asked to stop.
    """
    command = [sys.executable, "-m", "nnssl_ext.engine.launch", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    child = subprocess.Popen([*command, "-m", "nnssl_ext.cli.train", *arguments], env=environment)

    stopped = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        child.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return child.wait(), stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
