"""What views cost: this project's batched ones against batchgeneratorsv2's transforms, sample by sample, on one thread.

`spatial` and `intensity` are drawn with the probabilities of nnU-Net's training; the changes of intensity follow, each
applied to every sample. Both make what they change of data that stays as it is. `--device cuda` times ours on a GPU,
where training runs them; batchgeneratorsv2 stays on the CPU, as in nnU-Net. On a CPU the times are CPU times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.spatial import SpatialConfig, spatial_view

BATCH_SIZE = 2
BLOCK_SIZE = 16
MASK_RATIO = 0.75
CHANGES = ("noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma")
"""Of intensity, in the order in which both apply them."""


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--edges", type=int, nargs="+", default=[64, 96, 160], help="patch edges (default: 64 96 160)")
    result.add_argument("--device", default="cpu", help="where ours run (default: cpu)")
    result.add_argument("--num_batches", type=int, default=12, help="batches of one run of what is drawn (default: 12)")
    result.add_argument("--num_always", type=int, default=3, help="batches of one run of a change (default: 3)")
    result.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts (default: 3)")
    result.add_argument("--json", type=Path, help="also write the figures to this file")
    return result


def our_views(edge: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One batch of each view, with a new random key at every call."""
    shape = (edge, edge, edge)
    data = torch.randn(BATCH_SIZE, 1, *shape, device=device)
    valid = torch.ones(BATCH_SIZE, 1, *shape, dtype=torch.bool, device=device)
    spacing = torch.ones(BATCH_SIZE, 3, device=device)
    steps = count()

    def random() -> SampleRandom:
        return SampleRandom(0, next(steps), tuple(range(BATCH_SIZE)))

    def change(name: str) -> Any:
        config = IntensityConfig(**{**dict.fromkeys(CHANGES, 0.0), name: 1.0})
        return intensity_view(data, valid, random(), config)

    return {
        "spatial": lambda: spatial_view(data, valid, spacing, random(), SpatialConfig()),
        "intensity": lambda: intensity_view(data, valid, random(), IntensityConfig()),
        "block mask": lambda: block_mask(random(), shape, BLOCK_SIZE, MASK_RATIO, device=device),
        **{name: partial(change, name) for name in CHANGES},
    }


def their_views(edge: int) -> dict[str, Callable[[], Any]]:
    """The transforms of nnU-Net's default training that do the same, on images alone, one sample after another."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    shape = (edge, edge, edge)
    angle = (-torch.pi / 6, torch.pi / 6)
    composed = nnUNetTrainer.get_training_transforms(shape, angle, None, (0, 1, 2), False).transforms
    kinds = {name: [t for t in composed if _kind(t) == name] for name in ("spatial", "intensity")}
    changes = zip(CHANGES, kinds["intensity"], strict=True)
    kinds |= {name: [_always(random.transform)] for name, random in changes}
    data = torch.randn(BATCH_SIZE, 1, *shape)

    def run(transforms: list[Any]) -> None:
        for image in data.clone():  # they change it in place
            sample = {"image": image}
            for transform in transforms:
                sample = transform(**sample)

    return {name: partial(run, transforms) for name, transforms in kinds.items()}


def _always(transform: Any) -> Any:
    """The same for every channel; nnU-Net leaves half of them out of blur and low resolution."""
    transform = copy(transform)
    transform.p_per_channel = 1.0
    return transform


def _kind(transform: Any) -> str:
    name = type(getattr(transform, "transform", transform)).__name__
    if name in ("SpatialTransform", "MirrorTransform"):
        return "spatial"
    changes = ("Noise", "Blur", "Brightness", "Contrast", "LowResolution", "Gamma")
    return "intensity" if any(change in name for change in changes) else "other"


def milliseconds(view: Callable[[], Any], num_batches: int, repeats: int, device: torch.device) -> float:
    """Milliseconds a sample: the median of several runs after a first call that is not counted."""

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    view()
    times = []
    for _ in range(repeats):
        started = now()
        for _ in range(num_batches):
            view()
        times.append(now() - started)
    return 1000 * statistics.median(times) / num_batches / BATCH_SIZE


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    device, cpu = torch.device(arguments.device), torch.device("cpu")
    figures = []
    print(f"{'patch':>6} {'view':>14} {'bgv2 ms':>9} {'this ms':>9} {'ratio':>7}")
    for edge in arguments.edges:
        theirs = their_views(edge)
        for name, view in our_views(edge, device).items():
            number = arguments.num_always if name in CHANGES else arguments.num_batches
            ours = milliseconds(view, number, arguments.repeats, device)
            other = milliseconds(theirs[name], number, arguments.repeats, cpu) if name in theirs else None
            figures.append({"patch": edge, "view": name, "batchgeneratorsv2_ms": other, "this_ms": ours})
            compared = f"{other:>9.2f} {ours:>9.2f} {other / ours:>6.1f}x" if other else f"{'-':>9} {ours:>9.2f}"
            print(f"{edge:>5}³ {name:>14} {compared}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
