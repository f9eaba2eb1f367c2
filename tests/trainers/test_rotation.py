"""Rotation: labels that are the turns, ten different ones, and nothing but anatomy that tells them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.rotation import Rotation, RotationTrainer
from nnssl_ext.views.rotations import cube_size, inner_view, rotated, rotations
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))
NUM_CLASSES = {2: 4, 3: 10}


def make_batch(patch_size: tuple[int, ...]) -> Batch:
    """Three crops; the last is a volume of three slices along the first axis, rubbish beside it."""
    data = torch.randn(3, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[2, :, 3:] = False
    spacing = torch.ones(3, len(patch_size))
    lower = torch.zeros_like(spacing, dtype=torch.int64)
    return Batch(torch.where(valid, data, 1e4), valid, ("a", "b", "c"), RANDOM.samples, lower, spacing)


make_task = partial(task_on, Rotation)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_classes_are_as_many_different_pictures(dims):
    """Catches a half turn that is listed for the axes of one plane twice, and an identity for every plane."""
    choices = rotations((1.0,) * dims, 1.1)
    image = torch.randn(1, 1, *[4] * dims, generator=torch.Generator().manual_seed(0))
    pictures = rotated(image.expand(len(choices), *image.shape[1:]), choices)
    assert len(choices) == NUM_CLASSES[dims]
    assert len(torch.unique(pictures.flatten(1), dim=0)) == len(choices)
    assert torch.equal(pictures[0], image[0])


def test_planes_of_unequal_spacing_are_dropped_or_refused():
    """Catches classes that stretched voxels tell: of slices 3 mm thick only the turns in their plane are left."""
    assert rotations((3.0, 1.0, 1.05), 1.1) == ((0, (1, 2)), (1, (1, 2)), (2, (1, 2)), (3, (1, 2)))
    with pytest.raises(ValueError, match=r"no two axes .* 1\.1 or less.*-spacing iso"):
        rotations((3.0, 2.0, 1.0), 1.1)


def test_the_cube_is_whole_strides_of_the_axes_that_turn():
    assert cube_size((40, 56, 44), (8, 8, 4), rotations((1, 1, 1), 1.1)) == (40, 40, 40)
    assert cube_size((12, 56, 44), (2, 8, 8), rotations((3, 1, 1), 1.1)) == (12, 40, 40)
    with pytest.raises(ValueError, match=r"holds no cube of 16 voxels"):
        cube_size((8, 56, 44), (8, 8, 8), rotations((1, 1, 1), 1.1))


@pytest.mark.parametrize("patch_size", [(16, 24, 8), (24, 16)], ids=["3d", "2d"])
def test_labels_are_the_turns(tiny_plan, patch_size):
    """Catches labels that do not belong to what is shown, and classes that are never drawn."""
    task, batch, seen = make_task(tiny_plan(patch_size)), make_batch(patch_size), set()
    for step in range(20):
        views = task.views(batch, replace(RANDOM, step=step), train=step % 2 == 0)
        for image, shown, label in zip(views["input"], views["turned"], views["turns"].tolist(), strict=True):
            turn, plane = task.rotations[label]
            assert torch.equal(torch.rot90(image, turn, [axis + 1 for axis in plane]), shown)
            seen.add(label)
        assert views["turned"].abs().max() < 10
    assert seen == set(range(NUM_CLASSES[len(patch_size)]))


@pytest.mark.parametrize("padded", [(0, 0, 0), (5, 0, 2), (2, 9, 0)])
def test_neither_padding_nor_sharpness_tells_the_turn(padded):
    """Noise in the view varies as much along each axis, so its texture is the same after every turn.

    Catches a cube that sticks out into padding, one that is resized from the box of real voxels (and so stretched by
    as much as the padding differs between axes), and a centre half a voxel off along one axis.
    """
    valid = torch.zeros(40, 1, 24, 24, 24, dtype=torch.bool)
    valid[:, :, padded[0] :, padded[1] :, : 24 - padded[2]] = True
    noise = torch.randn(valid.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~valid, 1e4)
    view = inner_view(noise, valid, (20, 20, 20))
    assert view.valid.all()
    steps = torch.stack([view.data.diff(dim=axis).square().mean() for axis in (2, 3, 4)])
    assert steps.max() / steps.min() < 1.03


def test_a_turn_that_padding_tells_is_not_asked_for(tiny_plan):
    """Catches a loss and an accuracy that count views with padding, and moments that such views enter."""
    task, batch = make_task(tiny_plan((24, 16))), make_batch((24, 16))
    views = task.views(batch, RANDOM, train=False)
    assert views["fair"].tolist() == [True, True, False]
    logits = []
    task.head.register_forward_hook(lambda module, args, output: logits.append(output) or output.retain_grad())
    output = task(views)
    output.loss.backward()
    assert (logits[0].grad != 0).any(1).tolist() == [True, True, False]
    entropies = torch.nn.functional.cross_entropy(logits[0], views["turns"], reduction="none")
    assert output.loss.item() == pytest.approx(entropies[:2].sum().item() / 3)
    hits = (logits[0].argmax(1) == views["turns"])[:2].float().mean()
    assert output.metrics["accuracy"].item() == pytest.approx(hits.item())
    assert output.metrics["accuracy_chance"].item() == pytest.approx(0.25)
    assert task.head.standard.moments.count == 2


def test_a_turn_that_stretched_voxels_tell_is_not_asked_for(tiny_plan):
    """Of a case with slices 3 mm thick the turns in their plane alone are asked for, of one with three edges none.

    Catches the plan's spacing taken for that of every case, a chance that does not know what is asked for, and a batch
    that asks for nothing and lowers the mean of an epoch.
    """
    task, batch, asked = make_task(tiny_plan((16, 24, 8))), make_batch((16, 24, 8)), [set(), set(), set()]
    spacing = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.05], [3.0, 2.0, 1.0]])
    batch = replace(batch, valid=torch.ones_like(batch.valid), spacing=spacing)
    for step in range(20):
        views = task.views(batch, replace(RANDOM, step=step), train=False)
        for row in views["fair"].nonzero().flatten().tolist():
            asked[row].add(views["turns"][row].item())
    assert len(asked[0]) > 7
    assert (asked[1], asked[2]) == ({0, 7, 8, 9}, set())
    views["fair"][:] = torch.tensor([True, True, False])
    assert task(views).metrics["accuracy_chance"].item() == pytest.approx((1 / 10 + 1 / 4) / 2)
    views["fair"][:] = False
    metrics = task(views).metrics
    assert metrics["accuracy"].isnan()
    assert metrics["accuracy_chance"].isnan()


def test_an_impossible_setting_is_refused():
    with pytest.raises(ValueError, match=r"max_anisotropy=0\.5 must be 1 or more"):
        RotationTrainer.configured(["max_anisotropy=0.5"])
