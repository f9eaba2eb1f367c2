"""Reading crops from the store into the memory of one batch: no randomness beyond the position, no augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.core.random import generator
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.buffers import Bytes
from nnssl_ext.loading.sampler import Crop, choose_crop
from nnssl_ext.preprocessing.index import IndexEntry
from nnssl_ext.preprocessing.store import SUFFIX, CorruptCaseError, Store

Voxels = npt.NDArray[np.floating]


@dataclass(frozen=True)
class BatchRequest:
    """Everything that decides a batch, so that any worker makes the same one of it."""

    store: Store
    """Holds the entries of the requested cases only: small enough to be sent to a worker."""
    cases: tuple[str, ...]
    """Case of each crop."""
    samples: tuple[int, ...]
    """Global index of each crop."""
    crop_size: tuple[int, ...]
    """Size of the crops, 2 or 3 entries."""
    min_foreground: float
    """Wanted share of foreground, in [0, 1]."""
    seed: int
    """Seed of the run."""
    images_at_one_place: int = 1
    """Consecutive rows that are co-registered images, cropped where the first of them is."""

    @property
    def box(self) -> tuple[int, int, int]:
        """Size of the crops (z, y, x); in 2D they are one slice thick."""
        z, y, x = (1,) * (3 - len(self.crop_size)) + self.crop_size
        return z, y, x

    @property
    def num_channels(self) -> int:
        """Channels of every case."""
        return self.store.entries[self.cases[0]].shape[0]


@dataclass(frozen=True)
class Placed:
    """What was read into a batch's memory."""

    dtype: str
    """Type of the voxels."""
    crops: tuple[Crop, ...]
    """Where each row was cropped."""


@dataclass(frozen=True)
class Unreadable:
    """A row whose case cannot be read."""

    row: int
    """Of the batch."""
    reason: str
    """Names the file, and says what to do."""


def num_bytes(num_rows: int, num_channels: int, crop_size: tuple[int, ...]) -> int:
    """Memory of a batch: voxels of the largest stored type, and a byte for the validity of each place."""
    return num_rows * prod(crop_size) * (num_channels * np.dtype(np.float32).itemsize + 1)


def read_batch(request: BatchRequest, memory: Bytes) -> Placed | Unreadable:
    """Chooses and reads one crop per row, padded with 0 where it leaves the volume.

    In 2D a crop is a patch of one slice, drawn among those that have foreground enough. A crop inside its volume is
    decoded where it belongs; rows of one case open its file once.

    Args:
        request: What to read.
        memory: Of `num_bytes` bytes; afterwards it holds what `as_batch` takes.
    """
    crops: list[Crop] = []
    opened: dict[str, Any] = {}
    row = 0
    try:
        for row, case in enumerate(request.cases):  # noqa: B007 - told where reading fails
            if case not in opened:
                opened[case] = request.store.open_case(case)
        dtype = np.result_type(*(array.dtype for array in opened.values()))
        data, valid = _layout(request, memory, dtype)
        for row, case in enumerate(request.cases):
            crops.append(_choose(request, row, crops, opened[case]))
            _read_row(request.store, case, opened[case], crops[row].lower, data[row], valid[row, 0])
    except (CorruptCaseError, OSError) as error:
        return Unreadable(row, str(error))
    return Placed(dtype.name, tuple(crops))


def as_batch(request: BatchRequest, placed: Placed, memory: torch.Tensor) -> Batch:
    """The batch that was read into the memory, without a copy."""
    entries, dims = [request.store.entries[case] for case in request.cases], len(request.crop_size)
    data, valid = _layout(request, memory.numpy(), np.dtype(placed.dtype))
    kept = len(entries), request.num_channels
    return Batch(
        data=torch.from_numpy(data).view(*kept, *request.crop_size),
        valid=torch.from_numpy(valid).view(kept[0], 1, *request.crop_size),
        cases=request.cases,
        samples=request.samples,
        lower=torch.tensor([crop.lower[-dims:] for crop in placed.crops], dtype=torch.int64),
        spacing=torch.tensor([entry.spacing[-dims:] for entry in entries], dtype=torch.float32),
        foreground=tuple(crop.foreground for crop in placed.crops),
        origin=tuple(entry.origin[-dims:] for entry in entries),
    )


def _layout(request: BatchRequest, memory: Bytes, dtype: np.dtype[Any]) -> tuple[Voxels, npt.NDArray[np.bool_]]:
    """Voxels (B, C, z, y, x) at the beginning of the memory, and behind them their validity (B, 1, z, y, x)."""
    rows, channels, box = len(request.cases), request.num_channels, request.box
    end = rows * channels * prod(box) * dtype.itemsize
    data = memory[:end].view(dtype).reshape(rows, channels, *box)
    valid = memory[end : end + rows * prod(box)].view(np.bool_).reshape(rows, 1, *box)
    return data, valid


def _choose(request: BatchRequest, row: int, crops: list[Crop], opened: Any) -> Crop:
    entry, first = request.store.entries[request.cases[row]], row - row % request.images_at_one_place
    if row != first:
        return _same_place(crops[first], request.store.entries[request.cases[first]], entry)
    occupancy, cell = request.store.occupancy(entry.case_id, opened)
    rng = generator(request.seed, "crop", request.samples[row])
    return choose_crop(entry.shape[1:], request.box, occupancy, cell, request.min_foreground, rng)


def _same_place(crop: Crop, shown: IndexEntry, entry: IndexEntry) -> Crop:
    """The crop of a co-registered image whose voxels are those of a crop of another, to the nearest voxel."""
    shifts = [(a - b) / edge for a, b, edge in zip(shown.origin, entry.origin, entry.spacing, strict=True)]
    return replace(crop, lower=tuple(low + round(shift) for low, shift in zip(crop.lower, shifts, strict=True)))


def _read_row(
    store: Store, case: str, opened: Any, lower: tuple[int, ...], data: Voxels, valid: npt.NDArray[np.bool_]
) -> None:
    """Reads the part of a crop that lies inside the volume; the rest is padding, and so is what was altered."""
    shape, size = store.entries[case].shape[1:], valid.shape
    start = [max(0, low) for low in lower]
    stop = [min(full, low + edge) for full, low, edge in zip(shape, lower, size, strict=True)]
    inside = tuple(slice(max(a - low, 0), max(b - low, 0)) for a, b, low in zip(start, stop, lower, strict=True))
    target, whole = data[(slice(None), *inside)], valid[inside].size == valid.size
    if not whole:
        data[...] = 0
    if target.size:
        voxels = store.read_crop(case, start, stop, data if whole and data.dtype == opened.dtype else None, opened)
        if not all_finite(voxels):
            raise CorruptCaseError(
                f"{store.folder / (case + SUFFIX)}: holds values that are not finite, so its bytes were altered since "
                "it was written. Delete the file and run nnssl_preprocess again: it writes what is missing."
            )
        if voxels is not data:
            target[...] = voxels
    valid[...] = whole
    valid[inside] = True
    if target.size and store.entries[case].altered_fraction:
        altered = store.altered(case, start, stop, opened)
        valid[inside] = ~altered
        target[:, altered] = 0


def all_finite(voxels: Voxels) -> bool:
    """Whether there is neither NaN nor infinity; the store refuses them, so a file that has some was altered.

    As integers, numbers of one sign have the order of their magnitude, infinity above all of them and NaN above that.
    """
    width = voxels.itemsize
    above, below = np.array([np.inf, -np.inf], voxels.dtype).view(f"u{width}")
    return bool(voxels.view(f"i{width}").max() < above and voxels.view(f"u{width}").max() < below)
