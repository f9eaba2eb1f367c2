"""CPC: predictions of what lies ahead at the same position, and all codes as candidates."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.alarms import HealthConfig
from nnssl_ext.engine.health import Monitor
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.backbone import descriptor
from nnssl_ext.trainers.cpc import CPC, CPCTrainer
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11))


def make_batch(patch_size: tuple[int, ...]) -> Batch:
    data = torch.randn(2, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    lower = torch.zeros(2, len(patch_size), dtype=torch.int64)
    valid = torch.ones_like(data, dtype=torch.bool)
    return Batch(data, valid, ("a", "b"), RANDOM.samples, lower, torch.ones(2, len(patch_size)))


def make_task(plan, **settings) -> CPC:
    return task_on(CPC, plan, **settings).eval()


def test_the_loss_is_that_of_a_loop_over_columns(tiny_plan, patch_size):
    """Catches readers that see the slabs they predict, predictions of another position or slab, of another crop, and
    candidates that are not all codes of the batch."""
    task, dims = make_task(tiny_plan(patch_size), width=8), len(patch_size)
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
        codes = task.head.layers(descriptor(task.encoder(views["boxes"]))).view(2, *[4] * dims, 8)
        candidates = functional.normalize(codes.flatten(0, -2), dim=1)
        losses, hits = [], []
        for axis in range(dims):
            for place in torch.cartesian_prod(*[torch.arange(4)] * (dims - 1)).view(-1, dims - 1).tolist():
                for row in range(2):
                    cells = [(row, *place[:axis], slab, *place[axis:]) for slab in range(4)]
                    _, context = task.readers[axis](torch.stack([codes[cell] for cell in cells[:2]])[None])
                    ahead = task.predictors[axis](context[0, 0]).view(2, 8)
                    for predicted, cell in zip(ahead, cells[2:], strict=True):
                        logits = candidates @ functional.normalize(predicted, dim=0) / 0.1
                        logged = logits.log_softmax(0)
                        own = (candidates @ functional.normalize(codes[cell], dim=0)).argmax()
                        losses.append(-logged[own])
                        hits.append(float(logits.argmax() == own))
    assert len(losses) == dims * 2 * 4 ** (dims - 1) * 2
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert output.metrics["accuracy"].item() == pytest.approx(sum(hits) / len(hits))
    assert output.metrics["contrast_chance"].item() == pytest.approx(math.log(2 * 4**dims), rel=1e-6)


def test_the_monitor_of_collapse_is_shown_both_halves_of_a_crop(tiny_plan, patch_size):
    """The codes of its cells as on a chequerboard. Catches halves of several crops, and halves that are the same."""
    task, dims = make_task(tiny_plan(patch_size), width=8), len(patch_size)
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        shown = task(views).embeddings
        codes = functional.normalize(task.head.layers(descriptor(task.encoder(views["boxes"]))), dim=1)
    places = torch.cartesian_prod(*[torch.arange(4)] * dims).tolist()
    for colour, found in enumerate((shown.first, shown.second)):
        for row, own in enumerate(codes.view(2, 4**dims, 8)):
            chosen = [code for place, code in zip(places, own, strict=True) if sum(place) % 2 == colour]
            torch.testing.assert_close(found[row], torch.stack(chosen).mean(0))
    watching = Monitor(HealthConfig(), total=100)
    watching.observe(("a", "b"), shown)
    assert 0 < watching.measure()["between_share"] < 1


def test_the_sham_asks_for_the_codes_of_the_other_crop(tiny_plan):
    task = make_task(tiny_plan((24, 16)))
    codes = torch.arange(32.0).view(2, 4, 4, 1).expand(-1, -1, -1, 128)
    _, own = task._predict(codes, torch.tensor([0, 1]))
    _, other = task._predict(codes, torch.tensor([1, 0]))
    assert torch.equal((own + 16) % 32, other)


@pytest.mark.parametrize("override", ["temperature=0", "width=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        CPCTrainer.configured([override])
