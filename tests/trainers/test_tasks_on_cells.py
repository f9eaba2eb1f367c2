"""Jigsaw, relative patch location and CPC: nothing but what a box shows tells where it lies."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.cpc import CPCTrainer
from nnssl_ext.trainers.jigsaw import JigsawTrainer
from nnssl_ext.trainers.relative_patch_location import RelativePatchLocationTrainer

EDGE, KEYS = 36, (0, 1, 2)


@pytest.mark.parametrize("train", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("trainer", [JigsawTrainer, RelativePatchLocationTrainer, CPCTrainer])
def test_no_voxel_enters_two_boxes(tiny_plan, trainer, train):
    """Every fifth voxel is raised alone, and the boxes are counted that show it; gamma alone looks at the whole crop.

    Catches boxes that touch, since what two share tells the answer, and changes of intensity that mix voxels over the
    gap, as a blur of the crop.
    """
    (name,) = (plan := tiny_plan((EDGE, EDGE))).configuration_names
    intensity = replace(trainer.task.Config().intensity, gamma=0, inverted_gamma=0)
    task = trainer.task(trainer.task.Config(intensity=intensity), plan.configuration(name), num_cases=4)
    places = torch.arange(0, EDGE**2, 5)
    rows = 1 + len(places)
    data = torch.randn(1, EDGE**2, generator=torch.Generator().manual_seed(0)).repeat(rows, 1)
    data[torch.arange(1, rows), places] += 1
    data = data.view(rows, 1, EDGE, EDGE).repeat(len(KEYS), 1, 1, 1)
    samples = tuple(key for key in KEYS for _ in range(rows))
    lower, spacing = torch.zeros(len(data), 2, dtype=torch.int64), torch.ones(len(data), 2)
    batch = Batch(data, torch.ones_like(data, dtype=torch.bool), tuple(map(str, samples)), samples, lower, spacing)
    boxes = task.views(batch, SampleRandom(seed=0, step=0, samples=samples), train)["boxes"]
    boxes = boxes.unflatten(0, (len(KEYS), rows, -1))
    shows = (boxes[:, 1:] - boxes[:, :1]).abs().flatten(3).amax(3) > 1e-4
    assert shows.any((0, 1)).all()
    assert shows.sum(2).max() == 1
