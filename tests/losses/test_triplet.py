"""The triplet loss against a loop, what its margin means, and what collapse looks like."""

import pytest
import torch
from torch.nn import functional

from nnssl_ext.losses.triplet import triplet_loss

EVERYONE_ELSE = ~torch.eye(4, dtype=torch.bool)


def example(width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    first, noise = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))
    return first, 3 * (first + noise)


def test_equals_a_loop_over_triplets():
    """Row 3 has no negative; that of row 1 is to be nearer. Catches lengths that count, a negative that is the same
    case, and anchors without one that enter the mean."""
    first, second = example()
    compared = EVERYONE_ELSE.clone()
    compared[0, 2], compared[3] = False, False
    swapped = torch.tensor([False, True, False, False])
    means, hits = [], []
    for i in range(3):
        distance = (functional.normalize(first[i], dim=0) - functional.normalize(second, dim=1)).square().sum(1)
        losses = []
        for j in range(4):
            if compared[i, j]:
                ahead = distance[i] - distance[j]
                losses.append(max(float(-ahead if swapped[i] else ahead) + 0.5, 0))
                hits.append(float(ahead < 0))
        means.append(sum(losses) / len(losses))
    loss, accuracy = triplet_loss(first, second, compared, 0.5, swapped)
    assert loss.item() == pytest.approx(sum(means) / 3, rel=1e-5)
    assert accuracy.item() == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("width", [2, 512])
def test_collapse_shows_as_the_margin_whatever_the_width(width):
    """Catches distances summed over features, whose margin depends on the width, and ties counted as hits."""
    same = torch.ones(4, width)
    loss, accuracy = triplet_loss(same, same, EVERYONE_ELSE, 0.2)
    assert (loss.item(), accuracy.item()) == pytest.approx((0.2, 0.5))
    opposite = torch.cat([torch.ones(1, width), -torch.ones(1, width)])
    assert triplet_loss(opposite, -opposite, EVERYONE_ELSE[:2, :2], 0.2)[0].item() == pytest.approx(4.2, rel=1e-5)


def test_without_negatives_loss_and_accuracy_are_zero():
    first, second = example()
    assert [value.item() for value in triplet_loss(first, second, torch.zeros(4, 4, dtype=torch.bool), 0.2)] == [0, 0]
