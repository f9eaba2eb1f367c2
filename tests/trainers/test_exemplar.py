"""Exemplar: one head for all views, other cases as negatives, and a margin that tells collapse."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.triplet import triplet_loss
from nnssl_ext.trainers.exemplar import Exemplar, ExemplarTrainer
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))
PATCH = (24, 16)


def make_batch(cases: str = "abc") -> Batch:
    data = torch.randn(3, 1, *PATCH, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(data, dtype=torch.bool)
    valid[2, :, -6:] = False
    lower = torch.zeros(3, 2, dtype=torch.int64)
    return Batch(torch.where(valid, data, 1e4), valid, tuple(cases), RANDOM.samples, lower, torch.ones(3, 2))


def make_task(plan, **settings) -> Exemplar:
    return task_on(Exemplar, plan, **settings).eval()


def test_the_same_picture_has_the_same_embedding_on_either_side(tiny_plan):
    """Catches heads of their own for anchor, positive and negative, which bring the loss to 0 on noise: each gives its
    own constant, whatever it sees."""
    task = make_task(tiny_plan(PATCH))
    views = task.views(make_batch(), RANDOM, train=False)
    with torch.no_grad():
        shown = task({**views, "changed": views["plain"]}).embeddings
        blank = task({**views, "changed": torch.zeros(3, 1, *PATCH), "plain": torch.zeros(3, 1, *PATCH)})
    torch.testing.assert_close(shown.first, shown.second)
    assert blank.loss.item() == pytest.approx(0.2) == pytest.approx(blank.metrics["triplet_chance"].item())


@pytest.mark.parametrize(("cases", "num"), [("abc", 6), ("aba", 4), ("aaa", 0)])
def test_crops_of_the_same_case_are_no_negatives(tiny_plan, cases, num):
    """Catches a negative that is the same image, which can only be told from it by the change."""
    task = make_task(tiny_plan(PATCH))
    views = task.views(make_batch(cases), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
    compared = torch.tensor([[a != b for b in cases] for a in cases])
    expected = triplet_loss(output.embeddings.first, output.embeddings.second, compared, 0.2)
    assert compared.sum() == num
    assert output.loss.item() == pytest.approx(expected[0].item())
    assert output.metrics["accuracy"].item() == pytest.approx(expected[1].item())


def test_views_lie_in_the_volume_and_the_change_is_the_task(tiny_plan):
    """Catches padding in either view, and a validation that compares a crop with itself."""
    task = make_task(tiny_plan(PATCH))
    for train in (True, False):
        views = task.views(make_batch(), RANDOM, train=train)
        for name in ("changed", "plain"):
            assert views[name].abs().max() < 20
            assert (views[name] == 0).float().mean() < 0.01
        assert ((views["changed"] - views["plain"]).abs().flatten(1).mean(1) > 0.1).all()


def test_a_sham_wants_one_or_the_other_by_a_coin(tiny_plan):
    """Catches a sham that still pulls a crop to itself, or away from itself, more often than not."""
    task = make_task(tiny_plan(PATCH))
    views = task.views(make_batch(), RANDOM, train=False)
    coins = [
        task.sham(views, SampleRandom(seed=0, step=step, samples=RANDOM.samples))["order"].float() for step in range(60)
    ]
    assert torch.stack(coins).mean().item() == pytest.approx(0.5, abs=0.12)
    with torch.no_grad():
        both = [task({**views, "order": torch.full((3,), order)}).loss.item() for order in (0, 1)]
    assert both[0] != pytest.approx(both[1])


def test_a_single_crop_is_refused(tiny_plan):
    plan = tiny_plan(PATCH)
    (raw,) = plan.raw["configurations"].values()
    raw["batch_size"] = 1
    with pytest.raises(ValueError, match="-batch_size of 2 or more"):
        make_task(plan)


@pytest.mark.parametrize("override", ["margin=0", "margin=4", "crop_scale=[0.5,0.2]", "hidden_width=0", "width=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        ExemplarTrainer.configured([override])
