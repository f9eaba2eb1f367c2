"""Targets: centred, tempered, balanced where asked, and with knobs that a monitor can turn."""

import math

import pytest
import torch

from nnssl_ext.losses.sinkhorn import sinkhorn
from nnssl_ext.models.targets import Targets, check_balance, prototypes_for


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def entropy(probabilities: torch.Tensor) -> float:
    return float(torch.special.entr(probabilities).sum(-1).mean())


def test_the_centre_takes_out_what_all_have_in_common():
    """Fails if the centre is added, or taken off after the temperature: one prototype then wins for all."""
    targets, common = Targets(8, 0.05), torch.tensor([5.0, *[0.0] * 7])
    scores = draw(16, 8) / 10 + common
    assert (targets(scores).argmax(1) == 0).all()
    targets.centre.collect(scores)
    targets.update(0.9, 0.05)
    expected = ((scores - scores.mean(0)) / 0.05).softmax(1)
    assert torch.allclose(targets(scores), expected, atol=1e-4)
    assert len(targets(scores).argmax(1).unique()) > 3


@pytest.mark.parametrize(("num_cases", "number"), [(2, 256), (64, 256), (65, 512), (1000, 4096), (10**6, 8192)])
def test_prototypes_follow_the_cases(num_cases, number):
    assert prototypes_for(num_cases) == number


def test_balance_over_few_samples_is_refused_with_a_way_out():
    check_balance("centring", 16, 256, 1 / 16)
    with pytest.raises(ValueError, match=r"balances 8 samples over 256 prototypes.*takes 16.*prototypes=128"):
        check_balance("centring", 8, 256, 1 / 16)


def test_balanced_targets_take_others_along_and_leave_out_what_does_not_count():
    targets, scores, others = Targets(4, 0.5, sinkhorn), draw(2, 3, 4), draw(5, 4) + 1
    counted = torch.tensor([[True, True, False], [True, False, True]])
    expected = sinkhorn(torch.cat([scores[counted], others]), 0.5)[:4]
    filled = torch.ones(5, dtype=torch.bool)
    assert torch.allclose(targets(scores, counted, (others, filled))[counted], expected, atol=1e-5)
    filled[3:] = False
    expected = sinkhorn(torch.cat([scores[counted], others[:3]]), 0.5)[:4]
    assert torch.allclose(targets(scores, counted, (others, filled))[counted], expected, atol=1e-5)


def test_temperature_follows_the_schedule_until_a_knob_is_turned():
    targets, scores = Targets(32, 0.04), draw(6, 32)
    targets.update(0.9, 0.05)
    assert targets.temperature == pytest.approx(0.05)
    before = entropy(targets(scores))
    assert "0.04" in targets.sharpen()
    assert entropy(targets(scores)) < before
    targets.update(0.9, 0.05)
    assert targets.temperature == pytest.approx(0.04)
    for expected in (0.06, 0.07):
        assert "0.01" in targets.soften()
        targets.update(0.9, 0.05)
        assert targets.temperature == pytest.approx(expected)
    assert targets.soften() == ""


def test_halved_prototypes_get_no_probability_from_teacher_or_student():
    """Fails if a closed prototype comes back through the centre: taking off its own score leaves it at 0."""
    targets, scores = Targets(32, 0.04), draw(6, 32)
    targets.sharpen()
    assert "16" in targets.sharpen()
    targets.centre.collect(scores)
    targets.update(0.9, 0.04)
    assert not targets(scores)[:, 16:].any()
    assert not (targets.close(scores) / 0.1).softmax(1)[:, 16:].any()
    assert targets.sharpen() == ""


def test_the_centre_looks_back_further_when_sharpened_and_less_when_softened():
    seen = {}
    for knob in ("", "sharpen", "soften"):
        targets = Targets(4, 0.04)
        if knob:
            getattr(targets, knob)()
        for scores in (torch.zeros(1, 4), torch.ones(1, 4)):
            targets.centre.collect(scores)
            targets.update(0.999, 0.04)
        seen[knob] = 1 - targets.centre.weight.item()
    assert seen[""] == pytest.approx(0.999**2)
    assert seen["sharpen"] == pytest.approx(0.9995**2)
    assert seen["soften"] == pytest.approx(0.99**2)


def test_knobs_are_saved():
    turned, loaded = Targets(32, 0.04), Targets(32, 0.04)
    for _ in range(2):
        turned.sharpen()
    turned.soften()
    loaded.load_state_dict(turned.state_dict())
    loaded.update(0.9, 0.05)
    assert loaded.temperature == pytest.approx(0.06)
    assert int(loaded.open.sum()) == 16
    assert math.isinf(loaded.cap)
