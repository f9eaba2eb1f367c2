"""SimCLR: what is a negative, what the queue holds and from whom, and what chance is."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.nt_xent import nt_xent
from nnssl_ext.models.backbone import descriptor
from nnssl_ext.models.queue import EMPTY, case_keys
from nnssl_ext.trainers.simclr import SimCLR, SimCLRConfig, SimCLRTrainer

SAMPLES = (10, 11, 12)
RANDOM = SampleRandom(seed=3, step=5, samples=SAMPLES)
PATCH = (24, 16)


def make_batch(cases: str = "abc") -> Batch:
    size = (32, 21)
    data = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    lower = torch.zeros(3, 2, dtype=torch.int64)
    return Batch(data, torch.ones_like(data, dtype=torch.bool), tuple(cases), SAMPLES, lower, torch.ones(3, 2))


def make_task(plan, num_cases: int = 9, batch_size: int = 3, **settings) -> SimCLR:
    torch.manual_seed(0)
    (raw,) = plan.raw["configurations"].values()
    raw["batch_size"] = batch_size
    (name,) = plan.configuration_names
    return SimCLR(SimCLRConfig(**settings), plan.configuration(name), num_cases)


def embedded(encoder, projector, views) -> torch.Tensor:
    """Of the first views, then of the second ones, (6, width)."""
    return torch.cat(
        [functional.normalize(projector(descriptor(encoder(views[name]))), dim=1) for name in ("first", "second")]
    )


@pytest.mark.parametrize("cases", ["abc", "aba"])
def test_the_loss_is_that_of_a_loop_over_candidates(tiny_plan, cases):
    """The queue holds cases b, d and an empty place: b is no negative of b, and the empty place none of anybody.

    Catches entries of the same case among the negatives, empty places that count as candidates (which raises the
    chance that is logged), queue rows that are not normalised, a view among its own candidates, and candidates of the
    batch that do not come from the slow copy, as those of the queue do: then telling the two networks apart is enough
    to beat chance (on real volumes the loss fell to 2.7 of 4.1 that way, and the training came apart).
    """
    task = make_task(tiny_plan(PATCH)).eval()
    views = task.views(make_batch(cases), RANDOM, train=False)
    rows = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)) * 5
    task.queue.rows[:2] = rows
    task.queue.keys[:2] = case_keys(("b", "d"), rows.device)
    with torch.no_grad():
        for weight in task.teacher.parameters():
            weight.mul_(1.5).add_(0.1)
        output = task(views)
        anchors = embedded(task.encoder, task.projector, views)
        both = embedded(task.teacher.encoder, task.teacher.projector, views)
    named, losses, chances = list(cases) * 2, [], []
    for i, anchor in enumerate(anchors):
        partner = (i + 3) % 6
        others = [both[j] for j in range(6) if j not in (i, partner) and named[j] != named[i]]
        others += [functional.normalize(row, dim=0) for row, case in zip(rows, "bd", strict=True) if case != named[i]]
        logits = torch.stack([both[partner], *others]) @ anchor / 0.5
        losses.append(logits.logsumexp(0) - logits[0])
        chances.append(math.log(len(logits)))
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert output.metrics["contrast_chance"].item() == pytest.approx(sum(chances) / 6, rel=1e-5)


def test_the_queue_is_filled_by_the_slow_copy_in_training_alone(tiny_plan):
    """Catches a queue of the student's own rows, one that validation fills, and one that holds a case twice."""
    task, batch = make_task(tiny_plan(PATCH), num_cases=5), make_batch()
    with torch.no_grad():
        for weight in task.teacher.parameters():
            weight.mul_(1.5)
        views = task.views(batch, RANDOM, train=False)
        task.eval()(views)
        assert (task.queue.keys == EMPTY).all()
        task.train()(views)
        expected = task.teacher.projector(descriptor(task.teacher.encoder(views["first"])))
    assert len(task.queue.keys) == 5 - 3
    assert set(task.queue.keys.tolist()) == set(views["case"][1:].tolist())
    order = [task.queue.keys.tolist().index(key) for key in views["case"][1:].tolist()]
    torch.testing.assert_close(task.queue.rows[order], expected[1:])


def test_the_slow_copy_moves_by_a_hundredth(tiny_plan):
    task = make_task(tiny_plan(PATCH))
    student, teacher = task.projector[0].weight, task.teacher.projector[0].weight
    before = teacher.clone()
    with torch.no_grad():
        student += 1
    task.after_step(0, 100)
    torch.testing.assert_close(teacher, before + 0.01)


def test_without_a_queue_it_is_simclr(tiny_plan):
    """Gradients flow through both views. Catches a slow copy that is kept for nothing."""
    task = make_task(tiny_plan(PATCH), queue=0).eval()
    views = task.views(make_batch(), RANDOM, train=False)
    loss = task(views).loss
    both = embedded(task.encoder, task.projector, views)
    assert loss.item() == pytest.approx(nt_xent(*both.chunk(2), 0.5)[0].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, task.projector[0].weight)
    (expected,) = torch.autograd.grad(nt_xent(*both.chunk(2), 0.5)[0], task.projector[0].weight)
    torch.testing.assert_close(gradient, expected)
    assert not hasattr(task, "teacher")


def test_a_batch_of_one_lives_from_the_queue_and_is_refused_without(tiny_plan):
    """Catches a run whose loss is 0 from the first step to the last."""
    assert len(make_task(tiny_plan(PATCH), num_cases=9, batch_size=1).queue.keys) == 8
    with pytest.raises(ValueError, match=r"a batch of 1 with a queue of 0 .* -batch_size of 2"):
        make_task(tiny_plan(PATCH), num_cases=9, batch_size=1, queue=0)


@pytest.mark.parametrize(
    "override", ["temperature=0", "width=0", "hidden_width=0", "queue=-1", "queue_momentum=1", "crops.num_locals=2"]
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        SimCLRTrainer.configured([override])
