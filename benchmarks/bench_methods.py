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
from common import IDLE_SHARE, Figures, describe_machine, make_parser, make_plan, medians, seconds
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.engine.optim import build_optimizer, parameter_groups
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.planners.architecture import Topology, resenc_architecture
from nnssl_ext.planners.plan import Plan
from nnssl_ext.planners.primus import PRIMUS_SIZES, primus_architecture
from nnssl_ext.reports.methods import REFERENCE

NUM_CASES = 100
STAGES = 4


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__, repeats=9)  # with 3, steps of some transformers came out twice as long now and then
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
    """One method's task and optimiser, and the seconds and bytes of its steps."""

    def __init__(self, trainer: PretrainTrainer, plan: Plan, device: str) -> None:
        torch.manual_seed(0)
        self.task = trainer.build_task(plan.configuration("3d_fullres"), NUM_CASES).to(device).train()
        groups = parameter_groups(self.task.named_parameters(), trainer.optim, self.task.lr_scale)
        self.optimizer = build_optimizer(groups, trainer.optim)
        self.batch = make_batch(self.task, device)
        self.number = 0

    @torch.no_grad()
    def views(self) -> Views:
        """What the next step sees."""
        random = SampleRandom(seed=0, step=self.number, samples=self.batch.samples)
        return self.task.views(self.batch, random, train=True)

    def step(self) -> None:
        """One training step."""
        views = self.views()
        self.optimizer.zero_grad()
        self.task(views).loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.task.after_step(self.number, 1000)
        self.number += 1

    def memory(self) -> int:
        """Bytes of a step, once there was one before.

        On a GPU its peak; on a CPU what it keeps for its backward pass, its views, weights, gradients and the
        optimiser's state, without what lives for a moment.
        """
        if self.batch.data.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before + self._at_rest()
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        views = self.views()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.task(views).loss
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.task.parameters(), *self.task.buffers())}
        for tensor in views.values():
            note(tensor)
        activations = sum(size for pointer, size in kept.items() if pointer not in own)
        del loss
        return activations + self._at_rest()

    def _at_rest(self) -> int:
        """Bytes of weights, buffers, gradients and the optimiser's state."""
        tensors = [*self.task.parameters(), *self.task.buffers()]
        tensors += [parameter.grad for parameter in self.task.parameters() if parameter.grad is not None]
        tensors += [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return sum(tensor.nbytes for tensor in tensors)


def measure(kind: str, names: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and bytes of a step of each method that runs on that kind of backbone, and the seconds of its views."""
    runs = {}
    for name in names:
        cls = TRAINERS.get(name)
        if kind in cls.task.info.encoders:
            patch, channels = (args.edge,) * 3, cls.task.info.needs.channels
            plan = make_plan(patch, args.batch_size, make_architecture(kind, patch), channels)
            runs[name] = Run(cls.configured([], kind), plan, args.device)
    timed = [partial(seconds, work, args.device) for run in runs.values() for work in (run.step, run.views)]
    taken = medians(timed, args.repeats)
    memory = [run.memory() for run in runs.values()]
    rows = zip(taken[::2], taken[1::2], memory, strict=True)
    return {
        name: dict(zip(("time", "views", "memory"), row, strict=True)) for name, row in zip(runs, rows, strict=True)
    }


def in_reference(row: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
    """Time and memory in those of the reference, and the share of the time that views take."""
    ratios = {name: round(row[name] / reference[name], 2) for name in ("time", "memory")}
    return {**ratios, "views": round(row["views"] / row["time"], 3)}


def main() -> None:
    """Measures, prints a table and writes the figures."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    names = args.trainers or TRAINERS.names()
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    steps = read_json(args.json)["steps"] if args.trainers and args.json and args.json.is_file() else {}
    for kind in ("cnn", "vit"):
        taken = measure(kind, names, args)
        for name, row in taken.items():
            found = steps.setdefault(kind, {})[name] = in_reference(row, taken[REFERENCE])
            print(
                f"{kind}  {name:28} {row['time']:7.3f} s  {found['time']:5.2f}x  {row['memory'] / 2**20:7.1f} MiB  "
                f"{found['memory']:5.2f}x  views {found['views']:4.0%}",
                flush=True,
            )
        steps[kind] = dict(sorted(steps[kind].items()))
    if args.json:
        write_json(args.json, {"conditions": conditions(args, machine), "steps": steps})


def conditions(args: argparse.Namespace, machine: Figures) -> str:
    """How the figures were made, for the page that shows them."""
    unit, memory = "seconds on a GPU", "its peak"
    if args.device == "cpu":
        unit = "CPU seconds of one thread"
        memory = "what a step keeps for its backward pass, with views, weights, gradients and optimiser"
    busy = machine["load"] if machine["busy_cores"] is None else machine["busy_cores"]
    loaded = f" The machine was loaded ({busy:g} cores busy)." if busy > IDLE_SHARE * machine["cores"] else ""
    return (
        f"Training steps with default settings on {args.batch_size} samples of {args.edge}³ voxels, networks of the "
        "XS presets' size, without reading crops (`benchmarks/bench_methods.py`). Time is in "
        f"{unit}, all methods in turn; memory is {memory}; the share of views is that of the step's own time. Methods "
        "that ask for more images or channels get them; of methods that add up the gradients of several batches one "
        f"batch is a step.{loaded}"
    )


if __name__ == "__main__":
    main()
