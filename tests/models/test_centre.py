"""The running centre of a teacher's scores: once per step, corrected for its start, over what counts."""

import math

import pytest
import torch

from nnssl_ext.models.centre import Centre


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_it_is_the_exponential_mean_over_steps_corrected_for_its_start():
    centre, steps = Centre(4), draw(5, 3, 4)
    assert not centre().any()
    for rows in steps:
        centre.collect(rows)
        centre.update(torch.tensor(0.9))
    weights = [0.9 ** (4 - step) for step in range(5)]
    expected = sum(w * rows.mean(0) for w, rows in zip(weights, steps, strict=True)) / sum(weights)
    assert torch.allclose(centre(), expected, atol=1e-5)


def test_passes_of_one_step_count_as_one_batch():
    """Fails if the centre moves once per pass: then accumulation changes its horizon."""
    whole, parts, rows = Centre(4), Centre(4), draw(6, 4)
    whole.collect(rows)
    for part in rows.split([1, 2, 3]):
        parts.collect(part)
        assert not parts().any()
    for centre in (whole, parts):
        centre.update(torch.tensor(0.9))
    assert torch.allclose(whole(), parts(), atol=1e-6)


def test_what_does_not_count_is_left_out_and_an_empty_step_changes_nothing():
    centre, rows = Centre(4), draw(2, 3, 4)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    centre.collect(rows, counted)
    centre.update(torch.tensor(0.5))
    before = centre().clone()
    assert torch.allclose(before, rows[counted].mean(0), atol=1e-6)
    centre.collect(rows, torch.zeros_like(counted))
    centre.update(torch.tensor(0.5))
    assert torch.equal(centre(), before)


@pytest.mark.parametrize("momentum", [0.0, 0.999])
def test_the_first_step_gives_its_own_mean(momentum):
    centre, rows = Centre(4), draw(3, 4)
    centre.collect(rows)
    centre.update(torch.tensor(momentum))
    assert torch.allclose(centre(), rows.mean(0), atol=1e-4)


def test_half_precision_around_it_does_not_round_what_is_collected():
    """Fails if the sum is a matrix product: autocast rounds its factors to eight bits, whatever their type."""
    exact, under, rows = Centre(4), Centre(4), 300 + draw(8, 4)
    counted = torch.arange(8) != 3
    exact.collect(rows, counted)
    with torch.autocast("cpu", torch.bfloat16):
        under.collect(rows, counted)
    assert torch.equal(under.total, exact.total)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(wrong):
    """Fails if it is summed: the centre would be no number for the rest of the run."""
    centre, rows = Centre(4), draw(3, 4)
    rows[1, 2] = wrong
    centre.collect(rows)
    centre.update(0.5)
    assert torch.allclose(centre(), rows[::2].mean(0), atol=1e-6)
