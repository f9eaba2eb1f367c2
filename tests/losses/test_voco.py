"""Volume contrast against a loop over pairs, and where its gradient goes."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl_ext.losses.voco import voco_loss


def example() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    crops, bases, fixed = (torch.randn(2, num, 6, generator=generator) for num in (3, 4, 4))
    overlap = torch.zeros(2, 3, 4)
    overlap[:, 0, 0] = 1
    overlap[:, 1, :2] = torch.tensor([0.3, 0.7])
    overlap[:, 2] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    return crops, bases, fixed, overlap


def test_equals_a_loop_over_pairs():
    """Catches overlaps that are not the weights, negatives counted with the positives, and bases paired with
    themselves."""
    crops, bases, fixed, overlap = example()
    totals = []
    for row in range(2):
        pull, push, spread = 0.0, [], []
        for i in range(3):
            for j in range(4):
                like = max(float(functional.cosine_similarity(crops[row, i], fixed[row, j], dim=0)), 0)
                y = float(overlap[row, i, j])
                if y:
                    pull -= y * math.log(1 - abs(y - like))
                else:
                    push.append(like**2)
        for i in range(4):
            for j in range(4):
                if i != j:
                    spread.append(max(float(functional.cosine_similarity(bases[row, i], bases[row, j], dim=0)), 0) ** 2)
        totals.append(pull / 3 + sum(push) / len(push) + sum(spread) / len(spread))
    loss, cosines = voco_loss(crops, bases, fixed, overlap)
    assert loss.item() == pytest.approx(sum(totals) / 2, rel=1e-5)
    torch.testing.assert_close(cosines, functional.cosine_similarity(crops[:, :, None], fixed[:, None], dim=3))


def test_crops_learn_from_fixed_bases_and_bases_from_one_another():
    """Catches a gradient into what crops are compared with, which lets both collapse."""
    crops, bases, fixed, overlap = example()
    for each in (crops, bases, fixed):
        each.requires_grad_()
    voco_loss(crops, bases, fixed, overlap)[0].backward()
    assert fixed.grad is None
    assert crops.grad.abs().sum() > 0
    assert bases.grad.abs().sum() > 0


def test_a_perfect_answer_costs_nothing_and_the_worst_is_finite():
    eye = torch.eye(4)[None]
    overlap = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 1, 0]]])
    assert voco_loss(eye[:, [0, 2]], eye, eye, overlap)[0].item() == pytest.approx(0, abs=1e-5)
    assert 10 < voco_loss(-eye[:, [0, 2]], eye, eye, overlap)[0].item() < 20
