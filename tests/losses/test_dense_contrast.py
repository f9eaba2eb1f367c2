"""Dense contrast against a loop over places."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl_ext.losses.dense_contrast import dense_contrast


def test_equals_a_loop_over_places_in_both_directions():
    """Place 3 of the first sample does not count, and two places are near. The third sample has none.

    Catches near places and absent ones among the negatives, one direction alone, and samples that weigh by their
    places.
    """
    first, second = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    second = first + 0.5 * second
    near = torch.zeros(3, 5, 5, dtype=torch.bool)
    near[:, range(5), range(5)] = True
    near[0, 0, 1] = near[0, 1, 0] = True
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[0, 3], counted[1, 2:], counted[2] = False, False, False
    found: dict[str, list[float]] = {"loss": [], "contrast_chance": [], "accuracy": [], "accuracy_chance": []}
    for row in range(2):
        values: dict[str, list[float]] = {name: [] for name in found}
        for queries, keys in ((first[row], second[row]), (second[row], first[row])):
            for i in range(5):
                if not counted[row, i]:
                    continue
                others = [j for j in range(5) if j != i and counted[row, j] and not near[row, i, j]]
                cosines = functional.cosine_similarity(queries[i][None], keys[[i, *others]])
                logits = cosines / 0.2
                values["loss"].append(float(logits.logsumexp(0) - logits[0]))
                values["contrast_chance"].append(math.log(len(logits)))
                values["accuracy"].append(float(logits.argmax() == 0))
                values["accuracy_chance"].append(1 / len(logits))
        for name, each in values.items():
            found[name].append(sum(each) / len(each))
    loss, metrics = dense_contrast(first, second, near, counted, 0.2)
    assert loss.item() == pytest.approx(sum(found.pop("loss")) / 2, rel=1e-5)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {name: sum(each) / 2 for name, each in found.items()}, rel=1e-5
    )


def test_without_places_everything_is_zero():
    rows, near = torch.randn(2, 3, 4), torch.zeros(2, 3, 3, dtype=torch.bool)
    loss, metrics = dense_contrast(rows, rows, near, torch.zeros(2, 3, dtype=torch.bool), 0.2)
    assert [loss.item(), *(value.item() for value in metrics.values())] == [0, 0, 0, 0]
