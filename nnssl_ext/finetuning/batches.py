"""Training batches that are a function of their index: nnU-Net's loader and augmentation, seeded before each one.

nnU-Net draws crops and augmentation from three global generators and lets its workers race. Here batch `i` of a run is
the same whichever worker makes it and whether or not the run was interrupted before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nnssl_ext.core.random import Key, seed_of

_NUMPY_SEEDS = 2**32


def seed_everything(*key: Key) -> None:
    """Seeds Python's, numpy's and torch's global generators from one key."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    torch.manual_seed(seed)


class IndexedBatches(Dataset[dict[str, Any]]):
    """nnU-Net's data loader as a map from batch index to batch.

    Args:
        loader: An `nnUNetDataLoader`; what it draws comes from the global generators.
        key: What the batches depend on besides their index: seed, fold, purpose, rank.
    """

    def __init__(self, loader: Any, *key: Key) -> None:
        self.loader = loader
        self.key = key

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed_everything(*self.key, int(index))
        return self.loader.generate_train_batch()


class _Indices(Sampler[int]):
    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def iterate(batches: IndexedBatches, indices: Iterable[int], num_workers: int, pin_memory: bool) -> Iterator[Any]:
    """Iterates over batches in the order of `indices`.

    Args:
        batches: The batches.
        indices: Batch indices; may be endless.
        num_workers: Spawned worker processes, or 0 to make the batches in this process.
        pin_memory: Whether to hand out pinned tensors, for a CUDA device.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_Indices(indices),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if num_workers else None,
    )
    return iter(loader)
