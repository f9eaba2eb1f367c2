"""Models Genesis: what is damaged, how often, and that the whole real crop is asked for."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.models_genesis import ModelsGenesis, ModelsGenesisConfig, ModelsGenesisTrainer, damaged
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.tokens import hidden_voxels
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11))
ALONE = {"shuffle": 0, "bend": 0, "paint": 0}


def make_batch(patch_size: tuple[int, ...], channels: int = 1) -> Batch:
    """Two z-scored crops; the second is padded along the first axis."""
    data = torch.randn(2, channels, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 1, *patch_size, dtype=torch.bool)
    valid[1, :, -6:] = False
    spacing = torch.ones(2, len(patch_size))
    return Batch(data * valid, valid, ("a", "b"), RANDOM.samples, torch.zeros_like(spacing, dtype=torch.int64), spacing)


make_task = partial(task_on, ModelsGenesis)


def many(number: int = 400) -> tuple[torch.Tensor, torch.Tensor, SampleRandom]:
    data = torch.randn(number, 1, 21, 21, generator=torch.Generator().manual_seed(0))
    return data, torch.ones(number, 1, 21, 21, dtype=torch.bool), SampleRandom(0, 0, tuple(range(number)))


def share_changed(**settings: float) -> torch.Tensor:
    """Share of changed voxels of each of many crops."""
    data, valid, random = many()
    return (damaged(data, valid, random, ModelsGenesisConfig(**settings)) != data).flatten(1).float().mean(1)


def test_each_damage_comes_as_often_as_its_probability_says():
    for name, probability in (("shuffle", 0.5), ("bend", 0.9), ("paint", 0.9)):
        share = (share_changed(**(ALONE | {name: probability})) > 0).float().mean().item()
        assert share == pytest.approx(probability, abs=0.06), name


def test_noise_lies_in_boxes_or_around_them():
    """Catches boxes of the wrong kind: five of a sixth to a third of a side can hide no more than five ninths."""
    inner = share_changed(**ALONE | {"paint": 1, "outer": 0})
    assert inner.max() <= 5 / 9
    assert inner.min() >= (3 / 21) ** 2
    spared = 1 - share_changed(**ALONE | {"paint": 1, "outer": 1})
    assert spared.min() >= (9 / 21) ** 2 - 0.01
    assert share_changed(**ALONE | {"paint": 1}).gt(0.56).float().mean() < 0.8


def test_without_damage_the_crop_is_what_it_was():
    assert not share_changed(**ALONE).any()


def test_shuffled_crops_hold_the_same_voxels_in_each_channel():
    """Catches a shuffle that fills every channel from the first one."""
    data, valid, random = many(6)
    both = torch.cat([data, data + 100], 1)
    image = damaged(both, valid, random, ModelsGenesisConfig(**ALONE | {"shuffle": 1}))
    assert torch.equal(image.flatten(2).sort(2).values, both.flatten(2).sort(2).values)
    torch.testing.assert_close(image[:, 1] - image[:, 0], torch.full_like(data[:, 0], 100), atol=1e-4, rtol=0)


def test_damage_keeps_the_scale_of_the_crop(tiny_plan, patch_size):
    """Catches values clamped to [0, 1], which two thirds of all z-scores lie outside."""
    task = make_task(tiny_plan(patch_size))
    for step in range(6):
        views = task.views(make_batch(patch_size), replace(RANDOM, step=step), train=False)
        for image, target, valid in zip(views["image"], views["target"], views["valid"], strict=True):
            assert image[valid].min() < -1
            assert image[valid].max() > 1
            assert image[valid].abs().max() < 1.5 * target[valid].abs().max()
            assert not image[~valid].any()


def test_flips_reach_every_axis(tiny_plan, patch_size):
    """Catches flips that count the channel axis and never turn the first spatial one; target and image go together."""
    still = SpatialConfig(rotation=0, scaling=0)
    task = make_task(tiny_plan(patch_size), spatial=still, **ALONE)
    batch = make_batch(patch_size)
    seen = set()
    for step in range(20):
        views = task.views(batch, replace(RANDOM, step=step), train=True)
        assert torch.equal(views["image"], views["target"])
        for code in range(2 ** len(patch_size)):
            axes = [axis for axis in range(len(patch_size)) if code >> axis & 1]
            if torch.equal(views["target"][0], batch.data[0].flip([axis + 1 for axis in axes])):
                seen.update(axes)
    assert seen == set(range(len(patch_size)))


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_every_real_voxel_is_asked_for_and_no_other(request, patch_size, kind):
    task = make_task(request.getfixturevalue(kind)(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    assert torch.equal(outputs[0].grad != 0, views["valid"].expand_as(outputs[0]))


def test_a_transformer_sees_no_token_with_padding(tiny_vit_plan, patch_size):
    """And of tokens that it did not see nothing is asked. Catches targets that no input tells."""
    task = make_task(tiny_vit_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    assert torch.equal(views["valid"], ~hidden_voxels(views["kept"], task.encoder.token_size, patch_size))
    assert (views["kept"][0] >= 0).all()
    seen = (views["kept"] >= 0).float().mean(1)
    spoilt = views | {"image": views["image"].masked_fill(~views["valid"], 1e4)}
    assert seen[1] == pytest.approx(1 - 6 / patch_size[0], abs=0.1)
    with torch.no_grad():
        assert torch.equal(task(spoilt).images["output"], task(views).images["output"])


def test_the_loss_is_the_error_over_the_crop_and_chance_a_constant(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
    errors, spread, damage = [], [], []
    for row, (restored, target, valid) in enumerate(
        zip(output.images["output"], views["target"], views["valid"], strict=True)
    ):
        errors.append(((restored - target)[valid] ** 2).mean())
        damage.append(((views["image"][row] - target)[valid] ** 2).mean())
        spread.append(target[valid].var(correction=0))
    assert output.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert output.metrics["mse_chance"].item() == pytest.approx(torch.stack(spread).mean().item(), rel=1e-4)
    assert output.metrics["mse_untouched"].item() == pytest.approx(torch.stack(damage).mean().item(), rel=1e-4)


def test_recipe_and_settings_are_the_published_ones():
    trainer = TRAINERS.get("ModelsGenesisTrainer")()
    config = trainer.task_config
    assert (config.shuffle, config.bend, config.paint, config.outer, config.boxes) == (0.5, 0.9, 0.9, 0.8, 5)
    assert (trainer.optim.name, trainer.optim.lr, trainer.num_epochs) == ("sgd", 1e-2, 1000)


@pytest.mark.parametrize(
    "override", ["shuffle=1.5", "bend=-1", "shuffle_side=0", "boxes=0", "inner_sides=[0.5,0.2]", "outer_sides=[0.5,2]"]
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        ModelsGenesisTrainer.configured([override])
