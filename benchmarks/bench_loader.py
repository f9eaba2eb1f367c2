"""Crops a second of one core: this loader against nnU-Net's, bare and with nnU-Net's default spatial augmentation.

Makes MR-like volumes, writes them in both formats, and reads crops from each in this process with one thread, in turn,
so that what else the machine does meets both alike. Views are the training device's work here, so the bare rate is what
a worker delivers; nnU-Net's workers also augment. Crops count as delivered when they are float32. The last column is
the read amplification: voxels of the blocks that a random crop touches over voxels of the crop.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, describe_machine, finish, made_volume, make_parser, medians, now, random_shape

BATCH_SIZE = 2
Patch = tuple[int, int, int]


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument(
        "--edges", type=int, nargs="+", default=[64, 96, 160, 192], help="patch edges (default: 64 96 160 192)"
    )
    result.add_argument("--num_volumes", type=int, default=4, help="volumes to read from (default: 4)")
    result.add_argument("--edge", type=int, default=200, help="edge of a volume in voxels (default: 200)")
    result.add_argument("--seconds", type=float, default=1.5, help="CPU time of one run (default: 1.5)")
    return result


def volume(seed: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """A z-scored volume (1, Z, Y, X), and where it is not background (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    image, inside = made_volume(rng, random_shape(rng, edge), extent=1.0)
    return np.where(inside, image, np.float32(0))[None], inside


def write_both(folder: Path, num_volumes: int, edge: int, patch: Patch) -> tuple[Any, Any]:
    """The same volumes as this project's store and as nnU-Net's dataset."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    from nnssl_ext.preprocessing.store import Store, write_case

    theirs, entries = folder / "theirs", {}
    theirs.mkdir(parents=True)
    for number in range(num_volumes):
        name = f"case_{number}"
        image, inside = volume(number, edge)
        entries[name] = write_case(folder / "ours", name, image, {}, inside, spacing=(1, 1, 1))
        blocks, chunks = comp_blosc2_params(image.shape, patch, image.itemsize)
        properties = {"class_locations": {1: np.argwhere(inside[None])[:10000]}}
        sizes = {"chunks": chunks, "blocks": blocks, "chunks_seg": chunks, "blocks_seg": blocks}
        labels = inside[None].astype(np.int8)
        nnUNetDatasetBlosc2.save_case(image, labels, properties, str(theirs / name), **sizes)
    return Store(folder / "ours", entries), nnUNetDatasetBlosc2(str(theirs))


def their_batches(dataset: Any, patch: Patch, augmented: bool) -> Callable[[], Any]:
    """One call of nnU-Net's data loader; augmented ones read a larger patch, as its trainer does."""
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = LabelManager({"background": 0, "tissue": 1}, None)
    if not augmented:
        return nnUNetDataLoader(dataset, BATCH_SIZE, patch, patch, labels, 0.33).generate_train_batch
    angle = (-np.pi / 6, np.pi / 6)
    larger = get_patch_size(np.array(patch), angle, angle, angle, (0.85, 1.25))
    transform = SpatialTransform(
        patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=angle,
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
    )
    loader = nnUNetDataLoader(dataset, BATCH_SIZE, larger, patch, labels, 0.33, transforms=transform)
    return loader.generate_train_batch


def our_batches(store: Any, patch: Patch, augmented: bool) -> Callable[[], Any]:
    """One batch of this loader; augmented ones go through the spatial view on the CPU."""
    from nnssl_ext.core.random import SampleRandom
    from nnssl_ext.loading.loader import PatchLoader
    from nnssl_ext.views.spatial import SpatialConfig, spatial_view

    batches = PatchLoader(store, list(store.entries), patch, BATCH_SIZE, seed=0).batches(0, 10**9)
    numbers, config = count(), SpatialConfig()

    def viewed() -> Any:
        batch = next(batches).to("cpu")
        random = SampleRandom(0, next(numbers), batch.samples)
        return spatial_view(batch.data, batch.valid, batch.spacing, random, config)

    return viewed if augmented else lambda: next(batches).to("cpu")


def amplification(store: Any, patch: Patch, num_crops: int = 200) -> float:
    """Voxels of the blocks that random crops touch over voxels that they show."""
    from nnssl_ext.core.random import generator
    from nnssl_ext.loading.sampler import choose_crop
    from nnssl_ext.preprocessing.layout import block_shape

    decoded, used, cases = 0, 0, list(store.entries)
    for number in range(num_crops):
        case = cases[number % len(cases)]
        shape, (grid, cell) = store.entries[case].shape[1:], store.occupancy(case)
        crop = choose_crop(shape, patch, grid, cell, 0.5, generator(0, "amplification", number))
        start = np.maximum(crop.lower, 0)
        stop = np.minimum(np.add(crop.lower, patch), shape)
        block = np.array(block_shape(shape))
        decoded += int(np.prod((-(-stop // block) - start // block) * block))
        used += int(np.prod(stop - start))
    return decoded / used


def rate(batch: Callable[[], Any], least_seconds: float) -> float:
    """Crops a CPU-second, over at least so many seconds."""
    number, started = 0, now("cpu")
    while now("cpu") - started < least_seconds:
        batch()
        number += 1
    return number * BATCH_SIZE / (now("cpu") - started)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    arguments = parser().parse_args(argv)
    import torch

    torch.set_num_threads(1)
    machine, figures = describe_machine(), []
    columns = {"patch": ">6", "views": ">7", "nnU-Net /s": ">11.1f", "this /s": ">9.1f", "ratio": ">6.2f"}
    table = Table({**columns, "decoded/used": ">13.2f"})
    for edge in arguments.edges:
        patch = (edge, edge, edge)
        with tempfile.TemporaryDirectory() as folder:
            store, dataset = write_both(Path(folder), arguments.num_volumes, arguments.edge, patch)
            decoded = amplification(store, patch)
            for augmented in (False, True):
                both = their_batches(dataset, patch, augmented), our_batches(store, patch, augmented)
                runs = [partial(rate, batch, arguments.seconds) for batch in both]
                theirs, ours = medians(runs, arguments.repeats)
                figure = {"patch": edge, "augmented": augmented, "nnunet": theirs, "this": ours}
                figures.append({**figure, "amplification": decoded})
                table.row(f"{edge}³", "spatial" if augmented else "none", theirs, ours, ours / theirs, decoded)
    finish(arguments, machine, figures)


if __name__ == "__main__":
    main()
