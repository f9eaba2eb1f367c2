"""VoCo: bases that tile, overlaps that sum to one, and crops that show what they are said to overlap."""

from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.voco import voco_loss
from nnssl_ext.models.backbone import descriptor
from nnssl_ext.trainers.voco import VoCo, VoCoTrainer, base_grid, best_guess, boxes_anywhere
from nnssl_ext.views.cells import grid_cells, overlaps
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))


def make_batch(patch_size: tuple[int, ...]) -> Batch:
    """Three crops that hold their voxels' places, a channel for each axis; the last is padded with rubbish."""
    data = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in patch_size), indexing="ij"))
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[2, :, -6:] = False
    data = torch.where(valid, data.expand(3, *data.shape), 1e4)
    lower = torch.zeros(3, len(patch_size), dtype=torch.int64)
    return Batch(data, valid, ("a", "b", "c"), RANDOM.samples, lower, torch.ones(3, len(patch_size)))


make_task = partial(task_on, VoCo)


def test_bases_lie_along_all_axes_but_the_shortest():
    assert base_grid(4, (40, 56, 44), (1.0, 1.0, 1.0)) == (1, 4, 4)
    assert base_grid(4, (40, 56, 44), (3.0, 1.0, 0.8)) == (4, 4, 1)
    assert base_grid(4, (56, 44), (1.0, 1.0)) == (4, 4)


def test_overlaps_are_those_of_what_is_shown_and_sum_to_one(tiny_plan, patch_size):
    """Voxels hold their place, so what is shown of a crop tells where it lies, and so what it overlaps.

    Catches bases that overlap or leave seams (the sum is not 1), shares of the wrong one of two boxes, overlaps of
    boxes that are not the ones shown, and crops that reach into padding.
    """
    dims = len(patch_size)
    task = make_task(tiny_plan(patch_size, dims), num_crops=5)
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    torch.testing.assert_close(views["target"].sum(2), torch.ones(3, 5))
    bases, crops = (views[name].flatten(2).mean(2).unflatten(0, (3, -1)) for name in ("bases", "crops"))
    for row, rows in enumerate((patch_size[0], patch_size[0], patch_size[0] - 6)):
        region = torch.tensor([rows - 1, *[edge - 1 for edge in patch_size[1:]]])
        edges = region / torch.tensor(task.grid)
        shares = (1 - (crops[row, :, None] - bases[row]).abs() / edges).clamp(min=0).prod(2)
        torch.testing.assert_close(views["target"][row], shares, atol=1e-3, rtol=0)
        assert views["crops"].unflatten(0, (3, -1))[row, :, 0].max() <= rows


def test_the_loss_compares_crops_with_the_slow_copy_of_their_own_bases(tiny_plan, patch_size):
    """Catches crops paired with another sample's bases, and with the student's."""
    task = make_task(tiny_plan(patch_size, len(patch_size)))
    with torch.no_grad():
        for weight in task.teacher.encoder.parameters():
            weight.mul_(1.1)
        task.eval()
        views = task.views(make_batch(patch_size), RANDOM, train=False)
        bases, crops = (task.projector(descriptor(task.encoder(views[name]))) for name in ("bases", "crops"))
        fixed = task.teacher.projector(descriptor(task.teacher.encoder(views["bases"])))
        rows = [each.unflatten(0, (3, -1)) for each in (crops, bases, fixed)]
        losses = [voco_loss(*(each[i : i + 1] for each in rows), views["target"][i : i + 1])[0] for i in range(3)]
        output = task(views)
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    cosines = torch.nn.functional.cosine_similarity(rows[0][:, :, None], rows[2][:, None], dim=3)
    hits = views["target"].argmax(2) == cosines.argmax(2)
    assert output.metrics["accuracy"].item() == pytest.approx(hits.float().mean().item())
    assert output.metrics["accuracy_chance"].item() == pytest.approx(1 / 9)


@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 2), (5, 3)])
def test_chance_is_what_the_best_constant_answer_achieves(grid):
    """Catches a chance that takes all bases for equally likely: inner ones are the nearest twice as often."""
    cells = grid_cells(torch.ones(1, 1, *[11] * len(grid), dtype=torch.bool), grid)
    boxes = boxes_anywhere(cells, SampleRandom(seed=0, step=0, samples=(0,)), 20000)
    nearest = overlaps(boxes, cells).argmax(2).flatten()
    assert nearest.bincount().max() / 20000 == pytest.approx(best_guess(grid), abs=0.01)


def test_the_slow_copy_moves_by_a_hundredth(tiny_plan):
    task = make_task(tiny_plan((24, 16)))
    before = task.teacher.projector[0].weight.clone()
    with torch.no_grad():
        task.projector[0].weight += 1
    task.after_step(0, 100)
    torch.testing.assert_close(task.teacher.projector[0].weight, before + 0.01)


@pytest.mark.parametrize(
    "override", ["bases_per_axis=1", "num_crops=0", "hidden_width=0", "width=0", "teacher_momentum=1"]
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        VoCoTrainer.configured([override])
