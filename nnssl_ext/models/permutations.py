"""Permutations that differ from one another in as many places as can be, for jigsaws (arXiv:1603.09246)."""

from __future__ import annotations

from math import factorial

import numpy as np
import torch

from nnssl_ext.core.random import generator

NUM_CANDIDATES = 20_000


def distant_permutations(num_items: int, number: int, num_candidates: int = NUM_CANDIDATES) -> torch.Tensor:
    """Chooses permutations one after the other, each as far from all before it as a random candidate can be.

    Far is in places that differ (Hamming). Of 100 permutations of 27 items the nearest two differ in 24 places or more,
    where random ones differ in 21.

    Args:
        num_items: That are permuted, 2 or more.
        number: Permutations, 2 or more.
        num_candidates: Random permutations to choose from.

    Returns:
        (number, num_items), int64, no two alike; the same every time.

    Raises:
        ValueError: If there are not so many, or fewer than 2 are asked for.
    """
    if not 2 <= number <= min(factorial(num_items), num_candidates):
        raise ValueError(
            f"permutations={number} must lie in [2, {min(factorial(num_items), num_candidates)}]: of {num_items} cells."
        )
    ordered = np.tile(np.arange(num_items, dtype=np.uint8), (num_candidates, 1))
    candidates = generator("permutations", num_items).permuted(ordered, axis=1)
    chosen = [0]
    nearest = np.full(num_candidates, num_items + 1)
    while len(chosen) < number:
        nearest = np.minimum(nearest, (candidates != candidates[chosen[-1]]).sum(1))
        chosen.append(int(nearest.argmax()))
    if not nearest[chosen[-1]]:
        raise ValueError(f"permutations={number}: not so many different ones were found of {num_items} cells.")
    return torch.from_numpy(candidates[chosen].astype(np.int64))
