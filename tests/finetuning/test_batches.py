import random
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext.finetuning.batches import IndexedBatches, iterate


class Drawing:
    """Draws from all three global generators, as nnU-Net's loader and augmentation do."""

    def generate_train_batch(self) -> dict[str, Any]:
        values = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"data": torch.tensor(values, dtype=torch.float64)}


def draw(indices: list[int], workers: int = 0, key: tuple[int | str, ...] = (1, "train")) -> list[list[float]]:
    return [batch["data"].tolist() for batch in iterate(IndexedBatches(Drawing(), *key), indices, workers, False)]


def test_a_batch_is_a_function_of_its_index() -> None:
    whole = draw([0, 1, 2, 3])
    assert draw([2, 3]) == whole[2:]
    assert len({value for batch in whole for value in batch}) == 12


def test_other_keys_draw_other_batches() -> None:
    assert draw([0], key=(2, "train")) != draw([0])
    assert draw([0], key=(1, "val")) != draw([0])


@pytest.mark.slow
def test_workers_give_the_same_batches() -> None:
    assert draw([4, 5, 6], workers=2) == draw([4, 5, 6])
