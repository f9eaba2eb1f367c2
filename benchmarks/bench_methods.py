"""What a training step of each method costs, in steps of masked autoencoding on the same network and crops.

Plans a residual U-Net and a Primus of the smallest preset's size on one patch, and takes every method's whole step
(views, forward, backward, optimiser) on random crops, one method after the other in turn, so that other work on the
machine meets all of them alike. On a CPU the seconds are CPU seconds of one thread; on a GPU those of the clock. What
reading crops takes is left out. With --json the figures go to a file; from the one below `make docs` takes them:

    python benchmarks/bench_methods.py --json docs/methods/cost.json --edge 32
    python benchmarks/bench_methods.py --json docs/methods/cost.json --trainers SparkTrainer   # the others' stay
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from common import describe_machine, make_parser, make_plan, medians, seconds

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.engine.optim import build_optimizer, parameter_groups
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer
from nnssl_ext.loading.batch import Batch
from nnssl_ext.planners.architecture import Topology, resenc_architecture
from nnssl_ext.planners.plan import Plan
from nnssl_ext.planners.primus import PRIMUS_SIZES, primus_architecture
from nnssl_ext.reports.methods import REFERENCE

NUM_CASES = 100
STAGES = 4


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument("--trainers", nargs="+", help="methods to measure, beside the reference (default: all)")
    result.add_argument("--edge", type=int, default=32, help="patch edge, a multiple of 8 (default: %(default)s)")
    result.add_argument("--batch_size", type=int, default=2, help="samples a step (default: %(default)s)")
    result.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return result


def make_architecture(kind: str, patch: tuple[int, int, int]) -> dict[str, Any]:
    """nnU-Net's block for a network of the XS presets' size."""
    if kind == "vit":
        return primus_architecture(PRIMUS_SIZES["XS"], patch, (8, 8, 8))
    topology = Topology(
        patch_size=patch,
        strides=((1,) * 3, *((2,) * 3,) * (STAGES - 1)),
        kernel_sizes=((3,) * 3,) * STAGES,
        divisor=(8,) * 3,
    )
    return resenc_architecture(topology, base_features=8, max_features=320, blocks=(1, 2, 2, 2))


def make_batch(task: PretextTask, device: str) -> Batch:
    """Random crops as many and as large as the task asks for."""
    configuration = task.configuration
    rows = configuration.batch_size * task.needs.images
    size = [round(edge * task.parent_scale) for edge in configuration.patch_size]
    values = torch.randn(rows, configuration.num_input_channels, *size, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        data=values,
        valid=torch.ones(rows, 1, *size, dtype=torch.bool),
        cases=tuple(f"case{row}" for row in range(rows)),
        samples=tuple(range(rows)),
        lower=torch.zeros(rows, 3, dtype=torch.int64),
        spacing=torch.ones(rows, 3),
        foreground=(1.0,) * rows,
    )
    return batch.to(device)


class Run:
    """One method's task and optimiser, and the seconds of its steps."""

    def __init__(self, trainer: PretrainTrainer, plan: Plan, device: str) -> None:
        torch.manual_seed(0)
        self.task = trainer.build_task(plan.configuration("3d_fullres"), NUM_CASES).to(device).train()
        groups = parameter_groups(self.task.named_parameters(), trainer.optim, self.task.lr_scale)
        self.optimizer = build_optimizer(groups, trainer.optim)
        self.batch = make_batch(self.task, device)
        self.number = 0

    def step(self) -> None:
        """One training step."""
        random = SampleRandom(seed=0, step=self.number, samples=self.batch.samples)
        with torch.no_grad():
            views = self.task.views(self.batch, random, train=True)
        self.optimizer.zero_grad()
        self.task(views).loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.task.after_step(self.number, 1000)
        self.number += 1


def measure(kind: str, names: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Seconds a step of each method that runs on that kind of backbone."""
    runs = {}
    for name in names:
        cls = TRAINERS.get(name)
        if kind in cls.task.info.encoders:
            patch, channels = (args.edge,) * 3, cls.task.info.needs.channels
            plan = make_plan(patch, args.batch_size, make_architecture(kind, patch), channels)
            runs[name] = Run(cls.configured([], kind), plan, args.device)
    steps = [partial(seconds, run.step, args.device) for run in runs.values()]
    return dict(zip(runs, medians(steps, args.repeats), strict=True))


def main() -> None:
    """Measures, prints a table and writes the figures."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    describe_machine()
    names = args.trainers or TRAINERS.names()
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    steps = read_json(args.json)["steps"] if args.trainers and args.json and args.json.is_file() else {}
    for kind in ("cnn", "vit"):
        taken = measure(kind, names, args)
        for name, value in taken.items():
            steps.setdefault(kind, {})[name] = round(value / taken[REFERENCE], 2)
            print(f"{kind}  {name:24} {value:7.3f} s  {steps[kind][name]:5.2f}x")
        steps[kind] = dict(sorted(steps[kind].items()))
    unit = "CPU seconds of one thread" if args.device == "cpu" else "seconds on a GPU"
    conditions = (
        f"Training steps with default settings on {args.batch_size} samples of {args.edge}³ voxels, networks of the "
        f"XS presets' size, {unit}, without reading crops (`benchmarks/bench_methods.py`). Methods that ask for more "
        "images or channels get them; of methods that add up the gradients of several batches one batch is a step."
    )
    if args.json:
        write_json(args.json, {"conditions": conditions, "steps": steps})


if __name__ == "__main__":
    main()
