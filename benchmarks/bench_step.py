"""One training step of a method: how long it takes, and the share of data, views, forward, backward and optimiser.

Data is waiting for a batch and bringing it to the device in float32; backward counts all that is nothing else.

Makes MR-like volumes, plans a network with a preset, and takes the engine's own steps in several number formats and
memory layouts, with the plain and the fused optimiser, and compiled, in turn, so that other work on the machine meets
all of them alike. Where compiling fails or takes too long, its row says so. On a CPU the seconds are CPU seconds
of `--threads` threads; on a GPU they are those of the clock, with a wait for the GPU after every part.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from common import Table, describe_machine, finish, made_volume, make_parser, make_plan, now

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.distributed import World
from nnssl_ext.engine.steps import Stepper
from nnssl_ext.engine.task import TRAINERS, PretrainTrainer, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.planner import PLANNERS, PlanningOptions
from nnssl_ext.preprocessing.store import Store, write_case

PARTS = ("data", "views", "forward", "backward", "optimiser")
NUM_VOLUMES = 4


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    precision: str
    channels_last: bool
    compiled: bool = False
    fused: bool = True

    @property
    def name(self) -> str:
        """As the table shows it."""
        optimiser = "" if self.fused else ", plain optimiser"
        return self.precision + ", channels last" * self.channels_last + ", compiled" * self.compiled + optimiser


VARIANTS = (
    Variant("fp32", False, fused=False),
    Variant("fp32", False),
    Variant("fp32", True),
    Variant("bf16", False),
    Variant("bf16", True),
    Variant("fp32", True, compiled=True),
    Variant("bf16", True, compiled=True),
)


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument("--planner", default="nnsslPlannerResEncXS", help="plans the network (default: %(default)s)")
    result.add_argument("--trainer", default="MAETrainer", help="the method (default: %(default)s)")
    result.add_argument("--edge", type=int, default=64, help="patch edge (default: 64)")
    result.add_argument("--batch_size", type=int, default=2, help="crops of a step (default: 2)")
    result.add_argument("--device", default="cpu", help="where the step runs (default: cpu)")
    result.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    result.add_argument("--num_workers", type=int, default=0, help="processes that read crops (default: 0, this one)")
    result.add_argument("--no_compile", action="store_true", help="leave out torch.compile, which first takes minutes")
    result.add_argument(
        "--compile_seconds", type=int, default=240, help="give torch.compile up after so long (default: 240)"
    )
    return result


def plan_network(planner: str, edge: int, batch_size: int) -> Configuration:
    """A configuration of one channel and isotropic voxels with the network of a preset."""
    preset, patch = PLANNERS.get(planner)(PlanningOptions()), (edge,) * 3
    architecture = preset.architecture(preset.topology((1.0, 1.0, 1.0), patch))
    return make_plan(patch, batch_size, architecture).configuration("3d_fullres")


def write_volumes(folder: Path, edge: int) -> Store:
    """A store of z-scored volumes of smooth tissue with noise, half as large again as the patch along each axis."""
    entries, shape = {}, (round(1.5 * edge),) * 3
    for number in range(NUM_VOLUMES):
        image, _ = made_volume(np.random.default_rng(number), shape)
        name = f"case_{number}"
        entries[name] = write_case(folder, name, image[None], {}, np.ones(shape, bool), spacing=(1, 1, 1))
    return Store(folder, entries)


class Clock:
    """Seconds of each part of a step: of the CPU, or on a GPU those that pass until it is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begins a step."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.started = self.now()

    def now(self) -> float:
        """The time, once the device is done."""
        return now(str(self.device))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done in the block."""
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are counted."""

        def call(*arguments: Any) -> Any:
            with self.part(name):
                return function(*arguments)

        return call

    def parts(self) -> dict[str, float]:
        """The step that has ended; what was counted as nothing else, the way back above all, is `backward`."""
        rest = self.now() - self.started - sum(self.seconds.values())
        return {**self.seconds, "backward": rest}


