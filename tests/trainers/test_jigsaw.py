"""Jigsaw: classes that are the orders, on boxes in the volume, with the permutations in the checkpoint."""

from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.jigsaw import Jigsaw, JigsawTrainer
from nnssl_ext.views.cells import boxes_in_cells, grid_cells, resample_boxes
from tests.tasks import task_on
from tests.views.test_cells import smooth_noise

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))


def make_batch(patch_size: tuple[int, ...]) -> Batch:
    """Three crops whose voxels hold the number of their cell; the last is padded with rubbish."""
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[2, :, -6:] = False
    axes = [torch.arange(edge).mul(3).div(edge, rounding_mode="floor") for edge in patch_size]
    data = torch.zeros(3, 1, *patch_size)
    for number, axis in enumerate(torch.meshgrid(*axes, indexing="ij")):
        data += axis * 3 ** (len(patch_size) - 1 - number)
    spacing = torch.ones(3, len(patch_size))
    lower = torch.zeros_like(spacing, dtype=torch.int64)
    return Batch(torch.where(valid, data, 1e4), valid, ("a", "b", "c"), RANDOM.samples, lower, spacing)


make_task = partial(task_on, Jigsaw)


def test_the_class_says_which_cell_comes_where(tiny_plan, patch_size):
    """Every voxel of the first two crops says which cell it is of.

    Catches labels of another order than is shown, an order applied the other way round, and one that is shown to all.
    """
    task, batch, seen = make_task(tiny_plan(patch_size), permutations=20), make_batch(patch_size), set()
    for step in range(5):
        views = task.views(batch, replace(RANDOM, step=step), train=False)
        boxes = views["boxes"].unflatten(0, (3, -1))
        for row, label in enumerate(views["order"].tolist()[:2]):
            middle = boxes[row, :, 0][(slice(None), *[edge // 2 for edge in task.size])]
            assert middle.round().long().tolist() == task.permutations[label].tolist()
            seen.add(label)
        assert views["boxes"].max() < 27
    assert len(seen) > 5


def test_cells_follow_the_volume_not_the_padding(tiny_plan, patch_size):
    task, batch = make_task(tiny_plan(patch_size)), make_batch(patch_size)
    views = task.views(batch, RANDOM, train=False)
    boxes = boxes_in_cells(grid_cells(batch.valid, task.grid), RANDOM.child("cells"))
    assert (boxes.lower + boxes.edges)[2, :, 0].max() < patch_size[0] - 6
    expected = resample_boxes(batch.data, batch.valid, boxes, task.size).unflatten(0, (3, -1))[2]
    order = task.permutations[views["order"][2]]
    torch.testing.assert_close(views["boxes"].unflatten(0, (3, -1))[2], expected[order])


def test_an_order_fits_as_well_as_its_boxes_fit_their_cells(tiny_plan, patch_size):
    """Catches answers added up for another order than was shown, and boxes of several crops that are mixed up."""
    task = make_task(tiny_plan(patch_size), permutations=5).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
        features = torch.stack([task.encoder.pooled(box[None])[0] for box in views["boxes"]])
        votes = task.head.layers(features).view(3, prod(task.grid), prod(task.grid))
    logits = torch.tensor(
        [
            [sum(float(crop[place, cell]) for place, cell in enumerate(order)) for order in task.permutations.tolist()]
            for crop in votes
        ]
    )
    expected = torch.nn.functional.cross_entropy(logits, views["order"])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert output.metrics["accuracy_chance"].item() == pytest.approx(0.2)
    hits = (logits.argmax(1) == views["order"]).float().mean()
    assert output.metrics["accuracy"].item() == pytest.approx(hits.item())


def test_boxes_that_know_their_cell_name_the_order(tiny_plan):
    """Catches an order applied the other way round by the head than by the views."""
    task = make_task(tiny_plan((24, 16)))
    for order in range(0, 100, 7):
        votes = torch.nn.functional.one_hot(task.permutations[order], 9).float()
        assert task._fit(votes).argmax().item() == order


def test_permutations_are_part_of_the_checkpoint(tiny_plan):
    """Catches orders that another version, or another number of candidates, would change in a resumed run."""
    assert make_task(tiny_plan((24, 16))).state_dict()["permutations"].shape == (100, 9)


@pytest.mark.parametrize("override", ["permutations=1", "hidden_width=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        JigsawTrainer.configured([override])


def order_accuracy_on_noise(plan, *, show_padding: bool) -> float:
    """How often the order is told after some steps on noise that is never seen twice, padded along one axis."""
    task, size, num = make_task(plan, permutations=10).train(), 8, 80
    optimiser = torch.optim.AdamW(task.parameters(), 3e-3)
    noise, hits = smooth_noise(num * size, 48, sigma=2), []
    valid = torch.ones(size, 1, 48, 48, dtype=torch.bool)
    valid[:, :, :8] = False
    for step, rows in enumerate(noise.masked_fill(~valid.repeat(num, 1, 1, 1), 0).split(size)):
        real = torch.ones_like(valid) if show_padding else valid
        samples = tuple(range(step * size, (step + 1) * size))
        lower = torch.zeros(size, 2, dtype=torch.int64)
        batch = Batch(rows, real, tuple(map(str, samples)), samples, lower, torch.ones(size, 2))
        with torch.no_grad():
            views = task.views(batch, SampleRandom(seed=1, step=step, samples=samples), train=False)
        output = task(views)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        task.after_step(step, num)
        hits.append(float(output.metrics["accuracy"]))
    return sum(hits[-25:]) / 25


@pytest.mark.slow
def test_nothing_is_learned_where_there_is_nothing_to_know(tiny_plan):
    """On noise the order stays at its chance, 0.1. Catches whatever tells a box its cell but anatomy: with cells that
    reach into the padding, the network names nearly every order after the same steps, as the second line shows."""
    assert order_accuracy_on_noise(tiny_plan((48, 48)), show_padding=False) < 0.2
    assert order_accuracy_on_noise(tiny_plan((48, 48)), show_padding=True) > 0.5
