"""One training step of a method: how long it takes, and the share of reading, views, forward, backward and optimiser.

Makes MR-like volumes, plans a network with a preset, and takes the engine's own steps in several number formats and
memory layouts, in turn, so that other work on the machine meets all of them alike. On a CPU the seconds are CPU seconds
of `--threads` threads; on a GPU they are those of the clock, with a wait for the GPU after every part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl_ext.engine.distributed import World
from nnssl_ext.engine.steps import Stepper
from nnssl_ext.engine.task import TRAINERS, PretrainTrainer
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.planners.planner import PLANNERS, PlanningOptions
from nnssl_ext.planners.spacing import resampling_keys
from nnssl_ext.preprocessing.store import Store, write_case

PARTS = ("data", "views", "forward", "backward", "optimiser")
NUM_VOLUMES = 4


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    precision: str
    channels_last: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self.precision + ", channels last" * self.channels_last + ", compiled" * self.compiled


VARIANTS = (Variant("fp32", False), Variant("fp32", True), Variant("bf16", False), Variant("bf16", True))


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--planner", default="nnsslPlannerResEncXS", help="plans the network (default: %(default)s)")
    result.add_argument("--trainer", default="MAETrainer", help="the method (default: %(default)s)")
    result.add_argument("--edge", type=int, default=64, help="patch edge (default: 64)")
    result.add_argument("--batch_size", type=int, default=2, help="crops of a step (default: 2)")
    result.add_argument("--device", default="cpu", help="where the step runs (default: cpu)")
    result.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    result.add_argument("--num_workers", type=int, default=0, help="processes that read crops (default: 0, this one)")
    result.add_argument("--compile", action="store_true", help="also time torch.compile, which first takes minutes")
    result.add_argument("--repeats", type=int, default=5, help="steps of each, of which the median counts (default: 5)")
    result.add_argument("--json", type=Path, help="also write the figures to this file")
    return result


def plan_network(planner: str, edge: int, batch_size: int) -> Configuration:
    """A configuration of one channel and isotropic voxels with the network of a preset."""
    preset, patch = PLANNERS.get(planner)(PlanningOptions()), (edge,) * 3
    configuration = {
        "data_identifier": "bench",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **resampling_keys(kept=True),
        "architecture": preset.architecture(preset.topology((1.0, 1.0, 1.0), patch)),
    }
    plan = {
        "dataset_name": "Dataset001_Bench",
        "plans_name": "bench",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"3d_fullres": configuration},
    }
    return Plan(plan).configuration("3d_fullres")


def write_volumes(folder: Path, edge: int) -> Store:
    """A store of z-scored volumes of smooth tissue with noise, half as large again as the patch along each axis."""
    from scipy.ndimage import gaussian_filter

    entries, shape = {}, (round(1.5 * edge),) * 3
    for number in range(NUM_VOLUMES):
        rng = np.random.default_rng(number)
        tissue = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 3)
        image = tissue / tissue.std() + 0.1 * rng.standard_normal(shape, dtype=np.float32)
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
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

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
        """The step that has ended; what was counted as nothing else is the way back."""
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
        self.clock = Clock(device)
        self.task.views = self.clock.timed("views", self.task.views)
        self.module = self.clock.timed("forward", self.module)

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


def measure(arguments: argparse.Namespace, folder: Path) -> dict[Variant, dict[str, float]]:
    """The median seconds of each part of each variant's step, after one that is not counted."""
    device, plan = torch.device(arguments.device), plan_network(arguments.planner, arguments.edge, arguments.batch_size)
    trainer = TRAINERS.get(arguments.trainer).configured([], plan.backbone)
    store = write_volumes(folder, arguments.edge)
    compiled = [Variant("bf16", True, compiled=True)] if arguments.compile else []
    steppers = {variant: TimedStepper(variant, trainer, plan, device) for variant in (*VARIANTS, *compiled)}
    steps: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in steppers}
    loader = PatchLoader(
        store, list(store.entries), plan.patch_size, plan.batch_size, seed=0, num_workers=arguments.num_workers
    )
    with loader:
        batches = loader.batches(0, (arguments.repeats + 1) * len(steppers))
        for step in range(arguments.repeats + 1):
            for variant, stepper in steppers.items():
                steps[variant].append(stepper.timed_step(batches, step))
    return {
        variant: {part: statistics.median(step[part] for step in taken[1:]) for part in PARTS}
        for variant, taken in steps.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    plain = sum(figures[VARIANTS[0]].values())
    print(f"{arguments.trainer}, {arguments.planner}, {arguments.edge}³, batch {arguments.batch_size}")
    print(f"{'':<29}{'step s':>8}{'ratio':>7}" + "".join(f"{part:>11}" for part in PARTS))
    for variant, parts in figures.items():
        total = sum(parts.values())
        shares = "".join(f"{seconds / total:>11.1%}" for seconds in parts.values())
        print(f"{variant.name:<29}{total:>8.3f}{plain / total:>6.1f}x{shares}", flush=True)
    if arguments.json:
        rows = [{**asdict(variant), "seconds": parts} for variant, parts in figures.items()]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
