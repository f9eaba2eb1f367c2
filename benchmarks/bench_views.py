"""What views cost: this project's batched ones against batchgeneratorsv2's transforms, sample by sample, on one thread.

`spatial` and `intensity` are drawn with the probabilities of nnU-Net's training; `resampling` rotates and scales every
sample, and the changes of intensity follow, each applied to every sample. Both make what they change of data that stays
as it is. `--device cuda` times ours on a GPU, where training runs them; batchgeneratorsv2 stays on the CPU, as in
nnU-Net. On a CPU the times are CPU times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import count
from typing import Any

import torch
from common import Table, describe_machine, finish, make_parser, medians, seconds

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
    result = make_parser(__doc__)
    result.add_argument("--edges", type=int, nargs="+", default=[64, 96, 160], help="patch edges (default: 64 96 160)")
    result.add_argument("--device", default="cpu", help="where ours run (default: cpu)")
    result.add_argument("--num_batches", type=int, default=12, help="batches of one run of what is drawn (default: 12)")
    result.add_argument("--num_always", type=int, default=3, help="batches of one run of a change (default: 3)")
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

    always = SpatialConfig(rotation=1, scaling=1)
    return {
        "spatial": lambda: spatial_view(data, valid, spacing, random(), SpatialConfig()),
        "resampling": lambda: spatial_view(data, valid, spacing, random(), always),
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
    resampling = copy(kinds["spatial"][0])
    resampling.p_rotation = resampling.p_scaling = 1.0
    kinds["resampling"] = [resampling, *kinds["spatial"][1:]]
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


def milliseconds(view: Callable[[], Any], num_batches: int, device: str) -> float:
    """Milliseconds a sample, over some batches."""
    return 1000 * seconds(lambda: [view() for _ in range(num_batches)], device) / num_batches / BATCH_SIZE


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    machine, figures = describe_machine(), []
    table = Table({"patch": ">6", "view": ">14", "bgv2 ms": ">9.2f", "this ms": ">9.2f", "ratio": ">7.2f"})
    for edge in arguments.edges:
        theirs = their_views(edge)
        for name, view in our_views(edge, torch.device(arguments.device)).items():
            number = arguments.num_always if name in (*CHANGES, "resampling") else arguments.num_batches
            runs = [partial(milliseconds, view, number, arguments.device)]
            if name in theirs:
                runs.append(partial(milliseconds, theirs[name], number, "cpu"))
            ours, *other = medians(runs, arguments.repeats)
            bgv2 = other[0] if other else None
            figures.append({"patch": edge, "view": name, "batchgeneratorsv2_ms": bgv2, "this_ms": ours})
            table.row(f"{edge}³", name, bgv2, ours, bgv2 / ours if bgv2 else None)
    finish(arguments, machine, figures)


if __name__ == "__main__":
    main()
