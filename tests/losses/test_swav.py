"""Swapped prediction: against plain loops, and what tells a useful clustering from a collapsed one."""

import math

import pytest
import torch

from nnssl_ext.losses.swav import assignment_metrics, swapped_prediction

TAU = 0.1


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views of three samples of four tokens and five prototypes; the second sample has three, the third none."""
    draws = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 4, 5, generator=draws) * 2 - 1
    targets = torch.rand(2, 3, 4, 5, generator=draws).softmax(-1)
    counted = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    return scores, targets, counted


def test_it_is_the_slow_version():
    """Catches views that predict their own assignment, no temperature, a mean over prototypes, and padding that counts.

    Each was planted once: the loss was 1.07, .25, .2 and .98 times what it is.
    """
    scores, targets, counted = example()
    samples = []
    for b in range(2):
        tokens = []
        for p in range(4):
            if not counted[b, p]:
                continue
            for view in range(2):
                exponentials = [math.exp(s / TAU) for s in scores[view, b, p].tolist()]
                shares = [e / sum(exponentials) for e in exponentials]
                other = targets[1 - view, b, p].tolist()
                tokens.append(-sum(q * math.log(share) for q, share in zip(other, shares, strict=True)))
        samples.append(sum(tokens) / len(tokens))
    found = swapped_prediction(scores, targets, counted, TAU)
    assert found.item() == pytest.approx(sum(samples) / 2, rel=1e-5)
    assert swapped_prediction(scores, targets, torch.zeros(3, 4, dtype=torch.bool), TAU) == 0


def test_chance_is_what_clusters_of_these_sizes_give():
    """Perfect prediction of four equal clusters agrees always, chance is 1/4 and ln 4; a collapse is at its chance.

    Catches a metric of agreement by which a collapse looks perfect, and sizes that count padding.
    """
    clusters = torch.eye(5)[torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])].expand(2, -1, -1, -1)
    counted = torch.ones(2, 4, dtype=torch.bool)
    perfect = assignment_metrics(clusters, clusters, counted, TAU)
    assert perfect["agreement"] == 1
    assert perfect["agreement_chance"] == pytest.approx(0.25)
    assert perfect["swap_chance"] == pytest.approx(math.log(4))
    assert perfect["clusters_in_use"] == pytest.approx(4)
    assert perfect["largest_cluster"] == pytest.approx(0.25)
    assert perfect["assignment_entropy"] == 0
    counted[:, 1:] = False
    collapsed = assignment_metrics(clusters, clusters, counted, TAU)
    assert collapsed["agreement"] == collapsed["agreement_chance"] == pytest.approx(1)
    assert collapsed["swap_chance"] == pytest.approx(0)
    assert collapsed["clusters_in_use"] == pytest.approx(1)
    flat = assignment_metrics(clusters, torch.full_like(clusters, 0.2), counted, TAU)
    assert flat["assignment_entropy"] == pytest.approx(1)
