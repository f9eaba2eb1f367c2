"""Reading crops from the store into one batch: no randomness beyond the position, no augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.core.random import generator
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.sampler import Crop, choose_crop
from nnssl_ext.preprocessing.index import IndexEntry
from nnssl_ext.preprocessing.store import SUFFIX, CorruptCaseError, Store


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


def read_crop(
    store: Store, case_id: str, lower: Sequence[int], size: Sequence[int]
) -> tuple[npt.NDArray[np.floating], tuple[slice, ...]] | None:
    """Reads the part of a box that lies inside the volume; None where there is none.

    Args:
        store: Where the case is.
        case_id: The case.
        lower: First voxel (z, y, x) of the box; may lie outside.
        size: Edges (z, y, x) of the box.

    Returns:
        The voxels (C, *inside) in the stored type, and where they belong in an array (C, *size).

    Raises:
        CorruptCaseError: If the file cannot be read; the message names it.
    """
    shape = store.entries[case_id].shape[1:]
    start = [max(0, low) for low in lower]
    stop = [min(full, low + edge) for full, low, edge in zip(shape, lower, size, strict=True)]
    if any(low >= high for low, high in zip(start, stop, strict=True)):
        return None
    voxels = store.read_crop(case_id, start, stop)
    inside = [slice(a - low, b - low) for a, b, low in zip(start, stop, lower, strict=True)]
    return voxels, (slice(None), *inside)


def read_batch(request: BatchRequest) -> Batch:
    """Chooses and reads one crop per sample, padded with 0 where it leaves the volume.

    In 2D a crop is a patch of one slice, drawn among those that have foreground enough.

    Raises:
        CorruptCaseError: If a file cannot be read, or holds values that are not finite; the message names it.
    """
    dims = len(request.crop_size)
    size = (1,) * (3 - dims) + tuple(request.crop_size)
    entries = [request.store.entries[case] for case in request.cases]
    data = torch.zeros(len(entries), entries[0].shape[0], *size)
    valid = torch.zeros(len(entries), 1, *size, dtype=torch.bool)
    crops: list[Crop] = []
    for row, (entry, sample) in enumerate(zip(entries, request.samples, strict=True)):
        first = row - row % request.images_at_one_place
        crop = (
            _choose(request, entry, sample, size) if row == first else _same_place(crops[first], entries[first], entry)
        )
        crops.append(crop)
        if (found := read_crop(request.store, entry.case_id, crop.lower, size)) is not None:
            voxels, inside = found
            data[row][inside] = torch.from_numpy(voxels)
            _check_finite(data[row], request.store, entry.case_id)
            valid[row][inside] = True
    shape = data.shape[:2] + tuple(request.crop_size)
    return Batch(
        data=data.reshape(shape),
        valid=valid.reshape(shape[0], 1, *request.crop_size),
        cases=request.cases,
        samples=request.samples,
        lower=torch.tensor([crop.lower[-dims:] for crop in crops], dtype=torch.int64),
        spacing=torch.tensor([entry.spacing[-dims:] for entry in entries], dtype=torch.float32),
        foreground=tuple(crop.foreground for crop in crops),
    )


def _choose(request: BatchRequest, entry: IndexEntry, sample: int, size: tuple[int, ...]) -> Crop:
    occupancy, cell = request.store.occupancy(entry.case_id)
    rng = generator(request.seed, "crop", sample)
    return choose_crop(entry.shape[1:], size, occupancy, cell, request.min_foreground, rng)


def _same_place(crop: Crop, shown: IndexEntry, entry: IndexEntry) -> Crop:
    """The crop of a co-registered image whose voxels are those of a crop of another, to the nearest voxel."""
    shifts = [(a - b) / edge for a, b, edge in zip(shown.origin, entry.origin, entry.spacing, strict=True)]
    return replace(crop, lower=tuple(low + round(shift) for low, shift in zip(crop.lower, shifts, strict=True)))


def _check_finite(data: torch.Tensor, store: Store, case_id: str) -> None:
    """The store refuses values that are not finite, so where there are some the file has changed since."""
    if not data.sum().isfinite() and not data.isfinite().all():  # the sum alone is a fast pass and mostly enough
        raise CorruptCaseError(
            f"{store.folder / (case_id + SUFFIX)}: holds values that are not finite, so its bytes were altered since "
            "it was written. Delete the file and run nnssl_preprocess again: it writes what is missing."
        )