class TimedStepper(Stepper):
    """The engine's step with a clock at its parts."""

    def __init__(self, variant: Variant, trainer: PretrainTrainer, plan: Configuration, device: torch.device) -> None:
        torch.manual_seed(0)
        super().__init__(
            trainer.build_task(plan, NUM_VOLUMES).to(device),
            trainer,
            device=device,
            world=World(),
            seed=0,
            precision=variant.precision,
            compile_task=variant.compiled,
            channels_last=variant.channels_last,
        )
        for group in self.optimizer.param_groups:
            group["fused"] = variant.fused
        self.clock = Clock(device)
        self.task.views = self.clock.timed("views", self.task.views)
        self.module = self.clock.timed("forward", self.module)

    def _views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        with self.clock.part("data"):
            batch = batch.to(self.device)
        return super()._views(batch, random, train)

    def _update(self) -> float:
        with self.clock.part("optimiser"):
            return super()._update()

    def timed_step(self, batches: Iterator[Batch], step: int) -> dict[str, float]:
        """Takes a step and tells the seconds of its parts."""
        self.clock.restart()
        with self.clock.part("data"):
            batch = next(batches)
        self.train_step([batch], step)
        return self.clock.parts()


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {limit} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def first_step(stepper: TimedStepper, batches: Iterator[Batch], limit: int) -> str | float:
    """Seconds of the clock of a step that compiles what is to be compiled, or why it could not be taken."""
    start = time.perf_counter()
    try:
        with at_most(limit):
            stepper.timed_step(batches, 0)
    except (RuntimeError, TimeoutError) as error:  # torch.compile's own errors are RuntimeErrors
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """For each variant its fields, its first step's seconds or failure, and the others' median seconds by part."""
    device, plan = torch.device(arguments.device), plan_network(arguments.planner, arguments.edge, arguments.batch_size)
    trainer = TRAINERS.get(arguments.trainer).configured([], plan.backbone)
    store = write_volumes(folder, arguments.edge)
    variants = [variant for variant in VARIANTS if not (variant.compiled and arguments.no_compile)]
    steppers = {variant: TimedStepper(variant, trainer, plan, device) for variant in variants}
    loader = PatchLoader(
        store,
        list(store.entries),
        plan.patch_size,
        plan.batch_size,
        seed=0,
        num_workers=arguments.num_workers,
        device=device,
    )
    with loader:
        batches = loader.batches(0, (arguments.repeats + 1) * len(steppers))
        begun = {v: first_step(stepper, batches, arguments.compile_seconds) for v, stepper in steppers.items()}
        steps: dict[Variant, list[dict[str, float]]] = {v: [] for v, first in begun.items() if isinstance(first, float)}
        for step in range(1, arguments.repeats + 1):
            for variant, taken in steps.items():
                taken.append(steppers[variant].timed_step(batches, step))
    rows = []
    for variant, first in begun.items():
        taken = steps.get(variant)
        parts = taken and {part: statistics.median(step[part] for step in taken) for part in PARTS}
        rows.append({"name": variant.name, **asdict(variant), "first": first, "seconds": parts})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    print(f"{arguments.trainer}, {arguments.planner}, {arguments.edge}³, batch {arguments.batch_size}")
    shares = dict.fromkeys(PARTS, ">10.1%")
    table = Table({"": "<29", "step s": ">8.3f", "speed-up": ">9.2f", "first s": ">8.1f", **shares})
    plain = sum(rows[0]["seconds"].values())
    for row in rows:
        if row["seconds"] is None:
            print(f"{row['name']:<29} {row['first']}", flush=True)
            continue
        total = sum(row["seconds"].values())
        table.row(row["name"], total, plain / total, row["first"], *(row["seconds"][part] / total for part in PARTS))
    finish(arguments, machine, rows)


if __name__ == "__main__":
    main()
