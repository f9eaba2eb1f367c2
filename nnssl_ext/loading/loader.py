"""Delivers the crops of any range of training steps: the same ones for any number of workers, and after any restart."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import lt

from typing_extensions import Self

from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.cases import CaseSampler
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.loading.patches import BatchRequest, read_batch
from nnssl_ext.loading.workers import WorkerPool
from nnssl_ext.preprocessing.store import Store

__all__ = ["Batch", "LoaderStatistics", "PatchLoader"]
logger = logging.getLogger(__name__)
_LACKING = {
    None: "there are too few others",
    "modality": "their dataset has too few others of their modality",
    "session": "they have too few co-registered images of their session",
}


@dataclass(frozen=True)
class LoaderStatistics:
    """What the crops delivered so far were like."""

    num_crops: int = 0
    """Crops delivered."""
    num_degraded: int = 0
    """Crops with less foreground than asked for, because their case has no better place."""
    num_padded: int = 0
    """Crops that leave their volume, because it is smaller than the crop."""
    mean_foreground: float = 0.0
    """Mean share of foreground, in [0, 1]."""


class PatchLoader:
    """Reads random crops of a store's cases.

    A crop is a function of the seed and its global index alone. Indices count through all ranks and accumulated batches
    of a step, so two ranks together see what one rank with twice the batch size sees. Use it as a context manager, or
    `close` it, to stop the workers.

    Args:
        store: Preprocessed cases.
        case_ids: The cases to draw from; each is shown once before any is shown twice.
        patch_size: Voxels per axis, 3 entries or 2 (then a crop is a patch of a random slice).
        batch_size: Samples of one batch on this rank; each has as many crops as the needs say.
        seed: Decides every crop.
        num_workers: Processes that read ahead; 0 reads when asked, in this process.
        min_foreground: Wanted share of foreground in a crop, in [0, 1].
        rank: This process among `world_size`.
        world_size: Number of training processes.
        accumulate: Batches of one step.
        parent_scale: Edge of the crops as a multiple of the patch, 1 or more: room for views to be cut from.
        needs: What a sample is made of. Cases that lack partners for it are left out.
        partners: Where the other images of a sample come from; by default `case_ids`, which must be among them.
        name: What the crops are for, in messages.

    Raises:
        ValueError: If an argument is out of range, a case is not in the store, cases differ in their channels, or the
            cases cannot give what is needed.
    """

    def __init__(
        self,
        store: Store,
        case_ids: Sequence[str],
        patch_size: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        num_workers: int = 0,
        min_foreground: float = 0.5,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        parent_scale: float = 1.0,
        needs: DataNeeds = DataNeeds(),  # noqa: B008 - frozen
        partners: Sequence[str] = (),
        name: str = "training",
    ) -> None:
        _check_numbers(patch_size, batch_size, num_workers, min_foreground, rank, world_size, accumulate, parent_scale)
        _check_cases(store, [*case_ids, *partners], needs)
        self.store, self.needs, self.name = store, needs, name
        self._sampler = CaseSampler(store.entries, case_ids, seed, needs, partners=partners or case_ids)
        self.case_ids = self._sampler.case_ids
        if len(self.case_ids) < len(case_ids):
            left_out = len(case_ids) - len(self.case_ids)
            logger.warning(
                "%d of %d cases are left out of %s: %s.", left_out, len(case_ids), name, _LACKING[needs.same]
            )
        self.crop_size = tuple(math.ceil(edge * parent_scale) for edge in patch_size)
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.seed, self.min_foreground = seed, min_foreground
        self.wait_seconds = 0.0
        """Time that the caller has waited for batches so far."""
        self._statistics = LoaderStatistics()
        self._pool = WorkerPool(num_workers) if num_workers else None

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of the optimiser steps from `start_step` up to, not including, `end_step`.

        Yields:
            `accumulate` batches a step, in order.

        Raises:
            ValueError: If a file cannot be read; the message names it.
            RuntimeError: If a worker died; the message names the files it was reading.
        """
        numbers = range(start_step * self.accumulate, end_step * self.accumulate)
        requests = (self._request(number) for number in numbers)
        batches = self._pool.read(requests) if self._pool else map(read_batch, requests)
        for _ in numbers:
            started = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - started
            self._count(batch)
            yield batch

    def _request(self, number: int) -> BatchRequest:
        first, images = (number * self.world_size + self.rank) * self.batch_size, self.needs.images
        samples = range(first, first + self.batch_size)
        cases = tuple(case for sample in samples for case in self._sampler.cases(sample))
        return BatchRequest(
            Store(self.store.folder, {case: self.store.entries[case] for case in cases}),
            cases,
            tuple(range(first * images, (first + self.batch_size) * images)),
            self.crop_size,
            self.min_foreground,
            self.seed,
            images if self.needs.same == "session" else 1,
        )

    def statistics(self) -> LoaderStatistics:
        """What the crops delivered so far were like: how often the foreground rule could not be met, and so on."""
        return self._statistics

    def _count(self, batch: Batch) -> None:
        old, crop = self._statistics, (1,) * (3 - len(self.crop_size)) + self.crop_size
        shapes = [self.store.entries[case].shape[1:] for case in batch.cases]
        num_crops = old.num_crops + len(shapes)
        self._statistics = LoaderStatistics(
            num_crops=num_crops,
            num_degraded=old.num_degraded + sum(share < self.min_foreground for share in batch.foreground),
            num_padded=old.num_padded + sum(any(map(lt, shape, crop)) for shape in shapes),
            mean_foreground=(old.mean_foreground * old.num_crops + sum(batch.foreground)) / num_crops,
        )
        one_round = len(self.case_ids) * self.needs.images / self.world_size
        if old.num_crops < one_round <= num_crops:
            self._log_first_round()

    def _log_first_round(self) -> None:
        crops = self._statistics
        for count, what in (
            (crops.num_degraded, f"have less than {self.min_foreground:.0%} foreground, as their cases offer no more"),
            (crops.num_padded, f"are padded, as their cases are smaller than {self.crop_size}"),
        ):
            if count:
                logger.info("In the first round of %s %d of %d crops %s.", self.name, count, crops.num_crops, what)

    def close(self) -> None:
        """Stops the workers."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_numbers(
    patch_size: Sequence[int],
    batch_size: int,
    num_workers: int,
    min_foreground: float,
    rank: int,
    world_size: int,
    accumulate: int,
    parent_scale: float,
) -> None:
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ValueError(f"patch_size={tuple(patch_size)} must have 2 or 3 entries of at least 1 voxel.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("accumulate", accumulate, 1),
        ("parent_scale", parent_scale, 1.0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
    if not 0 <= min_foreground <= 1:
        raise ValueError(f"min_foreground={min_foreground} must lie in [0, 1].")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in [0, world_size={world_size}).")


def _check_cases(store: Store, case_ids: Sequence[str], needs: DataNeeds) -> None:
    if not case_ids:
        raise ValueError(f"no cases to load from {store.folder}: give at least one case id.")
    missing = [case for case in case_ids if case not in store.entries]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(case_ids)} cases are not in {store.folder}, {missing[0]!r} for one. "
            "Run nnssl_preprocess for this configuration."
        )
    channels = {store.entries[case].shape[0] for case in case_ids}
    if len(channels) > 1:
        raise ValueError(f"cases of {store.folder} differ in their number of channels: {sorted(channels)}.")
    if max(channels) < needs.channels:
        raise ValueError(
            f"This method needs cases with {needs.channels} or more channels, and those of {store.folder} have "
            f"{max(channels)}. Use a dataset whose dataset.json names as many in channel_names, or another method: "
            "nnssl_train --list"
        )
