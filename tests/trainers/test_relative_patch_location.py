"""Relative patch location: classes that are the places of all other cells, and nothing shown but two boxes."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.relative_patch_location import (
    RelativePatchLocation,
    RelativePatchLocationTrainer,
)
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))


def make_batch(patch_size: tuple[int, ...]) -> Batch:
    """Three crops whose voxels hold their place, from -1 to 1 along each axis, in a channel of its own."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, edge) for edge in patch_size), indexing="ij")
    data = torch.stack(axes).expand(3, -1, *patch_size)
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    lower = torch.zeros(3, len(patch_size), dtype=torch.int64)
    return Batch(data, valid, ("a", "b", "c"), RANDOM.samples, lower, torch.ones(3, len(patch_size)))


make_task = partial(task_on, RelativePatchLocation)


def test_the_class_is_the_direction_of_the_other_cell(tiny_plan, patch_size):
    """What is shown tells its own place. Catches labels that do not belong to it, and the middle cell shown twice."""
    dims, seen = len(patch_size), set()
    task = make_task(tiny_plan(patch_size, dims))
    places = torch.cartesian_prod(*[torch.arange(-1, 2)] * dims)
    places = places[places.any(1)]
    for step in range(60):
        views = task.views(make_batch(patch_size), replace(RANDOM, step=step), train=False)
        means = views["boxes"].flatten(2).mean(2).unflatten(0, (3, 2))
        assert means[:, 0].abs().max() < 1 / 3
        assert torch.equal((means[:, 1] * 1.5).round().long(), places[views["place"]])
        seen |= set(views["place"].tolist())
    assert seen == set(range(3**dims - 1))


def test_the_loss_is_that_of_both_features_side_by_side(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size, len(patch_size))).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
        features = torch.stack([task.encoder.pooled(box[None])[0] for box in views["boxes"]])
        logits = task.head.layers(features.view(3, -1))
    expected = torch.nn.functional.cross_entropy(logits, views["place"])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert output.metrics["accuracy_chance"].item() == pytest.approx(1 / (3 ** len(patch_size) - 1))
    hits = (logits.argmax(1) == views["place"]).float().mean()
    assert output.metrics["accuracy"].item() == pytest.approx(hits.item())


def test_an_impossible_setting_is_refused():
    with pytest.raises(ValueError, match="hidden_width=0 must be 1 or more"):
        RelativePatchLocationTrainer.configured(["hidden_width=0"])
