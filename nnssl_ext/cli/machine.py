"""Options that commands with many trainings share: where they run, how many at a time, on how many labelled cases."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nnssl_ext.core.executor import Executor

GPU_WORKERS = 4


def add_machine(group: argparse._ArgumentGroup, threads: str = "all threads") -> None:
    """Adds the options of the machine; `threads` are those of a CPU that one training at a time has, for the help."""
    add = group.add_argument
    add("-device", "--device", choices=("cpu", "cuda", "mps"), help="where to train (default: cuda where there is one)")
    add(
        "-np",
        type=int,
        metavar="N",
        help=f"trainings at a time on a CPU, with one thread each (default: 1, {threads})",
    )
    add("-num_gpus", "--num_gpus", type=int, default=1, metavar="N", help="GPUs, one training on each (default: 1)")
    add("--scheduler", metavar="ADDRESS", help="run on a Dask scheduler, such as tcp://host:8786")
    add("--cluster", choices=("slurm", "lsf", "pbs"), help="start -np workers as jobs of a cluster")


def num_train(text: str) -> int | Literal["all"]:
    """Reads a number of training cases."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of cases nor all")
    return "all" if text == "all" else int(text)


def default_device() -> str:
    """CUDA where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def num_workers(args: argparse.Namespace, device: str) -> int:
    """How many processes read crops: as asked for, else none on a CPU and on a GPU four, or fewer on fewer cores."""
    from nnssl_ext.core.executor import available_cores

    if args.num_workers is not None:
        return args.num_workers
    return 0 if device == "cpu" else min(GPU_WORKERS, available_cores())


def shared_gpus(args: argparse.Namespace, device: str) -> tuple[str, ...]:
    """The CUDA devices that local workers share out; none on a cluster, where each worker sees its own.

    Raises:
        ValueError: If there are fewer than asked for.
    """
    if device != "cuda" or args.scheduler or args.cluster:
        return ()
    import os

    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]
    if not 1 <= args.num_gpus <= len(visible):
        raise ValueError(f"-num_gpus {args.num_gpus} is not possible: {len(visible)} CUDA devices are visible")
    return tuple(visible[: args.num_gpus])


def training_executor(args: argparse.Namespace, device: str) -> Executor:
    """One process per training at a time; on a CPU a single training runs in this process, with all threads."""
    from nnssl_ext.core.executor import make_executor

    if args.scheduler or args.cluster:
        return make_executor(args.np or 1, args.scheduler, args.cluster)
    if device == "cuda":
        return make_executor(args.num_gpus)
    processes = 1 if args.np is None else args.np
    return make_executor(0 if processes == 1 else processes)
