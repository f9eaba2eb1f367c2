"""What makes a masked autoencoder: the network sees nothing hidden, and only hidden, real voxels are asked for."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.trainers.mae import MAE, MAETrainer
from tests.tasks import task_on
from tests.trainers.masked import RANDOM, make_batch

make_task = partial(task_on, MAE, block_size=4)


def prediction(task: MAE, views: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return task.eval()(views).images["output"]


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_the_network_sees_nothing_hidden(tiny_plan, patch_size, rubbish):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    spoilt = views | {"image": views["image"].masked_fill(views["hidden"], rubbish)}
    assert torch.equal(prediction(task, spoilt), prediction(task, views))


def test_the_network_sees_what_is_visible(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    changed = views | {"image": views["image"] + (~views["hidden"]).float()}
    assert not torch.equal(prediction(task, changed), prediction(task, views))


def test_padding_and_visible_voxels_give_no_gradient(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    counted = views["hidden"] & views["valid"]
    assert counted.any()
    assert (~counted).any()
    assert torch.equal(outputs[0].grad != 0, counted.expand_as(outputs[0]))


@pytest.mark.parametrize("train", [True, False])
def test_the_hidden_share_is_of_real_voxels(tiny_plan, patch_size, train):
    task = make_task(tiny_plan(patch_size), mask_ratio=0.6, block_size=2)
    views = task.views(make_batch(patch_size), RANDOM, train)
    for hidden, valid in zip(views["hidden"], views["valid"], strict=True):
        assert hidden[valid].float().mean().item() == pytest.approx(0.6, abs=2 ** len(patch_size) / valid.sum().item())
    assert task(views).metrics["hidden_share"].item() == pytest.approx(0.6, abs=0.02)


def test_validation_is_deterministic_and_untouched(tiny_plan, patch_size):
    task, batch = make_task(tiny_plan(patch_size)).eval(), make_batch(patch_size)
    first, second = (task(task.views(batch, RANDOM, train=False)) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.images["output"], second.images["output"])
    assert torch.equal(first.images["input"], batch.data)


def test_training_moves_crops_and_masks_with_the_step(tiny_plan, patch_size):
    task, batch = make_task(tiny_plan(patch_size)), make_batch(patch_size)
    first = task.views(batch, RANDOM, train=True)
    again = task.views(batch, RANDOM, train=True)
    later = [task.views(batch, replace(RANDOM, step=step), train=True) for step in range(6, 12)]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first["hidden"], views["hidden"]) for views in later)
    assert any(not torch.equal(first["target"], views["target"]) for views in later)


def test_chance_is_the_error_of_the_visible_mean(tiny_plan):
    task, batch = make_task(tiny_plan((16, 24, 8), channels=2)), make_batch((16, 24, 8), channels=2)
    views = task.views(batch, RANDOM, train=False)
    expected = []
    for target, hidden, valid in zip(views["target"], views["hidden"], views["valid"], strict=True):
        errors = [(channel[(hidden & valid)[0]] - channel[(~hidden & valid)[0]].mean()) ** 2 for channel in target]
        expected.append(torch.stack(errors).mean())
    assert task(views).metrics["mse_chance"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_a_sham_sees_its_case_and_is_asked_for_another(tiny_plan, patch_size):
    """Fails where the input is rolled along with the target, which would be no sham, or padding is asked for."""
    task, batch = make_task(tiny_plan(patch_size)).eval(), make_batch(patch_size)
    views = task.views(batch, RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    counted = (views["hidden"] & batch.valid & batch.valid.flip(0)).expand_as(batch.data)
    with torch.no_grad():
        honest, output = task(views), task(sham)
    assert torch.equal(output.images["masked"], honest.images["masked"])
    errors = (output.images["output"] - batch.data.flip(0)).square()
    expected = torch.stack([error[where].mean() for error, where in zip(errors, counted, strict=True)]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() != pytest.approx(honest.loss.item(), rel=1e-3)


def test_recipe_is_the_published_one():
    trainer = TRAINERS.get("MAETrainer")()
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.momentum) == ("sgd", 1e-2, 0.99)
    assert (trainer.optim.weight_decay, trainer.optim.clip, trainer.optim.nesterov) == (3e-5, 12, True)
    assert (trainer.schedule.name, trainer.schedule.exponent, trainer.schedule.warmup_steps) == ("poly", 0.9, 0)
    assert (trainer.num_epochs, trainer.steps_per_epoch) == (1000, 250)
    assert (trainer.task_config.mask_ratio, trainer.task_config.block_size) == (0.75, 16)


@pytest.mark.parametrize("override", ["mask_ratio=1", "mask_ratio=0", "block_size=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        MAETrainer.configured([override])


def test_a_block_as_large_as_the_patch_is_refused(tiny_plan):
    with pytest.raises(ValueError, match=r"block_size=24 covers the whole patch .* --set block_size=4"):
        make_task(tiny_plan((16, 24, 8)), block_size=24)
