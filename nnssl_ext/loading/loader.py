"""Delivers the crops of any range of training steps: the same ones for any number of workers, and after any restart."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import lt
from types import MappingProxyType

import torch
from typing_extensions import Self

from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.cases import CaseSampler, SamplingWeights
from nnssl_ext.loading.failures import FailedCases
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.loading.patches import BatchRequest, Unreadable, num_bytes
from nnssl_ext.loading.pinning import host_memory
from nnssl_ext.loading.workers import Reader, WorkerPool
from nnssl_ext.preprocessing.store import CorruptCaseError, Store

__all__ = ["Batch", "LoaderStatistics", "PatchLoader"]
logger = logging.getLogger(__name__)
NO_ATTEMPTS: Mapping[int, int] = MappingProxyType({})
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
    num_replaced: int = 0
    """Samples of which a case could not be read, so that they show other cases."""


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
        weights: How often cases are shown; by default all equally often.
        crops_per_case: Consecutive samples that show the same cases, whose files are then opened once where the samples
            share a batch. Batches become less diverse.
        needs: What a sample is made of. Cases that lack partners for it are left out.
        partners: Where the other images of a sample come from; by default `case_ids`, which must be among them.
        name: What the crops are for, in messages.
        failed: Where cases that cannot be read are counted, which may be shared with other loaders.
        device: Where the batches will be copied: memory is page-locked for a GPU.

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
        weights: SamplingWeights = "uniform",
        crops_per_case: int = 1,
        needs: DataNeeds = DataNeeds(),  # noqa: B008 - frozen
        partners: Sequence[str] = (),
        name: str = "training",
        failed: FailedCases | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_sizes(patch_size, min_foreground, rank, world_size)
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("accumulate", accumulate, 1),
            ("parent_scale", parent_scale, 1.0),
            ("crops_per_case", crops_per_case, 1),
        ):
            if not value >= least:
                raise ValueError(f"{argument}={value} must be {least} or more.")
        _check_cases(store, [*case_ids, *partners], needs)
        self.store, self.needs, self.name = store, needs, name
        self._sampler = CaseSampler(store.entries, case_ids, seed, needs, weights, crops_per_case, partners or case_ids)
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
        self.failed = failed or FailedCases(len(case_ids))
        self._statistics = LoaderStatistics()
        channels = store.entries[case_ids[0]].shape[0]
        memory = num_bytes(batch_size * needs.images, channels, self.crop_size)
        host = host_memory(device)
        self._here = Reader(memory, host)
        self._reader = WorkerPool(num_workers, memory, host) if num_workers else self._here

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of the optimiser steps from `start_step` up to, not including, `end_step`.

        A sample with a case that cannot be read shows another of its group instead, the same one for any number of
        workers and after any restart.

        Yields:
            `accumulate` batches a step, in order. Their voxels are in the stored type; see `Batch.to`.

        Raises:
            CorruptCaseError: If more than 1% of the cases cannot be read; the message names them.
            RuntimeError: If a worker died; the message names the files it was reading.
        """
        numbers = range(start_step * self.accumulate, end_step * self.accumulate)
        answers = self._reader.read(self._request(number) for number in numbers)
        for number in numbers:
            started = time.perf_counter()
            answer = next(answers)
            batch = answer if isinstance(answer, Batch) else self._replaced(number, answer)
            self.wait_seconds += time.perf_counter() - started
            self._count(batch)
            yield batch

    def _request(self, number: int, attempts: Mapping[int, int] = NO_ATTEMPTS) -> BatchRequest:
        """What to read for a batch; `attempts` tells for its samples how many choices of cases to pass over."""
        first, images = (number * self.world_size + self.rank) * self.batch_size, self.needs.images
        samples = range(first, first + self.batch_size)
        cases = tuple(case for sample in samples for case in self._sampler.cases(sample, attempts.get(sample, 0)))
        return BatchRequest(
            Store(self.store.folder, {case: self.store.entries[case] for case in cases}),
            cases,
            tuple(range(first * images, (first + self.batch_size) * images)),
            self.crop_size,
            self.min_foreground,
            self.seed,
            images if self.needs.same == "session" else 1,
        )

    def _replaced(self, number: int, answer: Batch | Unreadable) -> Batch:
        """The batch with other cases in place of those that cannot be read, read here: it is rare."""
        attempts: Counter[int] = Counter()
        while isinstance(answer, Unreadable):
            request = self._request(number, attempts)
            case, sample = request.cases[answer.row], request.samples[answer.row] // self.needs.images
            self.failed.add(case, answer.reason)
            attempts[sample] += 1
            try:
                request = self._request(number, attempts)
            except IndexError as error:
                raise CorruptCaseError(f"No case is left to take the place of {case}: {answer.reason}") from error
            (answer,) = self._here.read([request])
        self._statistics = replace(self._statistics, num_replaced=self._statistics.num_replaced + len(attempts))
        return answer

    def statistics(self) -> LoaderStatistics:
        """What the crops delivered so far were like: how often the foreground rule could not be met, and so on."""
        return self._statistics

    def _count(self, batch: Batch) -> None:
        old, crop = self._statistics, (1,) * (3 - len(self.crop_size)) + self.crop_size
        shapes = [self.store.entries[case].shape[1:] for case in batch.cases]
        num_crops = old.num_crops + len(shapes)
        self._statistics = replace(
            old,
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
        """Stops the workers, and unlocks their memory."""
        self._reader.close()
        self._here.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_sizes(patch_size: Sequence[int], min_foreground: float, rank: int, world_size: int) -> None:
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ValueError(f"patch_size={tuple(patch_size)} must have 2 or 3 entries of at least 1 voxel.")
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
