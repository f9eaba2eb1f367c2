"""Inpainting with contrast: two damages of each crop, both asked for whole, and features that know their partner."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.nt_xent import nt_xent
from nnssl_ext.trainers.inpainting import Inpainting, InpaintingConfig, InpaintingTrainer, damaged
from tests.tasks import task_on

SAMPLES = (10, 11, 12)
RANDOM = SampleRandom(seed=3, step=5, samples=SAMPLES)


def make_batch(patch_size: tuple[int, ...], cases: str = "abc") -> Batch:
    """Three crops; the last is padded along the first axis."""
    data = torch.randn(3, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[2, :, -6:] = False
    spacing = torch.ones(3, len(patch_size))
    return Batch(data * valid, valid, tuple(cases), SAMPLES, torch.zeros_like(spacing, dtype=torch.int64), spacing)


make_task = partial(task_on, Inpainting)


def share_changed(**settings: float) -> torch.Tensor:
    """Share of changed voxels of each of many crops of 48²."""
    data = torch.randn(300, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    random = SampleRandom(0, 0, tuple(range(300)))
    image = damaged(data, torch.ones_like(data, dtype=torch.bool), random, InpaintingConfig(**settings))
    return (image != data).flatten(1).float().mean(1)


def test_holes_are_small_and_windows_large():
    """Catches holes and windows changed for each other: six holes hide two thirds at most, windows spare 1 of 25."""
    holes = share_changed(windows=0, shuffle=0)
    assert holes.min() >= (2 / 48) ** 2
    assert holes.max() <= 6 / 9
    windows = share_changed(windows=1, shuffle=0)
    assert windows.max() <= 1 - (10 / 48) ** 2 + 0.01
    assert holes.mean() < 0.3 < windows.mean()
    assert share_changed(shuffle=0).mean().item() == pytest.approx((holes.mean() + windows.mean()).item() / 2, abs=0.05)


def test_cubes_are_shuffled_as_often_as_said():
    """Ten cubes of 8² on 48² overlap little; a tiny hole, which every crop has, is not what is counted."""
    share = share_changed(windows=0, hole_sides=(0.01, 0.01))
    assert (share > 0.05).float().mean().item() == pytest.approx(0.8, abs=0.07)
    assert share.max() < 10 * 64 / 48**2 + 0.01


def test_the_two_views_are_damaged_differently_and_show_one_crop(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size), shuffle=0, windows=0)
    views = task.views(make_batch(patch_size), RANDOM, train=True)
    assert not torch.equal(views["first"], views["second"])
    for name in ("first", "second"):
        assert 0.5 < (views[name] == views["target"])[views["valid"]].float().mean() < 1
        assert not views[name].masked_fill(views["valid"], 0).any()


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_every_real_voxel_of_both_views_is_asked_for_and_no_other(request, patch_size, kind):
    task = make_task(request.getfixturevalue(kind)(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    asked = torch.cat([views["valid"]] * 2).expand_as(outputs[0])
    assert torch.equal(outputs[0].grad != 0, asked)


def test_the_loss_is_what_its_parts_say(tiny_plan, patch_size):
    """Catches a contrast between reconstructions, a weight that is the other loss, and views paired wrongly.

    The error is that of a loop over the crops of both views, each of which counts alike.
    """
    task = make_task(tiny_plan(patch_size), temperature=0.5).eval()
    batch = make_batch(patch_size)
    views = task.views(batch, RANDOM, train=False)
    with torch.no_grad():
        output = task(views)
        whole = [row for row in range(3) if views["valid"][row].all()]
        pooled = [task.encoder.pooled(views[name]) for name in ("first", "second")]
        restored = [task.decoder(task.encoder(views[name])) for name in ("first", "second")]
    for found, expected in zip((output.embeddings.first, output.embeddings.second), pooled, strict=True):
        torch.testing.assert_close(found[whole], expected[whole])
    metrics = output.metrics
    contrast, chance = nt_xent(output.embeddings.first, output.embeddings.second, 0.5)
    assert (metrics["contrast"].item(), metrics["contrast_chance"].item()) == (contrast.item(), chance.item())
    assert output.loss.item() == pytest.approx((metrics["l1"] + 0.1 * metrics["contrast"]).item(), rel=1e-6)
    errors = [
        (crop - target)[real].abs().mean()
        for crops in restored
        for crop, target, real in zip(crops, views["target"], views["valid"], strict=True)
    ]
    assert metrics["l1"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert metrics["l1_chance"] < 0.9  # no more than what the mean leaves of a normal distribution: √(2/π)


def test_crops_of_one_case_are_no_negatives(tiny_plan):
    task = make_task(tiny_plan((24, 16)))
    metrics = task(task.views(make_batch((24, 16), "aab"), RANDOM, train=False)).metrics
    logs = torch.tensor([3.0, 3.0, 5.0]).log().mean()  # candidates of both views of the three crops
    assert metrics["contrast_chance"].item() == pytest.approx(logs.item())
    alone = task(task.views(make_batch((24, 16), "aaa"), RANDOM, train=False)).metrics
    assert alone["contrast"].item() == alone["contrast_chance"].item() == 0


def test_padding_has_no_part_in_the_features(tiny_vit_plan, patch_size):
    task = make_task(tiny_vit_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    spoilt = views | {name: views[name].masked_fill(~views["valid"], 1e4) for name in ("first", "second")}
    with torch.no_grad():
        assert torch.equal(task(views).embeddings.first, task(spoilt).embeddings.first)


def test_a_sham_has_targets_and_partners_of_other_cases(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    assert sham["partner"].tolist() == [2, 0, 1]
    assert torch.equal(sham["target"][1], views["target"][0])
    assert all(torch.equal(sham[name], views[name]) for name in ("first", "second"))


def test_views_change_with_the_step_and_not_with_the_batch(tiny_plan, patch_size):
    task, batch = make_task(tiny_plan(patch_size)), make_batch(patch_size)
    views = task.views(batch, RANDOM, train=True)
    assert not torch.equal(task.views(batch, replace(RANDOM, step=6), train=True)["first"], views["first"])
    last = replace(batch, data=batch.data[2:], valid=batch.valid[2:], cases=("c",), spacing=batch.spacing[2:])
    alone = task.views(last, replace(RANDOM, samples=SAMPLES[2:]), train=True)
    assert torch.equal(alone["second"], views["second"][2:])


def test_a_single_crop_is_refused_where_it_should_contrast(tiny_plan):
    """Catches a run whose contrast is 0 from the first step to the last."""
    plan = tiny_plan((24, 16))
    (raw,) = plan.raw["configurations"].values()
    raw["batch_size"] = 1
    with pytest.raises(ValueError, match=r"-batch_size of 2 or more, or --set contrast_weight=0"):
        make_task(plan)
    make_task(plan, contrast_weight=0)


def test_settings_are_the_published_ones():
    trainer = TRAINERS.get("InpaintingTrainer")()
    config = trainer.task_config
    assert (config.contrast_weight, config.temperature, config.shuffle, config.cube_edge) == (0.1, 0.05, 0.8, 8)
    assert [round(96 * side) for side in (*config.hole_sides, *config.window_sides)] == [5, 32, 20, 64]
    assert (trainer.optim.name, trainer.optim.lr) == ("adamw", 1e-4)


@pytest.mark.parametrize(
    "override", ["windows=2", "boxes=0", "cube_edge=0", "hole_sides=[0.5,0.2]", "contrast_weight=-1", "temperature=0"]
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        InpaintingTrainer.configured([override])
