"""How to write a preprocessed volume: size, time to write and to read crops for codecs, filters and block shapes.

Makes an MR-like volume (or takes `--image FILE`), stores it as float16 in each way, and reads crops at random places,
opening the file each time as a loader does, with one thread. Crops of a setting are the same for all. The starred
setting is the one in use. The second table says how many voxels are decoded for each one that is used.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from common import Table, describe_machine, finish, made_volume, make_parser, medians, seconds

from nnssl_ext.preprocessing.layout import BLOCK_VOXELS, CHUNK_BLOCKS, block_shape
from nnssl_ext.preprocessing.store import COMPRESSION

CODECS = {
    "zstd": blosc2.Codec.ZSTD,
    "lz4": blosc2.Codec.LZ4,
    "lz4hc": blosc2.Codec.LZ4HC,
    "blosclz": blosc2.Codec.BLOSCLZ,
}
FILTERS = {
    "none": [blosc2.Filter.NOFILTER],
    "shuffle": [blosc2.Filter.SHUFFLE],
    "bits": [blosc2.Filter.BITSHUFFLE],
    "delta": [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA],
}


@dataclass(frozen=True)
class Setting:
    """One way to store a volume."""

    codec: str
    level: int
    filters: str
    block: int


BLOCK_EDGE = round(BLOCK_VOXELS ** (1 / 3))
IN_USE = Setting(COMPRESSION["codec"].name.lower(), COMPRESSION["clevel"], "shuffle", BLOCK_EDGE)
SETTINGS = (
    IN_USE,
    *(replace(IN_USE, block=edge) for edge in (16, 24, 48, 64, 96)),
    *(replace(IN_USE, filters=filters) for filters in ("none", "bits", "delta")),
    *(replace(IN_USE, level=level) for level in (3, 5)),
    *(replace(IN_USE, codec=codec) for codec in ("zstd", "lz4", "blosclz")),
    *(replace(IN_USE, codec="zstd", level=level) for level in (3, 5)),
)


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = make_parser(__doc__)
    result.add_argument("--image", type=Path, help="measure on this image instead of a made one")
    result.add_argument("--edge", type=int, default=200, help="edge of the made volume in voxels (default: 200)")
    result.add_argument("--crops", type=int, nargs="+", default=[64, 160], help="crop edges (default: 64 160)")
    result.add_argument("--num_crops", type=int, default=12, help="crops per edge and run (default: 12)")
    return result


def stored_volume(edge: int) -> np.ndarray:
    """A z-scored float16 volume (Z, Y, X): smooth tissue with noise in an ellipsoid."""
    image, inside = made_volume(np.random.default_rng(0), (edge, round(1.1 * edge), round(0.95 * edge)), noise=0.12)
    return np.where(inside, 2 + image, -1).astype(np.float16)


def read_volume(path: Path) -> np.ndarray:
    """The first channel of an image, z-scored, as float16 (Z, Y, X)."""
    from nnssl_ext.imageio import read_image

    image = read_image([path])[0][0]
    return ((image - image.mean()) / image.std()).astype(np.float16)


def blocks_of(shape: Sequence[int], edge: int) -> tuple[int, ...]:
    """Cubic blocks; those in use where the edge is theirs."""
    if edge == IN_USE.block:
        return block_shape(shape)
    return tuple(min(edge, size) for size in shape)


def write(volume: np.ndarray, setting: Setting, path: Path) -> None:
    """Encodes a volume and writes it to a file."""
    block = blocks_of(volume.shape, setting.block)
    chunk = tuple(min(CHUNK_BLOCKS * edge, size) for edge, size in zip(block, volume.shape, strict=True))
    way = {"codec": CODECS[setting.codec], "clevel": setting.level, "filters": FILTERS[setting.filters], "nthreads": 1}
    path.write_bytes(blosc2.asarray(volume, chunks=chunk, blocks=block, cparams=way).to_cframe())


def read(path: Path, boxes: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Opens a file and decodes a box from it, once for each box."""
    for lower, upper in boxes:
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        array.get_slice_numpy(np.empty(upper - lower, dtype=array.dtype), (lower.tolist(), upper.tolist()))


def random_boxes(shape: Sequence[int], edge: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes at uniformly random places within a volume."""
    rng = np.random.default_rng(edge)
    size = np.minimum(edge, shape)
    lowers = rng.integers(0, np.array(shape) - size + 1, (number, len(shape)))
    return [(lower, lower + size) for lower in lowers]


def amplification(shape: Sequence[int], block: Sequence[int], edge: int, number: int = 10_000) -> float:
    """Voxels in the blocks that a crop touches over voxels of the crop, averaged over random crops."""
    ratios = []
    for lower, upper in random_boxes(shape, edge, number):
        first, last = lower // block * block, np.minimum(-(-upper // block) * block, shape)
        ratios.append(np.prod(last - first) / np.prod(upper - lower))
    return float(np.mean(ratios))


def measure(volume: np.ndarray, setting: Setting, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Megabytes, milliseconds to write the volume, and milliseconds to read a crop by its edge."""
    path = folder / "case.b2nd"
    works = [partial(write, volume, setting, path)]
    works += [partial(read, path, random_boxes(volume.shape, edge, arguments.num_crops)) for edge in arguments.crops]
    written, *read_all = medians([partial(seconds, work) for work in works], arguments.repeats)
    crops = {edge: 1e3 * all_ / arguments.num_crops for edge, all_ in zip(arguments.crops, read_all, strict=True)}
    return asdict(setting) | {"megabytes": path.stat().st_size / 1e6, "write_ms": written * 1e3, "crop_ms": crops}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints its tables."""
    arguments = parser().parse_args(argv)
    blosc2.set_nthreads(1)
    machine = describe_machine()
    volume = read_volume(arguments.image) if arguments.image else stored_volume(arguments.edge)
    print(f"volume {' x '.join(map(str, volume.shape))}, {volume.nbytes / 1e6:.1f} MB as float16")
    columns = {"codec": ">8", "level": ">5", "filter": ">8", "block": ">5", "MB": ">7.2f", "write ms": ">9.1f"}
    table = Table({**columns, **{f"{edge}³ ms": ">8.2f" for edge in arguments.crops}, "": "<1"})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            row = measure(volume, setting, arguments, Path(folder))
            rows.append(row)
            figures = (*asdict(setting).values(), row["megabytes"], row["write_ms"], *row["crop_ms"].values())
            table.row(*figures, "*" if setting == IN_USE else "")
    table = Table({"block": ">8", **{f"{edge}³ x": ">8.2f" for edge in arguments.crops}})
    decoded = {}
    for edge in sorted({setting.block for setting in SETTINGS}):
        block = blocks_of(volume.shape, edge)
        decoded[edge] = {crop: amplification(volume.shape, block, crop) for crop in arguments.crops}
        table.row(edge, *decoded[edge].values())
    finish(arguments, machine, {"shape": volume.shape, "settings": rows, "voxels_decoded_per_voxel": decoded})


if __name__ == "__main__":
    main()
