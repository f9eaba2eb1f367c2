"""Losses of several tasks as one: factors by hand, for how long they are measured, and what a variance does."""

import pytest
import torch

from nnssl_ext.models.weighting import FirstSteps, Uncertainty


def test_losses_are_divided_by_their_mean_size_so_far():
    """Catches factors of the last pass alone, signs that turn a loss around, and a loss that is no number and stays."""
    weighting = FirstSteps(2)
    for losses, factors in (
        ([2.0, -10.0], [1 / 2, 1 / 10]),
        ([4.0, 30.0], [1 / 3, 1 / 20]),
        ([float("nan"), 20.0], [1 / 3, 1 / 20]),
    ):
        loss, found = weighting(torch.tensor(losses))
        assert found.tolist() == pytest.approx(factors)
        if not loss.isnan():
            assert loss.item() == pytest.approx(sum(map(float.__mul__, losses, factors)))
    weighting(torch.tensor([1.0, 1.0]))
    assert weighting.count.tolist() == [3, 4]


def test_no_gradient_comes_through_the_factors():
    """Catches a loss over itself, whose gradient is 0: planted once, by measuring without `detach`."""
    losses = torch.tensor([2.0, 4.0], requires_grad=True)
    FirstSteps(2)(losses)[0].backward()
    assert losses.grad.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(("total", "measured"), [(10_000, 50), (200, 20), (5, 1)])
def test_the_first_steps_are_fifty_or_a_tenth_of_the_run(total, measured):
    """Catches factors that go on changing, by which a loss that falls would weigh more and more."""
    weighting = FirstSteps(1)
    for step in range(60):
        weighting(torch.ones(1))
        weighting.update(step, total)
    assert weighting.count.item() == measured


def test_validation_measures_nothing_and_a_fresh_run_adds_losses():
    weighting = FirstSteps(2).eval()
    loss, factors = weighting(torch.tensor([2.0, 3.0]))
    assert (loss.item(), factors.tolist(), weighting.count.tolist()) == (5, [1, 1], [0, 0])


def test_what_is_measured_is_saved():
    """Catches means that a resumed run would start anew."""
    weighting, resumed = FirstSteps(2), FirstSteps(2)
    weighting(torch.tensor([2.0, 3.0]))
    resumed.load_state_dict(weighting.state_dict())
    losses = torch.tensor([5.0, 7.0])
    assert torch.equal(resumed(losses)[1], weighting(losses)[1])


def test_a_variance_settles_where_it_is_the_loss():
    """By hand: (L exp(-s) + s) / 2 is least at exp(s) = L. Catches a missing penalty, and a wrong sign of s."""
    weighting = Uncertainty(2)
    with torch.no_grad():
        weighting.log_variance.copy_(torch.tensor([4.0, 1.0]).log())
    loss, factors = weighting(torch.tensor([4.0, 2.0]))
    loss.backward()
    assert factors.tolist() == pytest.approx([1 / 8, 1 / 2])
    assert loss.item() == pytest.approx((1 + torch.tensor(4.0).log().item() + 2) / 2)
    assert weighting.log_variance.grad.tolist() == pytest.approx([0, -0.5])
