"""Dice and cross-entropy against loops over voxels, and what may not influence them."""

import math

import pytest
import torch

from nnssl_ext.losses.dice_ce import dice_ce

SHAPES = [(3, 5, 4), (6, 7)]


def batch(shape: tuple[int, ...], num_classes: int = 4, samples: int = 2) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(samples, num_classes, *shape, generator=random)
    classes = torch.randint(num_classes - 1, (samples, 1, *shape), generator=random)  # the last class is held by none
    valid = torch.rand(samples, 1, *shape, generator=random) < 0.7
    return logits, classes, valid


def slow(logits: torch.Tensor, classes: torch.Tensor, valid: torch.Tensor) -> tuple[float, float]:
    dices, entropies = [], []
    for b in range(len(logits)):
        num_classes = logits.shape[1]
        overlap, given, true, entropy = [0.0] * num_classes, [0.0] * num_classes, [0.0] * num_classes, []
        for position in torch.cartesian_prod(*map(torch.arange, logits.shape[2:])).tolist():
            if not valid[(b, 0, *position)]:
                continue
            powers = [math.exp(logits[(b, k, *position)]) for k in range(num_classes)]
            own = int(classes[(b, 0, *position)])
            for k in range(num_classes):
                given[k] += powers[k] / sum(powers)
            overlap[own] += powers[own] / sum(powers)
            true[own] += 1
            entropy.append(-math.log(powers[own] / sum(powers)))
        held = [k for k in range(num_classes) if true[k]]
        dices.append(sum(2 * overlap[k] / (given[k] + true[k]) for k in held) / len(held))
        entropies.append(sum(entropy) / len(entropy))
    return 1 - sum(dices) / len(dices), sum(entropies) / len(entropies)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_loops_over_voxels(shape):
    """Catches a first class that is left out as background, and classes that are not there counted as failed."""
    values = batch(shape)
    found = [value.item() for value in dice_ce(*values)]
    assert found == pytest.approx(slow(*values), rel=1e-4)


@pytest.mark.parametrize("rubbish", [1e4, float("nan")])
def test_padding_has_no_influence(rubbish):
    logits, classes, valid = batch((3, 5, 4))
    logits.requires_grad_(True)
    expected = sum(dice_ce(logits, classes, valid))
    (gradient,) = torch.autograd.grad(expected, logits)
    assert torch.equal(gradient.abs().sum(1, keepdim=True) > 0, valid)
    spoilt = torch.where(valid, logits.detach(), rubbish)
    other = torch.where(valid, classes, 2)
    assert torch.equal(sum(dice_ce(spoilt, other, valid)), expected.detach())


def test_the_truth_has_no_loss_and_its_opposite_the_largest():
    _, classes, valid = batch((6, 7), num_classes=3)
    truth = torch.nn.functional.one_hot(classes[:, 0], 3).movedim(-1, 1).float()
    assert [value.item() for value in dice_ce(100 * truth, classes, valid)] == pytest.approx([0, 0], abs=1e-5)
    assert dice_ce(-100 * truth, classes, valid)[0].item() == pytest.approx(1, abs=1e-5)


def test_halves_average_to_the_whole_and_all_padding_is_zero():
    logits, classes, valid = batch((3, 5, 4), samples=4)
    valid[3] = False
    whole = torch.stack(dice_ce(logits, classes, valid))
    halves = [torch.stack(dice_ce(logits[half], classes[half], valid[half])) for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(0), whole)
    assert not any(dice_ce(logits[3:], classes[3:], valid[3:]))


def test_half_precision_is_summed_in_full():
    classes = torch.zeros(1, 1, 4, 4096, dtype=torch.int64)
    logits = torch.zeros(1, 2, 4, 4096, dtype=torch.bfloat16)
    dice, ce = dice_ce(logits, classes, torch.ones_like(classes, dtype=torch.bool))
    assert dice.dtype == ce.dtype == torch.float32
    assert dice.item() == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-5)
    assert ce.item() == pytest.approx(math.log(2), rel=1e-5)
