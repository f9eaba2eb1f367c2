"""VolumeFusion: the classes tell how the image was mixed, and every one of them counts."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.volume_fusion import (
    VolumeFusion,
    VolumeFusionConfig,
    VolumeFusionTrainer,
    class_accuracy,
    fused,
    share_classes,
)
from nnssl_ext.views.corruptions import paint_boxes
from nnssl_ext.views.spatial import SpatialConfig
from tests.tasks import task_on

SAMPLES = (10, 11, 12, 13)
RANDOM = SampleRandom(seed=3, step=5, samples=SAMPLES)


def make_batch(patch_size: tuple[int, ...], channels: int = 1) -> Batch:
    """Two samples of two crops; the second sample's second crop is padded along the first axis."""
    data = torch.randn(4, channels, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(4, 1, *patch_size, dtype=torch.bool)
    valid[3, :, -6:] = False
    spacing = torch.ones(4, len(patch_size))
    return Batch(data * valid, valid, tuple("abcd"), SAMPLES, torch.zeros_like(spacing, dtype=torch.int64), spacing)


make_task = partial(task_on, VolumeFusion)


def test_the_classes_reproduce_the_image(tiny_plan, patch_size):
    """Catches shares of the wrong volume, rows of different samples mixed, and classes that are no shares."""
    task, batch = make_task(tiny_plan(patch_size, 2)), make_batch(patch_size, channels=2)
    views = task.views(batch, RANDOM, train=False)
    for sample in range(2):
        first, second = batch.data[2 * sample], batch.data[2 * sample + 1]
        share = views["classes"][sample] / 4
        mixed = share * first + (1 - share) * second
        valid = views["valid"][sample]
        assert torch.equal(valid, batch.valid[2 * sample] & batch.valid[2 * sample + 1])
        torch.testing.assert_close(views["image"][sample].where(valid, 0), mixed.where(valid, 0))
        assert not views["image"][sample].masked_fill(valid, 0).any()


def test_the_outermost_shares_are_the_volumes_themselves():
    first, second = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    for value, whole in ((0, second), (3, first)):
        assert torch.equal(fused(first, second, torch.full((1, 1, 3, 5), value), 3), whole)


def test_all_classes_are_equally_likely_in_a_box_and_0_outside():
    """Catches a class that boxes never get, and boxes that share their class."""
    random = SampleRandom(0, 0, tuple(range(400)))
    valid = torch.ones(400, 1, 16, 16, dtype=torch.bool)
    single = share_classes(random, valid, VolumeFusionConfig(boxes=(1, 1)))
    of_boxes = single.flatten(1).amax(1)
    share = torch.bincount(of_boxes, minlength=5) / 400
    assert share.tolist() == pytest.approx([0.2] * 5, abs=0.07)
    assert (single == 0).flatten(1).any(1).all()
    many = share_classes(random, valid, VolumeFusionConfig())
    held = torch.stack([(many == value).flatten(1).any(1) for value in range(5)]).float().mean(1)
    assert held.min() > 0.8
    assert (many == 0).float().mean() > (many > 0).float().mean() / 4


def test_boxes_are_of_the_papers_sizes():
    """From a sixteenth to five eighths of a side, from an eighth along the first axis of a volume."""
    random = SampleRandom(0, 0, tuple(range(500)))
    valid = torch.ones(500, 1, 16, 16, 16, dtype=torch.bool)
    classes = share_classes(random, valid, VolumeFusionConfig(boxes=(1, 1), levels=1))[:, 0]
    extents = []
    for box in classes:
        where = box.nonzero()
        if len(where):
            extents.append(where.amax(0) - where.amin(0) + 1)
    assert torch.stack(extents).amin(0).tolist() == [2, 1, 1]
    assert torch.stack(extents).amax(0).tolist() == [10, 10, 10]


def test_later_boxes_lie_over_earlier_ones():
    """Catches classes that are added up, classes of the other box, and earlier boxes over later ones.

    A box covers a quarter of the patch, so many pairs overlap in part and show which of the two lies on top.
    """
    random = SampleRandom(0, 0, tuple(range(50)))
    valid = torch.ones(50, 1, 16, 16, dtype=torch.bool)
    config = VolumeFusionConfig(boxes=(2, 2), sides=(0.5, 0.5))
    painted = paint_boxes(random, valid, (2, 2), [(0.5, 0.5)] * 2)[:, 0]
    drawn = random.integers("classes", 0, 5, (2,))
    found = share_classes(random, valid, config)[:, 0]
    num_overlapping = 0
    for classes, numbers, (lower, upper) in zip(found, painted, drawn, strict=True):
        top = numbers == 2
        assert top.sum() == 8 * 8  # the second box is whole
        num_overlapping += bool(0 < (numbers == 1).sum() < 8 * 8)
        assert (classes[top] == upper).all()
        assert (classes[numbers == 1] == lower).all()
        assert not classes[numbers == 0].any()
    assert num_overlapping > 10


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_every_class_and_every_common_voxel_counts(request, patch_size, kind):
    """Catches a first class that is treated as background, and padding of either volume in the loss."""
    task = make_task(request.getfixturevalue(kind)(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    assert outputs[0].shape[1] == 5
    assert torch.equal(outputs[0].grad != 0, views["valid"].expand_as(outputs[0]))


def test_chance_is_to_know_how_often_each_class_occurs(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
    real = views["valid"]
    told, classes = output.images["output"][real], views["classes"][real]
    rates = [(told[classes == value] == value).float().mean() for value in classes.unique()]
    counts = torch.bincount(views["classes"][real])
    frequencies = torch.distributions.Categorical(counts.float())
    assert output.metrics["cross_entropy_chance"].item() == pytest.approx(frequencies.entropy().item(), rel=1e-5)
    assert output.metrics["accuracy"].item() == pytest.approx(torch.stack(rates).mean().item())
    assert output.metrics["accuracy_chance"].item() == pytest.approx(1 / len(rates))
    assert output.loss.item() == pytest.approx(
        (output.metrics["dice_loss"] + output.metrics["cross_entropy"]).item(), rel=1e-6
    )


def test_always_telling_the_same_class_is_at_chance_whichever_it_is():
    """Catches an accuracy of all voxels together, which is .7 for always telling the commonest class."""
    classes = torch.tensor([0] * 7 + [2, 2, 3]).view(1, 1, 10)
    valid, counts = torch.ones_like(classes, dtype=torch.bool), torch.tensor([7, 0, 2, 1])
    for value in (0, 2, 3):
        accuracy, chance = class_accuracy(torch.full_like(classes, value), classes, valid, counts)
        assert (accuracy.item(), chance.item()) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert class_accuracy(torch.full_like(classes, 1), classes, valid, counts)[0] == 0
    assert class_accuracy(classes, classes, valid, counts)[0] == 1
    padded = valid & (classes != 3)
    assert class_accuracy(classes, classes, padded, torch.tensor([7, 0, 2, 0]))[0] == 1


def test_volumes_move_on_their_own_in_training(tiny_plan, patch_size):
    """Two equal crops differ once each is flipped by draws of its own: the mixture is no flip of that crop.

    Catches draws that both volumes of a sample share, which would leave it one.
    """
    task = make_task(tiny_plan(patch_size), spatial=SpatialConfig(rotation=0, scaling=0))
    batch = make_batch(patch_size)
    crop = batch.data[:1]
    batch = replace(batch, data=crop.expand(4, *crop.shape[1:]), valid=torch.ones_like(batch.valid))
    torch.testing.assert_close(task.views(batch, RANDOM, train=False)["image"], batch.data[:2])
    axes = range(2, crop.ndim)
    flips = torch.cat([crop.flip(some) for number in range(crop.ndim - 1) for some in combinations(axes, number)])
    assert len(flips) == 2 ** len(patch_size)
    mixtures = torch.cat([task.views(batch, replace(RANDOM, step=step), train=True)["image"] for step in range(4)])
    is_flip = (mixtures.unsqueeze(1) - flips).abs().flatten(2).amax(2) < 1e-4
    assert is_flip.any(1).float().mean() < 0.75


def test_a_sham_takes_the_classes_of_another_sample(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    assert torch.equal(sham["image"], views["image"])
    assert torch.equal(sham["classes"], views["classes"].flip(0))
    assert not torch.equal(sham["classes"], views["classes"])


def test_it_asks_for_pairs_of_one_modality_and_exports_what_it_trained(tiny_plan):
    task = make_task(tiny_plan((24, 16)))
    assert (task.needs.images, task.needs.same) == (2, "modality")
    assert task.info.trains_decoder
    exported = task.export_network().decoder.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in task.decoder.state_dict().items())
    assert exported["seg_layers.1.weight"].shape[0] == 5


def test_settings_are_the_published_ones():
    config = TRAINERS.get("VolumeFusionTrainer")().task_config
    assert (config.levels, config.boxes, config.sides, config.shortest_depth) == (4, (10, 40), (1 / 16, 5 / 8), 1 / 8)


@pytest.mark.parametrize("override", ["levels=0", "boxes=[5,4]", "sides=[0.5,0.2]", "shortest_depth=0.9"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        VolumeFusionTrainer.configured([override])
