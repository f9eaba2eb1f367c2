"""The masked error against loops over voxels, and what may not influence it."""

import pytest
import torch

from nnssl_ext.losses.mae import guess_error, hidden_share, masked_l1, masked_mse

SHAPES = [(2, 1, 3, 5, 4), (3, 2, 6, 7)]


def batch(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, *shape, generator=random)
    hidden, valid = torch.rand(2, shape[0], 1, *shape[2:], generator=random) < 0.6
    return prediction, target, hidden, valid


def slow_masked_error(prediction, target, hidden, valid, power=2) -> float:
    losses = []
    for b in range(len(target)):
        errors = []
        for position in torch.cartesian_prod(*map(torch.arange, target.shape[2:])).tolist():
            if hidden[(b, 0, *position)] and valid[(b, 0, *position)]:
                errors += [
                    abs(float(prediction[(b, c, *position)] - target[(b, c, *position)])) ** power
                    for c in range(target.shape[1])
                ]
        losses.append(sum(errors) / len(errors))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_loops_over_voxels(shape):
    values = batch(shape)
    assert masked_mse(*values).item() == pytest.approx(slow_masked_error(*values), rel=1e-5)
    assert masked_l1(*values).item() == pytest.approx(slow_masked_error(*values, power=1), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rubbish", [1e6, float("nan"), float("inf")])
def test_visible_voxels_and_padding_have_no_influence(shape, rubbish):
    prediction, target, hidden, valid = batch(shape)
    prediction.requires_grad_(True)
    expected = masked_mse(prediction, target, hidden, valid)
    (gradient,) = torch.autograd.grad(expected, prediction)
    spoilt = torch.where(hidden & valid, target, rubbish)
    again = masked_mse(prediction, spoilt, hidden, valid)
    (gradient_again,) = torch.autograd.grad(again, prediction)
    assert torch.equal(again, expected)
    assert torch.equal(gradient_again, gradient)
    assert torch.equal(gradient != 0, (hidden & valid).expand_as(gradient))


def test_samples_count_alike_however_much_is_hidden():
    target = torch.zeros(2, 1, 10)
    prediction = torch.tensor([1.0, 3.0])[:, None, None].expand(2, 1, 10)
    hidden = torch.zeros(2, 1, 10, dtype=torch.bool)
    hidden[0, :, :1] = True
    hidden[1, :, :8] = True
    assert masked_mse(prediction, target, hidden, torch.ones_like(hidden)).item() == pytest.approx((1 + 9) / 2)


def test_halves_average_to_the_whole():
    prediction, target, hidden, valid = batch((4, 1, 3, 5, 4))
    halves = [
        masked_mse(prediction[half], target[half], hidden[half], valid[half]) for half in (slice(0, 2), slice(2, 4))
    ]
    assert torch.stack(halves).mean().item() == pytest.approx(masked_mse(prediction, target, hidden, valid).item())


def test_a_sample_that_is_all_padding_counts_as_zero():
    prediction, target, hidden, valid = batch((2, 1, 3, 5, 4))
    valid[0] = False
    expected = masked_mse(prediction[1:], target[1:], hidden[1:], valid[1:]) / 2
    assert masked_mse(prediction, target, hidden, valid).item() == pytest.approx(expected.item())


def test_half_precision_predictions_are_compared_in_full():
    target = torch.full((1, 1, 4096), 100.0)
    everything = torch.ones(1, 1, 4096, dtype=torch.bool)
    loss = masked_mse(torch.zeros_like(target, dtype=torch.float16), target, everything, everything)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(10000.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_chance_is_the_error_of_each_samples_visible_mean(shape):
    """Against a mean taken sample by sample. Faults: hidden voxels or padding in the mean, or one mean for all."""
    _, target, hidden, valid = batch(shape)
    target = target + torch.arange(shape[0]).view(-1, *[1] * (target.ndim - 1))
    guess = torch.empty_like(target)
    for b, c in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).tolist():
        guess[b, c] = target[b, c][~hidden[b, 0] & valid[b, 0]].mean()
    expected = slow_masked_error(guess, target, hidden, valid)
    assert guess_error(target, hidden, valid).item() == pytest.approx(expected, rel=1e-5)
    spoilt = torch.where(valid, target, float("nan"))
    assert torch.equal(guess_error(spoilt, hidden, valid), guess_error(target, hidden, valid))


def test_the_hidden_share_is_of_real_voxels():
    hidden = torch.tensor([True, True, True, False, False, True]).view(1, 1, 6)
    valid = torch.tensor([True, True, False, True, True, True]).view(1, 1, 6)
    assert hidden_share(hidden, valid).item() == pytest.approx(3 / 5)
    assert hidden_share(hidden, torch.zeros_like(valid)).item() == 0
